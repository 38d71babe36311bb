"""`cdm-bench finetune`: a distilled student learns a domain it has not seen; what does that cost it?

    cdm-bench finetune --teacher training/assets/teacher --student runs/emoji-cdm/student

The domain is made of the emoji data: *night* pictures, whose lightness is turned over (white ground becomes black, hues
stay), and whose captions begin with "night". Turning over twice gives the picture back: so night pictures are turned
over and then scored as any other, by an evaluator that need know nothing of night. As many ordinary pictures are mixed
in where flow matching learns: without them even the teacher forgets what day looks like.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from pydantic import Field

from benchmarks.report import show
from benchmarks.train_command import cdm_train
from engines.cli import CommandSettings, UsageError
from engines.files import replace_folder, write_text_atomically
from training.emoji.dataset import EmojiDataset
from training.evalset import EvalSet, Scorer, choose, pictures
from training.evaluate import EvaluateSettings, load_model
from training.evaluator import ASSETS, Evaluator
from training.pictures import METADATA
from training.sampling import generate, round_trip

WORD = "night"
EDGE = 4
"""Pixels of a picture's border, where its ground shows."""

Keep = Mapping[str, object]
PHASE_TWO: Mapping[str, Keep] = {
    "CDM on domain prompts": {"keep-share": 0, "keep-weight": 0},
    "CDM with general prompts": {"keep-weight": 0},
    "CDM with general prompts and λ=1": {"keep-weight": 1},
}


class FinetuneBenchSettings(CommandSettings, env_prefix="CDM_BENCH_FINETUNE_"):
    """Fine-tune a teacher and its student on a new domain in several ways, and measure both domains."""

    teacher: Path = Field(Path("training/assets/teacher"), description="diffusers folder of the teacher")
    student: Path = Field(Path("runs/emoji-cdm/student"), description="the student distilled from it")
    data: Path = Field(Path("data/emoji"), description="dataset folder")
    out: Path = Field(Path("runs/finetune"), description="folder of pictures, runs and measurements")
    rows: list[str] = Field([], description=f"ways of phase two; empty: all of {', '.join(PHASE_TWO)}")
    pictures: int = Field(
        1000, ge=8, description="pictures of the domain that are trained on, and of the old one"
    )
    flow_steps: int = Field(1000, ge=1, description="updates of flow matching, of teacher and of student")
    cdm_steps: int = Field(400, ge=2, description="iterations of phase two; the student takes every second")
    fake_warmup: int = Field(40, ge=0, description="first of these, for the fake teacher alone")
    count: int = Field(200, ge=4, description="prompts measured of each domain")
    seed: int = Field(0, ge=0, description="seed of pictures and training")
    threads: int = Field(1, ge=1, description="CPU threads")


def run(settings: FinetuneBenchSettings) -> int:
    """Train and measure what is not there yet; print the table and one JSON line."""
    for row in set(settings.rows) - PHASE_TWO.keys():
        raise UsageError(f"there is no row {row!r}; rows: {', '.join(PHASE_TWO)}")
    torch.set_num_threads(settings.threads)
    data = EmojiDataset.load(settings.data)
    chosen = choose(data, settings.count, EvaluateSettings.model_fields["choices"].default, seed=0)
    folder = settings.out / "night"
    if not folder.is_dir():
        write_domain(folder, data, chosen, settings.pictures, settings.seed)
    base, old = settings.teacher, settings.student
    flow = {
        "pictures": folder, "steps": settings.flow_steps, "batch": 16, "warmup": 20, "lr-student": 2e-4,
        "cooldown": settings.flow_steps // 4, "ema-decay": 0.99,
    }  # fmt: skip
    tuned = _train(settings, "teacher", ["finetune"], {"teacher": base, **flow}) / "model"
    models = {"old student": (old, 4, 1.0)}
    naive = _train(settings, "naive", ["finetune"], {"teacher": old, **flow}) / "model"
    models["student, flow matching"] = (naive, 4, 1.0)
    for number, (row, changes) in enumerate(PHASE_TWO.items()):
        if settings.rows and row not in settings.rows:
            continue
        keep = {
            "teacher": tuned, "student": old, "prompts": folder / "prompts.txt", "general": settings.data,
            "steps": settings.cdm_steps, "fake-warmup": settings.fake_warmup, "ema-decay": 0.98,
        }  # fmt: skip
        done = _train(settings, f"keep-{number}", ["emoji-finetune-student"], keep | dict(changes))
        models[row] = (done / "student", 4, 1.0)
    models["fine-tuned teacher, 40 NFE"] = (tuned, 20, 4.0)
    scorer = Scorer(Evaluator.load(ASSETS), chosen)
    rows = [{"model": "autoencoder round trip", **_measured(settings, scorer, "real", None)}]
    for name, model in models.items():
        rows.append({"model": name, **_measured(settings, scorer, model[0].parent.name, model)})
    facts = {
        "flow_steps": settings.flow_steps,
        "cdm_steps": settings.cdm_steps,
        "fake_warmup": settings.fake_warmup,
    }
    show("finetune", rows, **facts, seed=settings.seed, count=settings.count, pictures=settings.pictures)
    return 0


