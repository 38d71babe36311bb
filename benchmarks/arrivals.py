"""When pictures are asked for, and which: synthetic traces, drawn whole before anything runs, and recorded ones.

    times = TIMES["bursty"](rate=50.0, duration=60.0, random=np.random.default_rng(0))
    trace = draw(times, steps=[1, 4], sizes=[(128, 128)], random=np.random.default_rng(1))
    trace = read_trace(Path("monday.csv"))

Every synthetic trace has the same mean rate; what differs is how the pictures bunch. A recorded one is a CSV file with
the columns `COLUMNS`: seconds from its beginning, steps, pixels, milliseconds, steps, priority. The columns from
`deadline_ms` on may be empty or missing.
"""

from __future__ import annotations

import csv
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from math import inf, isfinite, nan
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from engines.cli import UsageError

COLUMNS = ("arrival_s", "steps", "width", "height", "deadline_ms", "min_steps", "priority")
REQUIRED = COLUMNS[:4]

Times = NDArray[np.float64]
"""Seconds from the trace's beginning, rising."""


@dataclass(frozen=True, slots=True)
class Arrival:
    """One picture asked for. `deadline` in seconds from `at`; `min_steps` below `steps` allows fewer steps."""

    at: float
    steps: int
    width: int
    height: int
    deadline: float = inf
    min_steps: int | None = None
    priority: int = 0


def poisson(rate: float, duration: float, random: np.random.Generator) -> Times:
    """Independent users: exponential gaps. Given their number, a Poisson process's times are uniform."""
    return np.sort(random.uniform(0.0, duration, random.poisson(rate * duration)))


def bursty(
    rate: float,
    duration: float,
    random: np.random.Generator,
    ratio: float = 5.0,
    burst_s: float = 2.0,
    calm_s: float = 8.0,
) -> Times:
    """A Markov-modulated Poisson process: bursts at `ratio` times the rate of the calm between them.

    Both last exponentially long, `burst_s` and `calm_s` on average; the start is in a burst as likely as any time is.
    """
    share = burst_s / (burst_s + calm_s)
    calm_rate = rate / (1 - share + share * ratio)
    parts, now, in_burst = [], 0.0, bool(random.random() < share)
    while now < duration:
        end = min(duration, now + random.exponential(burst_s if in_burst else calm_s))
        parts.append(now + poisson(calm_rate * (ratio if in_burst else 1.0), end - now, random))
        now, in_burst = end, not in_burst
    return np.concatenate(parts)


def diurnal(rate: float, duration: float, random: np.random.Generator, depth: float = 0.8) -> Times:
    """One day in `duration`: the rate swings as a sine by ± `depth` of its mean, highest after a quarter."""
    times = poisson(rate * (1 + depth), duration, random)
    wave = 1 + depth * np.sin(2 * np.pi * times / duration)
    return times[random.uniform(0.0, 1 + depth, len(times)) < wave]


TIMES: dict[str, Callable[[float, float, np.random.Generator], Times]] = {
    "poisson": poisson,
    "bursty": bursty,
    "diurnal": diurnal,
}


def draw(
    times: Times, steps: Sequence[int], sizes: Sequence[tuple[int, int]], random: np.random.Generator
) -> list[Arrival]:
    """A picture per time, its steps and its (width, height) drawn evenly."""
    which_steps = random.integers(len(steps), size=len(times))
    which_size = random.integers(len(sizes), size=len(times))
    return [
        Arrival(float(at), steps[a], *sizes[b])
        for at, a, b in zip(times, which_steps, which_size, strict=True)
    ]


def stretched(trace: Sequence[Arrival], rate: float) -> list[Arrival]:
    """The same pictures in the same order, at `rate` a second on average."""
    factor = len(trace) / rate / max(length(trace), 1e-9)
    return [replace(arrival, at=arrival.at * factor) for arrival in trace]


def length(trace: Sequence[Arrival]) -> float:
    """Seconds that a recorded trace lasts: one mean gap beyond its last arrival."""
    last = trace[-1].at
    return last * len(trace) / (len(trace) - 1) if len(trace) > 1 and last > 0 else max(last, 1.0)


def read_trace(path: Path) -> list[Arrival]:
    """A recorded trace, sorted by arrival and shifted to begin at 0.

    Raises:
        UsageError: no such file, a column is missing or unknown, or a cell cannot be what it should.
    """
    try:
        with path.open(encoding="utf-8", newline="") as file:
            reader = csv.DictReader(file)
            columns = tuple(reader.fieldnames or ())
            if missing := [name for name in REQUIRED if name not in columns]:
                raise UsageError(f"{path} has no column {missing[0]}; needed: {', '.join(REQUIRED)}")
            if unknown := [name for name in columns if name not in COLUMNS]:
                raise UsageError(f"{path} has the unknown column {unknown[0]!r}; known: {', '.join(COLUMNS)}")
            trace = [_arrival(row, f"{path}, line {reader.line_num}") for row in reader]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UsageError(f"{path} cannot be read as a trace: {error}") from error
    if not trace:
        raise UsageError(f"{path} holds no arrival; a trace needs at least one line below its column names")
    trace.sort(key=lambda arrival: arrival.at)
    return [replace(arrival, at=arrival.at - trace[0].at) for arrival in trace]


def _arrival(row: dict[str, str], where: str) -> Arrival:
    if None in row:  # where csv puts what has no column
        raise UsageError(f"{where} has more cells than columns")
    steps = _number(row, "steps", where, 1)
    deadline = _number(row, "deadline_ms", where, 1e-3, inf)
    least = int(_number(row, "min_steps", where, 1, 0))
    if least > steps:
        raise UsageError(f"{where}: min_steps={least} exceeds steps={steps:g}; lower it or leave it empty")
    return Arrival(
        at=_number(row, "arrival_s", where, 0),
        steps=int(steps),
        width=int(_number(row, "width", where, 1)),
        height=int(_number(row, "height", where, 1)),
        deadline=deadline / 1e3,
        min_steps=least or None,
        priority=int(_number(row, "priority", where, 0, 0)),
    )


def _number(row: dict[str, str], name: str, where: str, least: float, empty: float | None = None) -> float:
    text = (row.get(name) or "").strip()
    if not text and empty is not None:
        return empty
    fractional = name in ("arrival_s", "deadline_ms")
    try:
        value = float(text)
    except ValueError:
        value = nan
    if not (isfinite(value) and value >= least and (fractional or value.is_integer())):
        kind = "a number" if fractional else "a whole number"
        raise UsageError(f"{where}: {name}={text!r} must be {kind} of at least {least:g}")
    return value
