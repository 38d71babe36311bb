"""The evaluator's recipe: symmetric InfoNCE on the real training pictures, never on held-out ones.

    L = ½·(CE(s·Z_img·Z_txtᵀ, diag) + CE(s·Z_txt·Z_imgᵀ, diag))        (Radford et al. 2021, figure 3)

No two pictures of a batch share a name, so that no negative is a right answer. Pictures are moved, scaled, blurred and
made noisy, so that a generator is judged by what it draws and not by its autoencoder's softness; never mirrored, since
left and right are part of what captions say.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from torch import Tensor
from torch.nn import functional as F

from engines.cli import CommandSettings
from engines.files import write_text_atomically
from training import checkpoint, metrics
from training.draws import generator
from training.emoji.augment import augment
from training.emoji.dataset import EmojiDataset
from training.emoji.splits import SPLITS
from training.errors import TrainingError
from training.evaluator import (
    PAD_ID,
    TOKENIZER,
    Evaluator,
    EvaluatorConfig,
    EvaluatorModel,
    token_ids,
)
from training.optim import warmup
from training.optimizer_state import load_optimizer, optimizer_tensors
from training.run import Run, config_sha256, numpy_generator

CHOICES = 100


class EvaluatorSettings(CommandSettings, env_prefix="CDM_EVALUATOR_"):
    """Train the image–text encoder that judges pictures; the same command resumes."""

    data: Path = Field(Path("data/emoji"), description="dataset folder, from `cdm-train emoji-data`")
    out: Path = Field(Path("runs/evaluator"), description="run folder; the model is written to OUT/model")
    steps: int = Field(650, ge=1, description="optimizer steps; a resumed run may end sooner or later")
    batch: int = Field(256, ge=2, description="pictures per step, each with a name of its own")
    lr: float = Field(2e-3, gt=0, description="peak learning rate of AdamW; cosine to zero")
    weight_decay: float = Field(0.1, ge=0, description="of matrices and convolutions")
    by_picture: float = Field(
        0.25, ge=0, le=1, description="share of a batch drawn evenly over pictures, not concepts"
    )
    seed: int = Field(0, ge=0, description="seed of everything drawn")
    threads: int = Field(1, ge=1, description="CPU threads")


def contrastive_loss(image_BE: Tensor, text_BE: Tensor, log_scale: Tensor) -> Tensor:
    """Symmetric InfoNCE of unit embeddings; the temperature's inverse is kept at 100 or below, as CLIP does."""
    logits_BB = log_scale.exp().clamp(max=100) * image_BE @ text_BE.T
    target_B = torch.arange(len(logits_BB))
    return (F.cross_entropy(logits_BB, target_B) + F.cross_entropy(logits_BB.T, target_B)) / 2


def build_tokenizer(captions: Sequence[str], vocabulary: int) -> Tokenizer:
    """Byte-pair encoding of lower-case words; id `PAD_ID` pads, letters never seen are dropped."""
    learnt = _bpe(models.BPE(end_of_word_suffix="</w>"))
    trainer = trainers.BpeTrainer(vocab_size=vocabulary, end_of_word_suffix="</w>", show_progress=False)
    learnt.train_from_iterator(captions, trainer)
    model = json.loads(learnt.to_str())["model"]
    merges = [
        tuple(merge) if isinstance(merge, list) else tuple(merge.split(" ")) for merge in model["merges"]
    ]
    # The trainer numbers letters in another order each time; equal captions shall make equal files.
    merged = dict.fromkeys(left + right for left, right in merges)
    letters = sorted(token for token in model["vocab"] if token not in merged)
    vocab = {token: index for index, token in enumerate(["<pad>", *letters, *merged])}
    assert vocab["<pad>"] == PAD_ID
    return _bpe(models.BPE(vocab=vocab, merges=merges, end_of_word_suffix="</w>"))


def _bpe(model: models.BPE) -> Tokenizer:
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFKD(), normalizers.StripAccents(), normalizers.Lowercase()]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return tokenizer


def draw_rows(
    data: EmojiDataset,
    rows: NDArray[np.int64],
    weights: NDArray[np.float64],
    settings: EvaluatorSettings,
    rng: np.random.Generator,
) -> NDArray[np.int64]:
    """`batch` of `rows` with distinct names: most by concept, a part evenly over pictures (variants tell small
    differences apart).

    Raises:
        TrainingError: the data has fewer names than a batch takes.
    """
    chosen: dict[str, int] = {}
    cumulative = np.cumsum(weights)
    for _ in range(64):
        by_concept = rows[np.searchsorted(cumulative[:-1] / cumulative[-1], rng.random(settings.batch))]
        by_picture = rows[rng.integers(len(rows), size=settings.batch)]
        for row in np.where(rng.random(settings.batch) < settings.by_picture, by_picture, by_concept):
            chosen.setdefault(data.records[int(row)].name, int(row))
            if len(chosen) == settings.batch:
                return np.array(list(chosen.values()))
    names = len({data.records[int(row)].name for row in rows})
    raise TrainingError(
        f"--batch={settings.batch} needs as many names, {settings.data} trains on {names}; lower it"
    )


