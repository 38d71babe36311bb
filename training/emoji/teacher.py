"""The teacher: text encoders and MMDiT trained by flow matching on the icons' latents, with CFG dropout.

    x_σ = (1−σ)·x0 + σ·ε,   loss = mean |v(x_σ, σ, text) − (ε − x0)|²      (Lipman et al. 2023; SD3, eq. 14)

σ is logit-normal and then shifted as the scheduler shifts it (SD3, section 5.3.2), so that training and sampling agree.
Concepts are drawn evenly: variants of people outnumber everything else by far.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from engines.cli import CommandSettings
from engines.families.base import load_family
from engines.families.sd3 import SD3Family
from engines.files import replace_folder
from training import checkpoint
from training.cpu_kernels import cpu_kernels, keep_freed_memory
from training.draws import generator
from training.ema import EMA
from training.emoji.autoencoder import autoencoder_sha256, encode_images, load_autoencoder
from training.emoji.dataset import EmojiDataset, caption
from training.emoji.model import ModelConfig, build_pipeline
from training.errors import TrainingError
from training.evalset import Scorer, choose
from training.evaluator import ASSETS, Evaluator
from training.grid import tile
from training.losses import renoise
from training.optim import MixedPrecision, split_muon, warmup
from training.optimizer_state import load_optimizer, optimizer_tensors
from training.rollout import shifted
from training.run import Run, config_sha256, numpy_generator
from training.sampling import generate
from training.student_folder import TeacherHashes, keep_teacher

LOOK_STEPS, LOOK_GUIDANCE = 25, 4.0
"""How the pictures on a sample grid are drawn: half the teacher's usual steps, its usual guidance."""


class TeacherSettings(CommandSettings, env_prefix="CDM_TEACHER_"):
    """Train the emoji teacher by flow matching; the same command resumes."""

    data: Path = Field(Path("data/emoji"), description="dataset folder, from `cdm-train emoji-data`")
    vae: Path = Field(
        Path("runs/autoencoder/vae"), description="autoencoder, from `cdm-train emoji-autoencoder`"
    )
    init: Path | None = Field(
        None, description="emoji model folder (teacher or student) to start from; none: random weights"
    )
    out: Path = Field(Path("runs/teacher"), description="run folder; the model is written to OUT/model")
    steps: int = Field(20_000, ge=1, description="optimizer steps; more may be asked for when resuming")
    cooldown: int = Field(2000, ge=0, description="last steps, over which the learning rate falls to zero")
    batch: int = Field(64, ge=1, description="pictures per step")
    lr: float = Field(1.5e-3, gt=0, description="learning rate of AdamW and, RMS-matched, of Muon")
    caption_dropout: float = Field(0.1, ge=0, lt=1, description="share of empty prompts, for guidance")
    ema: float = Field(0.998, ge=0, lt=1, description="decay of the weight average")
    shift: float = Field(1.5, gt=0, description="sigma shift, in training and in the scheduler")
    layers: int = Field(6, ge=1, description="transformer blocks")
    heads: int = Field(3, ge=1, description="attention heads, 64 wide each")
    sample_every: int = Field(500, ge=0, description="steps between sample grids and metrics; 0: none")
    metrics_count: int = Field(
        64, ge=4, description="pictures on a grid, scored by the evaluator; half held out"
    )
    evaluator: Path | None = Field(None, description="evaluator folder; none: the one that ships")
    save_minutes: float = Field(5, gt=0, description="minutes between checkpoints")
    seed: int = Field(0, ge=0, description="seed of everything drawn")
    threads: int = Field(1, ge=1, description="CPU threads")


