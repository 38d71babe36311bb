"""Numbers on the way to a picture: smoothing, downsampling that keeps extremes, ticks, rates."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from itertools import pairwise

from training.report.read import Curve

SHARE_SMOOTHED = 40
"""A smoothed line averages over about this fraction of a run."""
PAUSE_S = 120.0
"""A gap in the log that is longer than this, and than `PAUSE_STEPS` usual ones, was a pause and no work."""
PAUSE_STEPS = 20
WINDOWS = 200
WINDOW_S = 2.0


def span(count: int) -> int:
    """Number of values that a smoothed line of `count` averages over."""
    return max(3, count // SHARE_SMOOTHED)


def smooth(values: Sequence[float]) -> list[float]:
    """Exponential moving average over about `span` values, free of the bias of its start."""
    alpha = 2 / (span(len(values)) + 1)
    average, weight, out = 0.0, 0.0, []
    for value in values:
        average = (1 - alpha) * average + alpha * value
        weight = (1 - alpha) * weight + alpha
        out.append(average / weight)
    return out


def downsample(
    points: Sequence[tuple[float, float]], columns: int, low: float, high: float
) -> list[tuple[float, float]]:
    """At most 4 of the `points` (x ascending) per column of x between `low` and `high`: first, least, greatest, last.

    So no extreme is lost, and a line through what is left looks, at `columns` pixels, like one through all.
    """
    if len(points) <= 4 * columns or high <= low:
        return list(points)
    kept: list[tuple[float, float]] = []
    start = 0
    for end in range(1, len(points) + 1):
        here = int((points[start][0] - low) / (high - low) * columns)
        if end < len(points) and int((points[end][0] - low) / (high - low) * columns) == here:
            continue
        column = range(start, end)
        chosen = {
            start, end - 1, min(column, key=lambda i: points[i][1]), max(column, key=lambda i: points[i][1]),
        }  # fmt: skip
        kept += [points[i] for i in sorted(chosen)]
        start = end
    return kept


def ticks(low: float, high: float, about: int = 4) -> list[float]:
    """Round numbers between `low` and `high`, about so many, 1, 2 or 5 · 10ⁿ apart."""
    if not high > low:
        return [low]
    rough = (high - low) / about
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * 0.999)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [number * step for number in range(first, last + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """Powers of ten between two positive numbers; 2 and 5 times them as well where those alone are fewer than 3."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for factors in ((1,), (1, 2, 5)):
        found = [factor * 10.0**power for power in powers for factor in factors]
        found = [value for value in found if low * 0.999 <= value <= high * 1.001]
        if len(found) >= 3:
            break
    return found[:: -(-len(found) // 6)] if len(found) > 6 else found


def pause_limit(times: Curve) -> float:
    """Seconds between two log lines above which the run was not running."""
    gaps = [later - earlier for earlier, later in pairwise(times.values)]
    return max(PAUSE_S, PAUSE_STEPS * statistics.median(gaps)) if gaps else PAUSE_S


def stretches(times: Curve, starts: Sequence[float] = ()) -> list[tuple[int, int]]:
    """`[begin, end)` of log lines that one process wrote without a pause."""
    limit = pause_limit(times)
    cuts = [0]
    for index, (earlier, later) in enumerate(pairwise(times.values), 1):
        if later - earlier > limit or later < earlier or any(earlier < start <= later for start in starts):
            cuts.append(index)
    return list(pairwise([*cuts, len(times.values)])) if times.values else []


def working_seconds(times: Curve, starts: Sequence[float] = ()) -> float:
    """Time spent on the iterations that the log holds: from each start (if known) to the last line before the next."""
    total = 0.0
    for begin, end in stretches(times, starts):
        first = times.values[begin]
        began = max((start for start in starts if start <= first), default=first)
        # An older start than the stretch before has nothing to do with this one: a pause lies between.
        total += times.values[end - 1] - (began if begin == 0 or began > times.values[begin - 1] else first)
    return total


def rates(times: Curve, starts: Sequence[float] = ()) -> Curve:
    """Iterations per second over windows of a `WINDOWS`th of the run and at least `WINDOW_S`, at the window's end."""
    found = Curve()
    every = max(1, len(times.steps) // WINDOWS)
    for begin, end in stretches(times, starts):
        since = begin
        for index in range(begin + 1, end):
            seconds = times.values[index] - times.values[since]
            if index - since >= every and seconds >= WINDOW_S:
                found.add(times.steps[index], (times.steps[index] - times.steps[since]) / seconds)
                since = index
    return found