class _State:
    def __init__(self, model: EvaluatorModel, optimizer: torch.optim.Optimizer) -> None:
        self.model, self.optimizer = model, optimizer

    def tensors(self) -> Mapping[str, Mapping[str, Tensor]]:
        return {"model": self.model.state_dict(), "adamw": optimizer_tensors(self.optimizer)}

    def counters(self) -> Mapping[str, Any]:
        return {}

    def restore(self, saved: checkpoint.Checkpoint) -> None:
        self.model.load_state_dict(saved.tensors("model"))
        load_optimizer(self.optimizer, saved.tensors("adamw"))


def build_evaluator(settings: EvaluatorSettings, data: EmojiDataset, config: EvaluatorConfig) -> Evaluator:
    """Random weights, and the tokenizer of this run folder (trained on the training captions if there is none yet)."""
    path = settings.out / TOKENIZER
    if path.is_file():
        tokenizer = Tokenizer.from_str(path.read_text(encoding="utf-8"))
    else:
        trained = [data.records[int(row)] for row in data.indices("train")]
        tokenizer = build_tokenizer(
            [data.caption(record) for record in trained]
            + [word for record in trained for word in record.keywords],
            config.vocabulary - 1,
        )
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text_atomically(path, tokenizer.to_str(pretty=True))
    torch.manual_seed(settings.seed)
    # torch's stubs know no memory format here.
    model: EvaluatorModel = EvaluatorModel(config).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return Evaluator(model, tokenizer, config)


def train(settings: EvaluatorSettings) -> int:
    """Train, score real pictures of every split, and write `OUT/model`."""
    torch.set_num_threads(settings.threads)
    data = EmojiDataset.load(settings.data)
    rows = np.asarray(data.indices("train"))
    weights = data.concept_weights(rows)
    config = EvaluatorConfig()
    free = ("threads", "out", "data", "steps")
    bound = {**settings.model_dump(mode="json"), "data_sha256": data.sha256()}
    run = Run(settings.out, bound, settings.steps, save_minutes=2, free=free)
    if not run.started:  # the tokenizer of a start with other data
        (settings.out / TOKENIZER).unlink(missing_ok=True)
    evaluator = build_evaluator(settings, data, config)
    model = evaluator.model
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": settings.weight_decay}, {"params": vectors, "weight_decay": 0.0}],
        lr=settings.lr, betas=(0.9, 0.98),
    )  # fmt: skip
    state = _State(model, optimizer)
    for step in run.steps(run.resume(state), state):
        model.train()
        rng, random = numpy_generator(settings.seed, step), generator(settings.seed, step, 0)
        drawn = draw_rows(data, rows, weights, settings, rng)
        ids = token_ids(
            evaluator.tokenizer, [data.caption(data.records[row], rng) for row in drawn], config.text_length
        )
        pictures = augment(
            data.images[np.sort(drawn)][np.argsort(np.argsort(drawn))], config.size, rng, random
        )
        with torch.autocast("cpu", torch.bfloat16):
            image_BE, _ = model.embed_images(pictures)
            text_BE = model.embed_texts(ids)
        loss = contrastive_loss(image_BE, text_BE, model.log_scale)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        norm = float(torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0))
        for group in optimizer.param_groups:
            group["lr"] = settings.lr * warmup(step, settings.steps, 50, "cosine")
        optimizer.step()
        right = float(
            (image_BE.detach() @ text_BE.detach().T).argmax(1).eq(torch.arange(len(drawn))).float().mean()
        )
        run.log(step, loss=float(loss.detach()), right=right, norm=norm)
    finish(evaluator, data, settings)
    return 0


def finish(evaluator: Evaluator, data: EmojiDataset, settings: EvaluatorSettings) -> None:
    """Standardise the features over real training pictures, score every split, write the folder, and tell."""
    rows = np.asarray(data.indices("train"))
    chosen = np.random.default_rng(settings.seed).choice(
        rows, size=min(2048, len(rows)), replace=False, p=data.concept_weights(rows)
    )
    features = torch.from_numpy(evaluator.images(data.images[np.sort(chosen)]).features)
    evaluator.model.feature_mean.copy_(features.mean(0))
    evaluator.model.feature_std.copy_(features.std(0).clamp(min=1e-3))
    evaluator.info = {
        "trained_on": f"{len(rows)} training pictures of {settings.data.name}",
        "config_sha256": config_sha256(settings.model_dump(mode="json", exclude={"out", "data", "threads"})),
        "steps_trained": settings.steps,
        "top1_among": min(CHOICES, len({r.name for r in data.records})),
        "top1": {split: score(evaluator, data, split, settings.seed) for split in SPLITS},
        "licences": sorted({record.licence for record in data.records}),
    }
    evaluator.save(settings.out / "model")
    for split, share in evaluator.info["top1"].items():
        print(f"{split}: {share:.1%} top-1 among {evaluator.info['top1_among']} captions")


def score(evaluator: Evaluator, data: EmojiDataset, split: str, seed: int, limit: int = 1000) -> float:
    """Top-1 among `CHOICES` captions (all names, if there are fewer) of real pictures of a split."""
    rows = np.asarray(data.indices(split))  # type: ignore[arg-type]
    rows = np.sort(np.random.default_rng(seed).permutation(rows)[:limit])
    names = [record.name for record in data.records]
    others = metrics.distractors([names[row] for row in rows], names, min(CHOICES, len(set(names))) - 1, seed)
    captions = evaluator.texts([data.caption(record) for record in data.records])
    embedding = evaluator.images(data.images[rows]).embedding
    return float(metrics.alignment(embedding, captions[rows], captions[others]).mean())
