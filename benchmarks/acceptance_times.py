"""Contenders in turns: every batch and size of each once in every round, in a new order each time."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from benchmarks.acceptance_process import Operator
from benchmarks.acceptance_report import Missed, Row, Skipped

Shape = tuple[int, int, int]
"""Batch, width, height."""


@dataclass
class Series:
    """Milliseconds of one contender at one shape; what went wrong, if anything did: from then on it has no turn."""

    step: list[float] = field(default_factory=list)
    picture: list[float] = field(default_factory=list)
    wrong: str = ""


def shapes(batches: Sequence[int], sizes: Sequence[Sequence[int]]) -> list[Shape]:
    """Every batch at every size."""
    return [(batch, size[0], size[1]) for size in sizes for batch in batches]


def alternate(
    contenders: Mapping[str, Operator], wanted: Sequence[Shape], steps: int, rounds: int, seed: int = 0
) -> dict[str, dict[Shape, Series]]:
    """Time all `contenders`, already loaded; the first turn of each shape warms up and does not count."""
    order = random.Random(seed)
    found = {name: {shape: Series() for shape in wanted} for name in contenders}
    turns = [(name, shape) for name in contenders for shape in wanted]
    for number in range(rounds + 1):
        order.shuffle(turns)
        for name, shape in turns:
            series = found[name][shape]
            if series.wrong:
                continue
            try:
                times = contenders[name].call("turn", batch=shape[0], size=shape[1:], steps=steps)
            except (Missed, Skipped) as error:  # out of memory at the largest batch, say
                series.wrong = str(error)
                continue
            if number:
                series.step += times["step ms"]
                series.picture += times["picture ms"]
    return found


def time_rows(
    label: str,
    found: Mapping[Shape, Series],
    baseline: str,
    reference: Mapping[Shape, Series],
) -> Iterator[Row]:
    """A row a shape; speed-ups are over `baseline`, which took turns with it."""
    for shape, series in found.items():
        batch, width, height = shape
        row: Row = {
            "what": label,
            "result": f"failed: {series.wrong}" if series.wrong else "ok",
            "size": f"{width}x{height}",
            "batch": batch,
        }
        if series.step and not series.wrong:
            row |= {**_quartiles("step", series.step), **_quartiles("picture", series.picture)}
            beside = reference.get(shape)
            if beside is not None and beside.step and not beside.wrong:
                row[f"step, × over {baseline}"] = _ratio(beside.step, series.step)
                row[f"picture, × over {baseline}"] = _ratio(beside.picture, series.picture)
            row |= {"n": len(series.picture), "all": {"step": series.step, "picture": series.picture}}
        yield row


def _quartiles(what: str, values: Sequence[float]) -> dict[str, Any]:
    low, middle, high = np.percentile(np.asarray(values, np.float64), [25, 50, 75])
    return {f"{what} ms p50": round(float(middle), 3), f"{what} ms IQR": round(float(high - low), 3)}


def _ratio(other: Sequence[float], own: Sequence[float]) -> float:
    return round(float(np.median(other) / np.median(own)), 3)
