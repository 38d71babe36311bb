"""A curve as the numbers of an inline SVG: the template writes them down, no drawing library is needed."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from training.keys import NORMS, RATES, Key
from training.report.read import Curve, Event
from training.report.series import downsample, log_ticks, smooth, ticks
from training.report.words import compact, number

WIDTH, HEIGHT = 400, 184
LEFT, RIGHT, TOP, BOTTOM = 44, 392, 14, 150
"""Of the plot within the picture; its units are about pixels where three charts stand side by side."""
COLUMNS = RIGHT - LEFT
LOG_RATIO = 30.0
"""A positive curve that spends time so many times above or below its median has a logarithmic axis."""


@dataclass(frozen=True)
class Tick:
    """A place along an axis, and what stands there."""

    at: float
    label: str


@dataclass(frozen=True)
class Mark:
    """An event's place along the iterations."""

    x: float
    kind: str
    text: str


@dataclass(frozen=True)
class Chart:
    """One curve, ready to be drawn."""

    key: Key
    raw: str
    smoothed: str
    dot: tuple[float, float] | None
    """A curve of one value is a dot."""
    x_ticks: Sequence[Tick]
    y_ticks: Sequence[Tick]
    marks: Sequence[Mark]
    reference: Tick | None
    logarithmic: bool
    x_range: tuple[float, float]
    y_range: tuple[float, float]
    last: str
    summary: str


@dataclass(frozen=True)
class Scale:
    """Values to places; logarithmic if asked."""

    low: float
    high: float
    start: float
    end: float
    logarithmic: bool = False

    def __call__(self, value: float) -> float:
        low, high = self.low, self.high
        if self.logarithmic:
            value, low, high = math.log10(value), math.log10(low), math.log10(high)
        return self.start + (value - low) / (high - low) * (self.end - self.start)


def draw(
    key: Key, curve: Curve, events: Sequence[Event], last_step: int, reference: tuple[float, str] | None = None
) -> Chart:  # fmt: skip
    """`curve` over iterations 0 … `last_step`. `reference`: a value for a dashed line, if it is near, and its name."""
    values = curve.values
    smoothed = values if key.group is RATES else smooth(values)  # a schedule has no noise to average out
    logarithmic = _is_logarithmic(values)
    if reference is not None and not (min(values) / 2 <= reference[0] <= 2 * max(values)):
        reference = None
    low, high = _range([*values, *([reference[0]] if reference else [])], logarithmic)
    x, y = Scale(0, max(last_step, 1), LEFT, RIGHT), Scale(low, high, BOTTOM, TOP, logarithmic)
    points = list(zip(curve.steps, values, strict=True))
    line = list(zip(curve.steps, smoothed, strict=True))
    return Chart(
        key=key,
        raw=_polyline(points, x, y),
        smoothed=_polyline(line, x, y) if len(line) > 1 else "",
        dot=(round(x(points[0][0]), 1), round(y(points[0][1]), 1)) if len(points) == 1 else None,
        x_ticks=[Tick(round(x(v), 1), compact(v)) for v in ticks(0, x.high, 5) if v == int(v)],
        y_ticks=[Tick(round(y(v), 1), compact(v)) for v in (log_ticks(low, high) if logarithmic else ticks(low, high))],
        marks=[Mark(round(x(event.step), 1), event.kind, f"iteration {event.step}: {event.text}") for event in events],
        reference=Tick(round(y(reference[0]), 1), reference[1]) if reference else None,
        logarithmic=logarithmic,
        x_range=(0, x.high),
        y_range=(low, high),
        last=number(smoothed[-1]),
        summary=f"{key.title} over {len(values)} logged iterations: smoothed from {number(smoothed[0])} to "
        f"{number(smoothed[-1])}, between {number(min(values))} and {number(max(values))}",
    )  # fmt: skip


def _is_logarithmic(values: Sequence[float]) -> bool:
    if len(values) < 2 or min(values) <= 0:
        return False
    # Deciles: a spike, or the first iterations of a warm-up, must not decide for all others.
    low, *_, high = statistics.quantiles(values, n=10)
    middle = statistics.median(values)
    return high > LOG_RATIO * middle or middle > LOG_RATIO * low


def _range(values: Sequence[float], logarithmic: bool) -> tuple[float, float]:
    """Of an axis: a little more than the values span, 0 included where they come near it, never empty."""
    low, high = min(values), max(values)
    if logarithmic:
        return low / 1.15, high * 1.15
    if 0 <= low < 0.35 * high:
        low = 0.0
    if -0.35 * abs(low) < high <= 0 and low < 0:
        high = 0.0
    room = 0.06 * (high - low) or 0.1 * abs(high) or 1.0
    return (low if low == 0 else low - room), (high if high == 0 and low != 0 else high + room)


def _polyline(points: Sequence[tuple[float, float]], x: Scale, y: Scale) -> str:
    placed = [(x(step), y(value)) for step, value in points]
    kept = downsample(placed, COLUMNS, LEFT, RIGHT)
    return " ".join(f"{across:.1f},{down:.1f}" for across, down in kept)


def reference_of(key: Key, config: dict[str, object]) -> tuple[float, str] | None:
    """The constant of a run that a curve is held against."""
    clip, floor = config.get("clip"), config.get("weight_floor")
    if key.group is NORMS and isinstance(clip, (int, float)):
        return float(clip), f"clip {number(clip)}"
    if key.name.endswith("weight") and isinstance(floor, (int, float)) and floor > 0:
        return 1 / floor, f"1/floor {number(1 / floor)}"
    return (0.0, "") if key.group.name == "Cosines" else None