class Teacher:
    """The trained modules (transformer and both text encoders), their masters, optimizers and average."""

    def __init__(self, family: SD3Family, settings: TeacherSettings) -> None:
        self.family = family
        self.modules = torch.nn.ModuleDict({"transformer": family.transformer, **family.text_modules()})
        self.modules.requires_grad_(True)
        # CLIP's last layer feeds only the pooled vector; positions of the image are a fixed table.
        self.mixed = MixedPrecision.of(self.modules, torch.bfloat16)
        muon, rest = split_muon(self.mixed.masters.items(), ("attn", "ff.", "ff_context", "mlp"))
        self.optimizers: tuple[torch.optim.Optimizer, ...] = (
            torch.optim.Muon(muon, lr=settings.lr, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
            torch.optim.AdamW(rest, lr=settings.lr, betas=(0.9, 0.98), weight_decay=0.01),
        )
        self.ema = EMA(self.mixed.masters, settings.ema)

    def tensors(self) -> Mapping[str, Mapping[str, Tensor]]:
        """For a checkpoint."""
        names = ("muon", "adamw")
        states = {n: optimizer_tensors(o) for n, o in zip(names, self.optimizers, strict=True)}
        return {"master": self.mixed.masters, "ema": self.ema.average, **states}

    def counters(self) -> Mapping[str, Any]:
        """For a checkpoint."""
        return {"ema_updates": self.ema.updates}

    def restore(self, saved: checkpoint.Checkpoint) -> None:
        """From a checkpoint."""
        self.mixed.load(saved.tensors("master"))
        self.ema.load(saved.tensors("ema"), saved.meta["ema_updates"])
        for name, optimizer in zip(("muon", "adamw"), self.optimizers, strict=True):
            load_optimizer(optimizer, saved.tensors(name))

    @torch.no_grad()
    def averaged(self, initial: Path) -> SD3Family:
        """A float32 copy of the model that holds the averaged weights."""
        family = load_family(initial)
        assert isinstance(family, SD3Family)
        copies = dict(
            torch.nn.ModuleDict(
                {"transformer": family.transformer, **family.text_modules()}
            ).named_parameters()
        )
        for name, average in self.ema.average.items():
            copies[name].copy_(average)
        return family


def draw_sigma(count: int, shift: float, random: torch.Generator) -> Tensor:
    """Logit-normal σ in (0, 1), shifted: σ ← shift·σ / (1 + (shift − 1)·σ)."""
    sigma_B = torch.sigmoid(torch.randn(count, generator=random))
    return shifted(sigma_B, shift)


def prepare(settings: TeacherSettings, data: EmojiDataset) -> tuple[SD3Family, Tensor]:
    """The model folder (built once) and all pictures' scaled latents `(N, C, H, W)` (cached in the run folder)."""
    vae = load_autoencoder(settings.vae, "--vae")
    settings.out.mkdir(parents=True, exist_ok=True)
    cache = settings.out / "latents.npy"
    if not cache.is_file():
        latents = encode_images(vae, data.images, np.arange(len(data.records)))
        scaled = (latents - vae.config.shift_factor) * vae.config.scaling_factor
        np.save(settings.out / "latents.partial.npy", scaled.astype(np.float16))
        (settings.out / "latents.partial.npy").rename(cache)
    latents_NCHW = torch.from_numpy(np.load(cache, allow_pickle=False)).float()
    initial = settings.out / "initial"
    if not (initial / "model_index.json").is_file():
        shutil.rmtree(initial, ignore_errors=True)
        if settings.init is not None:
            keep_teacher(settings.init, TeacherHashes.of(settings.init, "--init"), initial)
            return _initial_family(initial, settings), latents_NCHW
        words = [caption(data.records[i]) for i in data.indices("train")]
        words += [word for i in data.indices("train") for word in data.records[i].keywords]
        config = ModelConfig(layers=settings.layers, heads=settings.heads, shift=settings.shift)
        build_pipeline(initial, vae, words, latents_NCHW.shape[-1], config, settings.seed)
    return _initial_family(initial, settings), latents_NCHW


def _initial_family(initial: Path, settings: TeacherSettings) -> SD3Family:
    """Load it; a folder given by `--init` must be what the other settings say.

    Raises:
        TrainingError: it is another model, or was made for another autoencoder's latents.
    """
    family = load_family(initial)
    if settings.init is None:
        assert isinstance(family, SD3Family)
        return family
    if not isinstance(family, SD3Family):
        raise TrainingError(
            f"--init={settings.init} is a {family.pipeline_class}; give an emoji model's folder"
        )
    config: Any = family.transformer.config
    vae = load_autoencoder(settings.vae, "--vae").config
    for flag, asked, there in (
        ("--layers", settings.layers, config.num_layers),
        ("--heads", settings.heads, config.num_attention_heads),
        ("--shift", settings.shift, family.scheduler.config.shift),
    ):
        if asked != there:
            raise TrainingError(
                f"{flag}={asked}, but --init={settings.init} has {there}; give {flag} {there}"
            )
    if (vae.scaling_factor, vae.shift_factor) != (family.scaling_factor, family.shift_factor):
        raise TrainingError(
            f"--init={settings.init} was trained on latents of another autoencoder than --vae={settings.vae} "
            f"(scaling factor {family.scaling_factor}, not {vae.scaling_factor}); give --vae {settings.init / 'vae'}"
        )
    return family


def train(settings: TeacherSettings) -> int:
    """Train and write `OUT/model`, a diffusers folder with `provenance.json`."""
    torch.set_num_threads(settings.threads)
    keep_freed_memory()
    data = EmojiDataset.load(settings.data)
    # Folders may move, what is in them may not change: latents and the model's autoencoder are made of it once.
    inputs = {"data_sha256": data.sha256(), "vae_sha256": autoencoder_sha256(settings.vae, "--vae")}
    if settings.init is not None:
        inputs["init_sha256"] = TeacherHashes.of(settings.init, "--init").components
    free = (
        "init",
        "steps",
        "cooldown",
        "threads",
        "out",
        "sample_every",
        "save_minutes",
        "data",
        "vae",
        "metrics_count",
        "evaluator",
    )
    config = {**settings.model_dump(mode="json"), **inputs}
    run = Run(settings.out, config, settings.steps, settings.save_minutes, free)
    if not run.started:  # what a start with other settings left behind
        (settings.out / "latents.npy").unlink(missing_ok=True)
        shutil.rmtree(settings.out / "initial", ignore_errors=True)
    family, latents_NCHW = prepare(settings, data)
    teacher = Teacher(family, settings)
    count = sum(p.numel() for p in family.transformer.parameters())
    print(f"transformer: {count / 1e6:.1f} M parameters; {len(data.indices('train'))} training pictures")
    rows_train = np.asarray(data.indices("train"))
    cumulative = np.cumsum(data.concept_weights(rows_train))
    start = run.resume(teacher)
    for step in run.steps(start, teacher):
        rng, random = numpy_generator(settings.seed, step), generator(settings.seed, step, 0)
        rows = rows_train[np.searchsorted(cumulative, rng.random(settings.batch) * cumulative[-1])]
        prompts = [caption(data.records[row], rng) for row in rows]
        prompts = ["" if rng.random() < settings.caption_dropout else prompt for prompt in prompts]
        x0_BCHW = latents_NCHW[rows]
        noise_BCHW = torch.randn(x0_BCHW.shape, generator=random)
        sigma_B = draw_sigma(settings.batch, settings.shift, random)
        with cpu_kernels():
            loss = flow_matching_loss(family, x0_BCHW, noise_BCHW, sigma_B, family.tokenize(prompts))
            loss.backward()  # type: ignore[no-untyped-call]
        cooled = min(1.0, (settings.steps - step) / settings.cooldown) if settings.cooldown else 1.0
        norm = teacher.mixed.step(
            *teacher.optimizers,
            clip=1.0,
            lr=settings.lr * warmup(step, settings.steps, 200, "constant") * cooled,
        )
        teacher.ema.update(teacher.mixed.masters)
        run.log(step, loss=loss.item(), norm=norm)
        if settings.sample_every and (step + 1) % settings.sample_every == 0:
            look(run, step, teacher.averaged(settings.out / "initial"), data, latents_NCHW, settings)
    write_model(teacher.averaged(settings.out / "initial"), settings, settings.steps, data)
    return 0


def look(
    run: Run,
    step: int,
    family: SD3Family,
    data: EmojiDataset,
    latents_NCHW: Tensor,
    settings: TeacherSettings,
) -> None:
    """The model as it is now: written, its held-out loss and alignment logged, its pictures drawn on one sheet."""
    write_model(family, settings, step + 1, data)
    values: dict[str, float] = {"heldout_loss": heldout_loss(family, data, latents_NCHW, settings)}
    chosen = choose(
        data, settings.metrics_count, min(100, len({r.name for r in data.records})), settings.seed
    )
    torch.nn.Module.to(family.transformer, torch.bfloat16)
    made = generate(family, chosen.captions, chosen.seeds, LOOK_STEPS, LOOK_GUIDANCE, batch=32)
    scores = Scorer(Evaluator.load(settings.evaluator or ASSETS), chosen).score(made)
    values |= {f"alignment_{group}": scores[group]["alignment"] for group in ("seen", "heldout")}
    run.record(step, **values)
    sheet = settings.out / "samples" / f"{step + 1:06d}.png"
    sheet.parent.mkdir(exist_ok=True)
    tile(made, 8).save(sheet)


def flow_matching_loss(
    family: SD3Family, x0_BCHW: Tensor, noise_BCHW: Tensor, sigma_B: Tensor, ids: dict[str, Tensor]
) -> Tensor:
    """mean |v(x_σ, σ, text) − (ε − x0)|²."""
    x_BCHW = renoise(x0_BCHW, noise_BCHW, sigma_B)
    v_BCHW = family.velocity(family.transformer, x_BCHW, sigma_B, family.embed(ids))
    return (v_BCHW - (noise_BCHW - x0_BCHW)).square().mean()


@torch.no_grad()
def heldout_loss(
    family: SD3Family, data: EmojiDataset, latents_NCHW: Tensor, settings: TeacherSettings
) -> float:
    """Loss of 256 held-out pictures at fixed noise and σ: comparable between steps and runs."""
    rows = np.asarray(data.indices("heldout_pair"))[:256]
    random = generator(settings.seed, 0, 1)
    x0_BCHW = latents_NCHW[rows]
    noise_BCHW = torch.randn(x0_BCHW.shape, generator=random)
    sigma_B = draw_sigma(len(rows), settings.shift, random)
    ids = family.tokenize([caption(data.records[row]) for row in rows])
    return flow_matching_loss(family, x0_BCHW, noise_BCHW, sigma_B, ids).item()


def _origin(init: Path) -> str:
    return f"flow matching from {init.name} (transformer sha256 {TeacherHashes.of(init, '--init').transformer[:12]})"


def write_model(family: SD3Family, settings: TeacherSettings, step: int, data: EmojiDataset) -> None:
    """Write the model and where it comes from."""
    target, partial = settings.out / "model", settings.out / ".model.partial"
    shutil.rmtree(partial, ignore_errors=True)
    family.save(partial)
    provenance = {
        "teacher": "trained from scratch" if settings.init is None else _origin(settings.init),
        "recipe": "emoji-teacher",
        "config_sha256": config_sha256(settings.model_dump(mode="json")),
        "steps_trained": step,
        "metrics": {"samples": step * settings.batch},
        "licences": sorted({f"{r.licence}: {r.attribution}" for r in data.records}),
    }
    (partial / "provenance.json").write_text(json.dumps(provenance, indent=2) + "\n", encoding="utf-8")
    replace_folder(partial, target)