def turned_over(pictures_NHWC: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Lightness (max + min)/2 of each pixel mirrored, hue and chroma kept; twice gives the picture back."""
    wide = pictures_NHWC.astype(np.int16)
    moved = wide + 255 - wide.max(-1, keepdims=True) - wide.min(-1, keepdims=True)
    turned: NDArray[np.uint8] = moved.astype(np.uint8)
    return turned


def dark_ground(pictures_NHWC: NDArray[np.uint8]) -> float:
    """Share of pictures whose border is dark in the median: of the domain, or not."""
    edge = np.ones(pictures_NHWC.shape[1:3], bool)
    edge[EDGE:-EDGE, EDGE:-EDGE] = False
    return float((np.median(pictures_NHWC.max(-1)[:, edge], axis=1) < 64).mean())


def sharpness(pictures_NHWC: NDArray[np.uint8]) -> float:
    """Mean absolute difference of neighbouring pixels."""
    wide = pictures_NHWC.astype(np.float32)
    return float(np.abs(np.diff(wide, axis=1)).mean() + np.abs(np.diff(wide, axis=2)).mean()) / 2


def write_domain(folder: Path, data: EmojiDataset, chosen: EvalSet, count: int, seed: int) -> None:
    """`count` night pictures of the training split and as many others, none of which is measured against, as an
    `imagefolder`; `prompts.txt` has the night captions.
    """
    rows = np.setdiff1d(data.indices("train"), np.concatenate([chosen.prompts_P, chosen.reference_R]))
    weights = data.concept_weights(rows)
    drawn = np.random.default_rng(seed).choice(rows, 2 * count, replace=False, p=weights / weights.sum())
    partial = folder.with_name(f".{folder.name}.partial")
    partial.mkdir(parents=True, exist_ok=True)
    lines, prompts = [], []
    for number, row in enumerate(drawn):
        name, caption, picture = f"{row}.png", data.caption(data.records[row]), np.asarray(data.images[row])
        if number < count:
            caption, picture = f"{WORD} {caption}", turned_over(picture)
            prompts.append(caption)
        Image.fromarray(picture).save(partial / name)
        lines.append(json.dumps({"file_name": name, "text": caption}, ensure_ascii=False))
    (partial / METADATA).write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    (partial / "prompts.txt").write_text("".join(text + "\n" for text in prompts), encoding="utf-8")
    replace_folder(partial, folder)


def _train(
    settings: FinetuneBenchSettings, name: str, command: Sequence[str], flags: Mapping[str, object]
) -> Path:
    """The folder of a run, which is run if it is not complete."""
    out = settings.out / name
    if not any((out / product / "provenance.json").is_file() for product in ("model", "student")):
        print(name, file=sys.stderr, flush=True)
        common = {"out": out, "seed": settings.seed, "threads": settings.threads, "sample-every": 0}
        cdm_train(command, {**flags, **common, "tracker": "none"})
    return out


def _measured(
    settings: FinetuneBenchSettings, scorer: Scorer, name: str, model: tuple[Path, int, float] | None
) -> dict[str, Any]:
    """Both domains' figures, kept in a file; without a model of real pictures through the autoencoder."""
    path = settings.out / f"measured-{name}.json"
    if not path.is_file():
        print(f"measuring {name}", file=sys.stderr, flush=True)
        chosen, real = scorer.chosen, pictures(scorer.chosen.data, scorer.chosen.prompts_P)
        family = load_model(settings.student if model is None else model[0], "bfloat16")
        row: dict[str, Any] = {}
        for domain in ("new", "old"):
            turn = turned_over if domain == "new" else np.asarray
            if model is None:
                made = round_trip(family, turn(real))
            else:
                captions = [f"{WORD} {text}" if domain == "new" else text for text in chosen.captions]
                made = generate(family, captions, chosen.seeds, model[1], model[2])
            scores = scorer.score(turn(made))["overall"]
            row |= {
                f"{domain}: Fréchet": round(scores["frechet"], 2),
                f"{domain}: alignment": round(scores["alignment"], 3),
                f"{domain}: dark ground": round(dark_ground(made), 3),
                f"{domain}: sharpness": round(sharpness(made) / sharpness(turn(real)), 3),
            }
        write_text_atomically(path, json.dumps(row, indent=2, ensure_ascii=False) + "\n")
    kept: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return kept
