"""What every benchmark prints: a table for people, then one JSON line for machines."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

P95_FROM = 20
"""Measurements from which on one in twenty is one; with fewer, a 95th percentile is but the largest value."""


def percentiles(values: Sequence[float]) -> dict[str, float | None]:
    """`p50`, `p95` (None below `P95_FROM` measurements) and `n`, in the unit they came in."""
    p50, p95 = (round(float(value), 3) for value in np.percentile(np.asarray(values, np.float64), [50, 95]))
    return {"p50": p50, "p95": p95 if len(values) >= P95_FROM else None, "n": len(values)}


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """A Markdown table; the columns are the keys of all rows in order of appearance, a missing cell is empty."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    cells = [[_cell(row.get(column, "")) for column in columns] for row in rows]
    widths = [max(len(line[i]) for line in [columns, *cells]) for i in range(len(columns))]
    lines = [columns, ["-" * width for width in widths], *cells]
    return "\n".join(
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + " |"
        for line in lines
    )


def machine() -> dict[str, Any]:
    """What a figure means nothing without: processor, usable cores, Python."""
    return {"cpu": _cpu(), "cores": len(os.sched_getaffinity(0)), "python": platform.python_version()}


def show(benchmark: str, rows: Sequence[Mapping[str, Any]], **facts: Any) -> None:
    """Print the table and the JSON line."""
    print(table(rows))
    line = {"benchmark": benchmark, "rows": list(rows), **facts, "machine": machine()}
    print(json.dumps(line, ensure_ascii=False), flush=True)


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.2f}" if value == 0 or abs(value) >= 0.01 else f"{value:.2e}"
    return str(value)


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
