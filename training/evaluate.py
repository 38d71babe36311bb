"""`cdm-train evaluate`: alignment, Fréchet distance and diversity of any diffusers folder at any step count.

    cdm-train evaluate training/assets/teacher --steps 50 --steps 4 --guidance 4
    cdm-train evaluate runs/student/model --steps 1,2,3,4,6,8 --out benchmarks/results/student.json

Every row is measured on the same captions, with the same starting noise, against the same reference. The rows of real
pictures and of the autoencoder's round trip say how far a perfect generator could get; a table is printed, then one
JSON line.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
from pydantic import Field
from pydantic_settings import CliPositionalArg
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from torch import nn

from engines.cli import CommandSettings
from engines.families.base import Family, load_family
from training.emoji.dataset import EmojiDataset
from training.errors import TrainingError
from training.evalset import EvalSet, Scorer, choose, pictures, table
from training.evaluator import ASSETS, Evaluator
from training.sampling import generate, round_trip
from training.student_folder import read_recorded, record_metrics


class EvaluateSettings(CommandSettings, env_prefix="CDM_EVALUATE_"):
    """Measure a diffusers folder of a known family: alignment, Fréchet distance, diversity."""

    folder: CliPositionalArg[Path] = Field(description="diffusers folder of the model")
    steps: list[Annotated[int, Field(ge=1)]] = Field(
        [4], min_length=1, description="step counts, one row each"
    )
    sigmas: list[Annotated[float, Field(gt=0, le=1)]] = Field(
        [],
        description="one more row: these σ, from 1 downwards and after the shift, in place of the model's own",
    )
    sampler: Literal["euler", "renoise"] = Field(
        "euler",
        description="euler, as engines sample; renoise: fresh noise at every step, for consistency students",
    )
    guidance: float = Field(
        1.0, ge=0, description="classifier-free guidance; other than 1 it doubles the NFE"
    )
    name: str = Field("", description="what the rows are called; empty: the folder's name")
    data: Path = Field(Path("data/emoji"), description="dataset folder with captions and real pictures")
    evaluator: Path | None = Field(None, description="evaluator folder; none: the one that ships")
    count: int = Field(
        500, ge=4, description="prompts: half captions of training pictures, half held-out ones"
    )
    choices: int = Field(
        100, ge=2, description="captions that a picture's own must win against, itself included"
    )
    baselines: bool = Field(True, description="also measure real pictures and the autoencoder's round trip")
    diversity_prompts: int = Field(25, ge=0, description="prompts drawn with several seeds; 0: no diversity")
    diversity_seeds: int = Field(4, ge=2, description="seeds of each")
    batch: int = Field(16, ge=1, description="pictures made at once")
    dtype: Literal["bfloat16", "float32"] = Field(
        "bfloat16",
        description="precision of transformer and autoencoder; time, text and latents stay float32",
    )
    seed: int = Field(0, ge=0, le=1_000_000, description="seed of prompts, distractors and starting noise")
    threads: int = Field(1, ge=1, description="CPU threads")
    out: Path | None = Field(None, description="JSON file to write as well")
    record: bool = Field(
        False, description="also keep the result in FOLDER/provenance.json, from where cdm-export takes it"
    )


def evaluate(settings: EvaluateSettings) -> int:
    """Measure, print the table and one JSON line."""
    torch.set_num_threads(settings.threads)
    if settings.sigmas and (
        settings.sigmas[0] != 1 or settings.sigmas != sorted(settings.sigmas, reverse=True)
    ):
        raise TrainingError(
            f"--sigmas={settings.sigmas}: a schedule begins at 1 and falls; 0 is added at its end"
        )
    if settings.sampler == "renoise" and settings.guidance != 1:
        raise TrainingError(
            f"--guidance={settings.guidance:g}: re-noising samples a student, without guidance; give --guidance 1"
        )
    data = EmojiDataset.load(settings.data)
    if settings.record:
        read_recorded(settings.folder)  # refused now, not after the measuring
    chosen = choose(data, settings.count, settings.choices, settings.seed)
    scorer = Scorer(Evaluator.load(settings.evaluator or ASSETS), chosen)
    family = load_model(settings.folder, settings.dtype)
    rows = baselines(scorer, family) if settings.baselines else []
    with progress() as bar:
        for steps in settings.steps:
            rows.append(measure(scorer, family, family.sigmas(steps), settings, bar))
        if settings.sigmas:
            rows.append(measure(scorer, family, (*settings.sigmas, 0.0), settings, bar, "own σ"))
    result = {"benchmark": "evaluate", **conditions(chosen, settings), "rows": rows}
    print(
        f"{len(chosen.prompts_P)} prompts (half seen, half held out), top-1 among {settings.choices} captions; Fréchet "
        f"against {len(chosen.reference_R)} other real pictures of the same mixture (biased by these counts: compare "
        "rows of one table only)\n"
    )
    print(table(rows) + "\n")
    line = json.dumps(result, ensure_ascii=False)
    print(line)
    if settings.out is not None:
        settings.out.parent.mkdir(parents=True, exist_ok=True)
        settings.out.write_text(json.dumps(result, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    if settings.record:
        record_metrics(settings.folder, "evaluate", result)
    return 0


def progress() -> Progress:
    """A bar in pictures, with time left."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )


