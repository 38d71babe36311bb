"""`cdm-bench ablation`: distil one teacher by every objective with equal budgets and several seeds, and compare.

    cdm-bench ablation --teacher training/assets/teacher --steps 500 --seeds 0,1,2

Each row is `cdm-train RECIPE --variant …` in a process of its own, measured as `cdm-train evaluate` does. What is there
is neither run nor measured again, so that the same command goes on where it was stopped, and the table is made of what
is there. Checkpoints of finished runs are deleted, students stay.
"""

from __future__ import annotations

import json
import shutil
import statistics
import sys
from collections.abc import Mapping, Sequence, Set
from functools import cache
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import Field

from benchmarks.ablation_plots import plot, scores
from benchmarks.report import show, table
from benchmarks.train_command import cdm_train
from engines.cli import CommandSettings, UsageError
from engines.files import write_text_atomically
from training.emoji.dataset import EmojiDataset
from training.evalset import Scorer, choose
from training.evaluate import EvaluateSettings, load_model, measure, progress
from training.evaluator import ASSETS, Evaluator
from training.report.read import read_log

ROWS = {
    "full CDM": "cdm",
    "w/o CDM": "dynamic",
    "w/o DM": "no-dm",
    "w/o CA": "no-ca",
    "fixed schedule": "fixed",
    "no off-trajectory": "no-perturbation",
    "Gaussian": "gaussian",
    "DMD2": "dmd2",
    "decoupled DMD": "decoupled",
    "σ' below the anchor": "below-anchor",
    "authors' parity": "parity",
    "shared rollout": "shared-rollout",
    "consistency": "consistency",
}
"""What the table calls a row → `--variant`, or the consistency recipe."""

FULL = "full CDM"
RENOISED = "4, re-noised"
"""Four steps of consistency's own sampler."""
PLOTTED = ("full CDM", "w/o CDM", "w/o DM", "w/o CA", "fixed schedule", "DMD2")
LADDER = (1, 2, 3, 4, 6, 8)
OFF_GRID = {
    "unshifted": (1.0, 0.75, 0.5, 0.25),
    "shift 3": (1.0, 0.9, 0.75, 0.5),
    "late": (1.0, 0.55, 0.3, 0.1),
}
"""4-step schedules that the sampler (shift 1.5) does not use."""

METRICS = ("frechet", "alignment", "seen", "heldout", "diversity")


class AblationSettings(CommandSettings, env_prefix="CDM_BENCH_ABLATION_"):
    """Distil by every objective with equal budgets, measure the students, print the table."""

    teacher: Path = Field(Path("training/assets/teacher"), description="diffusers folder of the teacher")
    data: Path = Field(Path("data/emoji"), description="dataset folder")
    out: Path = Field(Path("runs/ablation"), description="folder of the runs")
    rows: list[str] = Field([], description=f"rows to run; empty: all of {', '.join(ROWS)}")
    seeds: list[Annotated[int, Field(ge=0)]] = Field([0, 1, 2], min_length=1, description="seeds of each row")
    steps: int = Field(500, ge=2, description="iterations of each run: the budget")
    ladder: list[str] = Field(
        ["full CDM", "fixed schedule", "DMD2"],
        description="rows measured at 1, 2, 3, 4, 6, 8 steps and off-grid schedules",
    )
    count: int = Field(400, ge=4, description="prompts measured")
    choices: int = Field(
        EvaluateSettings.model_fields["choices"].default, ge=2, description="captions to choose among"
    )
    evaluator: Path | None = Field(None, description="evaluator folder; none: the one that ships")
    threads: int = Field(1, ge=1, description="CPU threads")
    plot: Path | None = Field(None, description="PNG of scores over steps and training curves; none: none")
    train: bool = Field(True, description="run what is not there yet; off: the table of what is")


def run(settings: AblationSettings) -> int:
    """Run what is missing, print tables and one JSON line."""
    rows = settings.rows or list(ROWS)
    for row in {*rows, *settings.ladder} - ROWS.keys():
        raise UsageError(f"there is no row {row!r}; rows: {', '.join(ROWS)}")
    # Seeds outermost: a table of one seed is there before the second begins.
    for seed in settings.seeds:
        for row in rows:
            if settings.train and (missing := _schedules(row, settings) - _read(row, seed, settings).keys()):
                print(f"{row}, seed {seed}", file=sys.stderr, flush=True)
                _run(row, seed, missing, settings)
    found = {row: _measured(row, settings) for row in rows}
    full = found.get(FULL, {})
    lines = [_summary(row, results, full=full) for row, results in found.items() if results]
    renoised = {seed: each for seed, each in found.get("consistency", {}).items() if RENOISED in each}
    if renoised:
        lines.append(_summary("consistency", renoised, RENOISED, full))
    ladder = [line for row in settings.ladder for line in _ladder(row, found.get(row, {}))]
    if settings.plot:
        logs = {
            row: [read_log(_folder(row, seed, settings) / "log.jsonl") for seed in seeds]
            for row, seeds in found.items()
            if row in PLOTTED and seeds
        }
        plot(scores(ladder), logs, settings.plot)
    print(table([_shown(line) for line in ladder]) + "\n")
    show(
        "ablation", [_shown(line) for line in lines], ladder=[_shown(line) for line in ladder],
        values=[line["values"] for line in lines], ladder_values=[line["values"] for line in ladder],
        steps=settings.steps, count=settings.count,
    )  # fmt: skip
    return 0


