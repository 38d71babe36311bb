"""The tables of docs/engines.md and docs/training.md: what benchmarks wrote to benchmarks/results/, row by row."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).resolve().parent.parent / "benchmarks" / "results"


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.3g}" if abs(value) < 100 else f"{value:.0f}"
    return str(value)


def _result(file: str) -> dict[str, Any]:
    document: dict[str, Any] = json.loads((RESULTS / file).read_text(encoding="utf-8").splitlines()[-1])
    return document


def rows_of(*files: str, label: str = "", key: str = "rows") -> Callable[[], str]:
    """A table of what `key` of the files names; with `label`, its first column is that fact of each file (or `a.b`)."""

    def table() -> str:
        found: list[dict[str, Any]] = []
        for file in files:
            if not (RESULTS / file).is_file():
                continue
            document = _result(file)
            fact: Any = document
            for part in label.split(".") if label else ():
                fact = fact[part]
            found += [{label.split(".")[-1]: fact, **row} if label else row for row in document[key]]
        missing = [file for file in files if not (RESULTS / file).is_file()]
        note = f"\nNot measured yet: {', '.join(missing)}.\n" if missing else ""
        columns = list(dict.fromkeys(name for row in found for name in row))
        lines = [
            columns,
            ["---"] * len(columns),
            *([_cell(row.get(name)) for name in columns] for row in found),
        ]
        return ("".join(f"| {' | '.join(line)} |\n" for line in lines) if found else "") + note

    return table


STEP_GOALS = (
    ("torch.compile bfloat16", 1.3),
    ("onnxruntime f32", 3.0),
    ("openvino genai bf16", 1.1),
)
"""Contenders' steps, to ours: at least."""


def step_goals(*files: str) -> str:
    """Which of `STEP_GOALS` are met, by model and batch."""
    header = ["model", "batch", *(f"{name} (≥ {goal})" for name, goal in STEP_GOALS)]
    lines = [header, ["---"] * len(header)]
    for file in files:
        if not (RESULTS / file).is_file():
            continue
        document = _result(file)
        for batch in dict.fromkeys(row["batch"] for row in document["rows"]):
            found = {row["contender"]: row for row in document["rows"] if row["batch"] == batch}
            ratios = [(found.get(name, {}).get("step, to ours"), goal) for name, goal in STEP_GOALS]
            verdicts = [
                "" if ratio is None else f"{ratio:.2f}, {'met' if ratio >= goal else 'missed'}"
                for ratio, goal in ratios
            ]
            lines.append([document["bundle"], str(batch), *verdicts])
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def differences(*files: str) -> str:
    """Each contender's picture beside diffusers' in float32: that all draw with one model."""
    lines = []
    for file in files:
        if not (RESULTS / file).is_file():
            continue
        document = _result(file)
        found: dict[str, list[float]] = {}
        for name, difference in document["max_difference"].items():
            found.setdefault(name.rpartition(" at ")[0], []).append(difference)
        ranges = ", ".join(f"{name} {min(of):.2f} to {max(of):.2f}" for name, of in found.items())
        lines.append(f"- {document['bundle']}: {ranges or 'no pictures were made'}\n")
    return "".join(lines)


def products(*files: str) -> str:
    """The matrix products beside which denoisers are put, each by itself."""
    header = ["run", "rows × inner × columns", "ms", "GFLOP/s"]
    lines = [header, ["---"] * len(header)]
    for file in files:
        if not (RESULTS / file).is_file():
            continue
        document = _result(file)
        for shape, speed in document["products"].items():
            rows, inner, columns = map(int, shape.split("x"))
            took = 2 * rows * inner * columns / (speed * 1e6)
            lines.append([document["bundle"], f"{rows} × {inner} × {columns}", f"{took:.3g}", f"{speed:.0f}"])
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


TABLES: dict[str, Callable[[], str]] = {
    "products": partial(products, "roofline-75m.txt"),
    "step_goals": partial(step_goals, "steps-emoji.txt", "steps-75m.txt", "steps-medium.txt"),
    "differences": partial(differences, "steps-emoji.txt", "steps-75m.txt"),
    "steps_emoji": rows_of("steps-emoji.txt"),
    "steps_75m": rows_of("steps-75m.txt"),
    "steps_medium": rows_of("steps-medium.txt"),
    "roofline": rows_of("roofline-emoji.txt", "roofline-75m.txt", "roofline-medium.txt", label="bundle"),
    "rewrites": rows_of("rewrites-2.txt", "rewrites-8.txt", label="bundle"),
    "student": rows_of("student-emoji.txt", "student-75m.txt", label="bundle"),
    "build": rows_of("build-emoji.txt", "build-75m.txt", "build-medium.txt", label="student"),
    "bundle": rows_of("bundle-emoji.txt"),
    "ablation": rows_of("ablation.txt"),
    "ladder": rows_of("ablation.txt", key="ladder"),
    "training_speed": rows_of("training.txt"),
    "training_savings": rows_of("training-savings.txt"),
    "finetune": rows_of("finetune.txt"),
}
"""What a page of docs/ may ask for."""
