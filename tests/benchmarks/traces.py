"""Recorded traces for tests."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from math import inf
from pathlib import Path

from benchmarks.arrivals import COLUMNS, Arrival


def write_trace(path: Path, trace: Sequence[Arrival]) -> None:
    """Write what `read_trace` reads."""
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(COLUMNS)
        for item in trace:
            deadline = "" if item.deadline == inf else f"{item.deadline * 1e3:g}"
            least = "" if item.min_steps is None else item.min_steps
            writer.writerow(
                [f"{item.at:.6f}", item.steps, item.width, item.height, deadline, least, item.priority]
            )