def _schedules(row: str, settings: AblationSettings) -> set[str]:
    """Names of the schedules that a row is measured on."""
    names = {*map(str, LADDER), *OFF_GRID} if row in settings.ladder else {"4"}
    return names | ({RENOISED} if ROWS[row] == "consistency" else set())


def _run(row: str, seed: int, missing: Set[str], settings: AblationSettings) -> None:
    """Distil a row's student where it is not there yet, measure what is missing of it."""
    folder, variant = _folder(row, seed, settings), ROWS[row]
    before = _read(row, seed, settings)
    if not before:
        recipe = ["emoji-consistency"] if variant == "consistency" else ["emoji-cdm", "--variant", variant]
        flags = {
            "teacher": settings.teacher, "prompts": settings.data, "out": folder, "steps": settings.steps,
            "seed": seed, "sample-every": 0, "threads": settings.threads,
        }  # fmt: skip
        cdm_train(recipe, flags)
    measured = before | _measure(row, folder / "student", missing, settings)
    write_text_atomically(folder / "quality.json", json.dumps(measured, indent=2, ensure_ascii=False) + "\n")
    for finished in ("checkpoints", "teacher"):
        if (folder / finished).is_dir():  # the first time
            shutil.rmtree(folder / finished)


def _measure(row: str, student: Path, names: Set[str], settings: AblationSettings) -> dict[str, Any]:
    """The student's scores by schedule."""
    torch.set_num_threads(settings.threads)
    evaluate = EvaluateSettings(
        folder=student,
        data=settings.data,
        evaluator=settings.evaluator,
        count=settings.count,
        choices=settings.choices,
        name=row,
        threads=settings.threads,
    )
    scorer = _scorer(settings.data, settings.evaluator, settings.count, settings.choices)
    family = load_model(evaluate.folder, evaluate.dtype)
    measured: dict[str, Any] = {}
    with progress() as bar:
        for name in (*map(str, LADDER), *OFF_GRID, RENOISED):
            if name in names:
                sigmas = (
                    (*OFF_GRID[name], 0.0) if name in OFF_GRID else family.sigmas(int(name.split(",")[0]))
                )
                sampler = "renoise" if name == RENOISED else evaluate.sampler
                measured[name] = measure(
                    scorer, family, sigmas, evaluate.model_copy(update={"sampler": sampler}), bar
                )
    return measured


@cache
def _scorer(data: Path, evaluator: Path | None, count: int, choices: int) -> Scorer:
    return Scorer(
        Evaluator.load(evaluator or ASSETS), choose(EmojiDataset.load(data), count, choices, seed=0)
    )


Measured = Mapping[int, Mapping[str, Any]]
"""Seed → schedule → row of `cdm-train evaluate`."""


def _measured(row: str, settings: AblationSettings) -> Measured:
    found = {seed: _read(row, seed, settings) for seed in settings.seeds}
    return {seed: each for seed, each in found.items() if each}


def _folder(row: str, seed: int, settings: AblationSettings) -> Path:
    return settings.out / f"{ROWS[row]}-{seed}"


def _read(row: str, seed: int, settings: AblationSettings) -> dict[str, Any]:
    path = _folder(row, seed, settings) / "quality.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def _summary(row: str, results: Measured, steps: str = "4", full: Measured | None = None) -> dict[str, Any]:
    """Mean over seeds; of several, ± half the range between the least and the greatest.

    Beside `full`: how much farther each seed's pictures are than full CDM's of that seed (as many steps), which drew
    the same prompts and noise.
    """
    measured = {seed: each for seed, each in results.items() if steps in each}
    values = {name: [_metric(each[steps], name) for each in measured.values()] for name in METRICS}
    line: dict[str, Any] = {"objective": row, "schedule": steps, "seeds": len(measured)}
    for name, each in values.items():
        line[name] = _spread(each, 2 if name == "frechet" else 3)
    if full is not None:
        farther = [
            _metric(each[steps], "frechet") - _metric(full[seed]["4"], "frechet")
            for seed, each in measured.items()
            if seed in full and row != FULL
        ]
        line["frechet, to full CDM's"] = _spread(farther, 2, "+") if farther else ""
        values["frechet, to full CDM's"] = farther
    return {**line, "values": values}


def _spread(values: Sequence[float], digits: int, sign: str = "") -> str:
    spread = f" ± {(max(values) - min(values)) / 2:.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):{sign}.{digits}f}{spread}"


def _shown(line: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in line.items() if key != "values"}


def _metric(row: dict[str, Any], name: str) -> float:
    scores = row["scores"]
    if name == "diversity":
        return float(row["diversity"])
    if name in ("seen", "heldout"):
        return float(scores[name]["alignment"])
    return float(scores["overall"][name])


def _ladder(row: str, results: Measured) -> list[dict[str, Any]]:
    names = [
        name for name in (*map(str, LADDER), *OFF_GRID) if any(name in each for each in results.values())
    ]
    return [_summary(row, results, name) for name in names]