def load_model(folder: Path, dtype: str) -> Family:
    """A family with transformer and autoencoder in `dtype`, text encoders in float32."""
    family = load_family(folder)
    # Not diffusers' own `to`, which warns of a list of float32 modules even where it is empty.
    for module in (family.transformer, family.vae):
        nn.Module.to(module, getattr(torch, dtype))
    # Convolutions over channels-last pictures decode 1.5 times as fast on CPU.
    nn.Module.to(family.vae, memory_format=torch.channels_last)  # type: ignore[call-overload]
    return family


def conditions(chosen: EvalSet, settings: EvaluateSettings) -> dict[str, Any]:
    """What a row's numbers depend on, beside the model."""
    return {
        "model": settings.folder.name,
        "data": chosen.data.info.get("sha256", {}),
        "prompts": len(chosen.prompts_P),
        "reference": len(chosen.reference_R),
        "choices": settings.choices,
        "seed": settings.seed,
        "dtype": settings.dtype,
        "batch": settings.batch,
        "threads": settings.threads,
        "torch": torch.__version__,
    }


def baselines(scorer: Scorer, family: Family) -> list[dict[str, Any]]:
    """Real pictures of the very prompts, and the same through the model's autoencoder."""
    real = pictures(scorer.chosen.data, scorer.chosen.prompts_P)
    return [
        {"name": "real pictures", "scores": scorer.score(real)},
        {"name": "autoencoder round trip", "scores": scorer.score(round_trip(family, real))},
    ]


def measure(
    scorer: Scorer, family: Family, sigmas: Sequence[float], settings: EvaluateSettings, bar: Progress, note: str = ""
) -> dict[str, Any]:  # fmt: skip
    """One row: one picture per prompt along `sigmas` (ending in 0), and for some prompts a few more seeds."""
    chosen, captions, steps = scorer.chosen, scorer.chosen.captions, len(sigmas) - 1
    guided = settings.guidance != 1.0
    name = f"{settings.name or settings.folder.name}, {steps} step{'s' if steps > 1 else ''}"
    name += f", guidance {settings.guidance:g}" if guided else ""
    name += ", re-noised" if settings.sampler == "renoise" else ""
    name += f", {note}" if note else ""
    few = (
        np.linspace(0, len(captions) - 1, min(settings.diversity_prompts, len(captions))).round().astype(int)
    )
    prompts = captions + [captions[position] for position in few for _ in range(settings.diversity_seeds)]
    last = chosen.seeds[-1]
    seeds = chosen.seeds + [last + 1 + extra for extra in range(len(few) * settings.diversity_seeds)]
    task = bar.add_task(name, total=len(prompts))
    start = time.perf_counter()
    made = generate(
        family,
        prompts,
        seeds,
        steps,
        settings.guidance,
        settings.batch,
        lambda count: bar.advance(task, count),
        sigmas,
        settings.sampler == "renoise",
    )
    seconds = time.perf_counter() - start
    row: dict[str, Any] = {
        "name": name,
        "steps": steps,
        "sigmas": [round(sigma, 6) for sigma in sigmas],
        "guidance": settings.guidance,
        "nfe": steps * (2 if guided else 1),
        "scores": scorer.score(made[: len(captions)]),
        "seconds_per_picture": seconds / len(prompts),
    }
    if len(few):
        row["diversity"] = scorer.diversity(made[len(captions) :], settings.diversity_seeds)
        row["diversity_prompts"], row["diversity_seeds"] = len(few), settings.diversity_seeds
    return row
