"""`cdm-bench ablation`: distil one teacher by every objective with equal budgets and several seeds, and compare.

    cdm-bench ablation --teacher training/assets/teacher --steps 500 --seeds 0,1,2

Each row is `cdm-train RECIPE --variant …` and `cdm-train evaluate`, run one after the other in processes of their own;
what is finished is not run again, so that the same command goes on where it was stopped, and the table is made of what
is there. Checkpoints of finished runs are deleted, students stay.
"""

from __future__ import annotations

import json
import shutil
import statistics
import subprocess
import sys
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import Field

from benchmarks.report import show, table
from engines.cli import CommandSettings, UsageError
from engines.files import write_text_atomically
from training.emoji.dataset import EmojiDataset
from training.evalset import Scorer, choose
from training.evaluate import EvaluateSettings, load_model, measure, progress
from training.evaluator import ASSETS, Evaluator

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
        ["full CDM", "DMD2"], description="rows measured at 1, 2, 3, 4, 6, 8 steps and off-grid schedules"
    )
    count: int = Field(400, ge=4, description="prompts measured")
    threads: int = Field(1, ge=1, description="CPU threads")
    train: bool = Field(True, description="run what is not there yet; off: the table of what is")


def run(settings: AblationSettings) -> int:
    """Run what is missing, print tables and one JSON line."""
    rows = settings.rows or list(ROWS)
    for row in {*rows, *settings.ladder} - ROWS.keys():
        raise UsageError(f"there is no row {row!r}; rows: {', '.join(ROWS)}")
    # Seeds outermost: a table of one seed is there before the second begins.
    for seed in settings.seeds:
        for row in rows:
            folder = settings.out / f"{ROWS[row]}-{seed}"
            if settings.train and not (folder / "quality.json").is_file():
                print(f"{row}, seed {seed}", file=sys.stderr, flush=True)
                _distil(row, seed, folder, settings)
    found = {row: _measured(row, settings) for row in rows}
    lines = [_summary(row, results) for row, results in found.items() if results]
    if renoised := [each for each in found.get("consistency", []) if "4, re-noised" in each]:
        lines.append(_summary("consistency", renoised, "4, re-noised"))
    ladder = [line for row in settings.ladder for line in _ladder(row, found.get(row, []))]
    print(table([_shown(line) for line in ladder]) + "\n")
    show(
        "ablation", [_shown(line) for line in lines], ladder=[_shown(line) for line in ladder],
        values=[line["values"] for line in lines], ladder_values=[line["values"] for line in ladder],
        steps=settings.steps, count=settings.count,
    )  # fmt: skip
    return 0


def _distil(row: str, seed: int, folder: Path, settings: AblationSettings) -> None:
    variant = ROWS[row]
    recipe = ["emoji-consistency"] if variant == "consistency" else ["emoji-cdm", "--variant", variant]
    threads = ["--threads", str(settings.threads)]
    train = [
        *recipe, "--teacher", settings.teacher, "--prompts", settings.data, "--out", folder, "--steps", settings.steps,
        "--seed", seed, "--sample-every", 0, *threads,
    ]  # fmt: skip
    _cdm_train(train)
    _measure(row, folder, settings)
    for finished in ("checkpoints", "teacher"):
        shutil.rmtree(folder / finished)


def _measure(row: str, folder: Path, settings: AblationSettings) -> None:
    """Score the student on every schedule of its row, into `quality.json`."""
    torch.set_num_threads(settings.threads)
    evaluate = EvaluateSettings(
        folder=folder / "student",
        data=settings.data,
        count=settings.count,
        name=row,
        threads=settings.threads,
    )
    scorer = _scorer(settings.data, settings.count)
    family = load_model(evaluate.folder, evaluate.dtype)
    ladder = row in settings.ladder
    schedules = {str(steps): family.sigmas(steps) for steps in (LADDER if ladder else (4,))}
    schedules |= {name: (*sigmas, 0.0) for name, sigmas in (OFF_GRID if ladder else {}).items()}
    with progress() as bar:
        measured = {
            name: measure(scorer, family, sigmas, evaluate, bar) for name, sigmas in schedules.items()
        }
        if ROWS[row] == "consistency":  # whose own sampler it is
            again = evaluate.model_copy(update={"sampler": "renoise"})
            measured["4, re-noised"] = measure(scorer, family, family.sigmas(4), again, bar)
    write_text_atomically(folder / "quality.json", json.dumps(measured, indent=2, ensure_ascii=False) + "\n")


@cache
def _scorer(data: Path, count: int) -> Scorer:
    chosen = choose(EmojiDataset.load(data), count, EvaluateSettings.model_fields["choices"].default, seed=0)
    return Scorer(Evaluator.load(ASSETS), chosen)


def _cdm_train(arguments: Sequence[object]) -> None:
    command = [sys.executable, "-m", "training.main", *map(str, arguments)]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    if done.returncode:
        raise UsageError(
            f"{' '.join(command[2:])} ended with {done.returncode}: {done.stdout.strip()[-2000:]}"
        )


def _measured(row: str, settings: AblationSettings) -> list[dict[str, Any]]:
    """What was measured of a row, a dictionary per seed: rows of `cdm-train evaluate` by schedule."""
    paths = [settings.out / f"{ROWS[row]}-{seed}" / "quality.json" for seed in settings.seeds]
    return [json.loads(path.read_text(encoding="utf-8")) for path in paths if path.is_file()]


def _summary(row: str, results: Sequence[dict[str, Any]], steps: str = "4") -> dict[str, Any]:
    """Mean over seeds; of several, ± half the range between the least and the greatest."""
    values = {name: [_metric(each[steps], name) for each in results if steps in each] for name in METRICS}
    line: dict[str, Any] = {"objective": row, "schedule": steps, "seeds": len(values["frechet"])}
    for name, each in values.items():
        digits = 2 if name == "frechet" else 3
        spread = f" ± {(max(each) - min(each)) / 2:.{digits}f}" if len(each) > 1 else ""
        line[name] = f"{statistics.mean(each):.{digits}f}{spread}"
    return {**line, "values": values}


def _shown(line: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in line.items() if key != "values"}


def _metric(row: dict[str, Any], name: str) -> float:
    scores = row["scores"]
    if name == "diversity":
        return float(row["diversity"])
    if name in ("seen", "heldout"):
        return float(scores[name]["alignment"])
    return float(scores["overall"][name])


def _ladder(row: str, results: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    names = [name for name in (*map(str, LADDER), *OFF_GRID) if any(name in each for each in results)]
    return [_summary(row, results, name) for name in names]
