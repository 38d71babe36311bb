"""What `cdm-bench simulate` and `cdm-bench serve` share: the load's settings, the policies' variants, the traces.

A variant is a server's `--policy` and what its requests say. `step+auto` asks for `steps="auto"` with a deadline, so
that the scheduler may finish a picture in fewer steps; the others ask for exactly as many as they say, `step+deadline`
with a deadline, so that what would be late is refused.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import inf
from pathlib import Path
from typing import Literal, Self

import numpy as np
from pydantic import Field, field_validator, model_validator

from benchmarks.arrivals import TIMES, Arrival, draw, length, read_trace, stretched
from cdm_serve.costs import TEXT, CostModel
from engines.cli import CommandSettings, UsageError

VariantName = Literal["none", "request", "step", "step+deadline", "step+auto"]


@dataclass(frozen=True)
class Variant:
    """A server's `--policy`, whether requests say by when they are wanted, and whether they allow fewer steps."""

    name: VariantName
    policy: str
    urgent: bool = False
    elastic: bool = False


VARIANTS: dict[str, Variant] = {
    variant.name: variant
    for variant in (
        Variant("none", "none"),
        Variant("request", "request"),
        Variant("step", "step"),
        Variant("step+deadline", "step", urgent=True),
        Variant("step+auto", "step", urgent=True, elastic=True),
    )
}

API_KEY = "CDM_API_KEY"
"""Environment variable with the key of a running server that wants one."""

RECORDED = "recorded"
RATE = re.compile(rf"\d+(\.\d+)?x?|{RECORDED}")
SIZE = re.compile(r"[1-9]\d*x[1-9]\d*")


def keys() -> list[str]:
    """The keys that `API_KEY` holds: none, one, or several with commas between."""
    return [key for key in os.environ.get(API_KEY, "").split(",") if key]


def key_headers(number: int = 0) -> dict[str, str]:
    """The header that carries one of `keys`, the first by default; none if there are none."""
    known = keys()
    return {"authorization": f"Bearer {known[number % len(known)]}"} if known else {}


class LoadSettings(CommandSettings):
    """The load's settings."""

    variants: list[VariantName] = Field(
        ["none", "request", "step", "step+deadline", "step+auto"],
        min_length=1,
        description="policies to compare",
    )
    trace: str = Field(
        "poisson", description=f"arrivals: {', '.join(TIMES)}, or a recorded CSV file (docs/load.md)"
    )
    rates: list[str] = Field(
        ["0.3x", "0.6x", "0.8x", "0.95x", "1.1x", "1.4x"],
        min_length=1,
        description="pictures per second; with an x: times what the cost table predicts can be served; recorded: as in "
        "the CSV file",
    )
    duration: float = Field(
        30.0,
        gt=0,
        le=86400,
        description="seconds of arrivals that are measured; a CSV file is played to its end",
    )
    warmup: float = Field(5.0, ge=0, le=3600, description="first seconds of a trace, published apart")
    steps: list[int] = Field([], description="step counts, drawn evenly; none: the default")
    sizes: list[str] = Field([], description="picture sizes WxH, drawn evenly; none: the default")
    slo_ms: list[float] = Field(
        [250.0, 1000.0], min_length=1, description="SLOs of goodput, beside twice the unloaded p50"
    )
    deadline_ms: int | None = Field(
        None,
        ge=1,
        le=3_600_000,
        description="deadline of every request; none: only step+deadline's and step+auto's, the first SLO",
    )
    max_batch: int = Field(8, ge=1, le=256, description="pictures that one engine call may advance")
    queue_limit: int = Field(64, ge=1, le=1_000_000, description="unfinished pictures that a server accepts")
    seed: int = Field(0, ge=0, description="seed of everything drawn")

    @field_validator("rates")
    @classmethod
    def _rates_are_numbers(cls, rates: list[str]) -> list[str]:
        for rate in rates:
            if not RATE.fullmatch(rate) or (rate != RECORDED and not float(rate.rstrip("x"))):
                raise ValueError(
                    f"{rate!r} is no rate; write 20 (pictures per second) or 0.8x (of what is predicted)"
                )
        return rates

    @model_validator(mode="after")
    def _recorded_needs_a_record(self) -> Self:
        if RECORDED in self.rates and self.trace in TIMES:
            raise ValueError(
                f"--rates={RECORDED} goes with a CSV file, but --trace={self.trace}; name a rate"
            )
        return self

    @field_validator("sizes")
    @classmethod
    def _sizes_are_pixels(cls, sizes: list[str]) -> list[str]:
        for size in sizes:
            if not SIZE.fullmatch(size):
                raise ValueError(f"{size!r} is no size; write width and height in pixels, as 512x512")
        return sizes

    @field_validator("slo_ms")
    @classmethod
    def _slos_are_times(cls, slos: list[float]) -> list[float]:
        for slo in slos:
            if not 0 < slo < inf:
                raise ValueError(f"{slo:g} is no SLO; write milliseconds above 0")
        return slos


@dataclass(frozen=True)
class Mix:
    """The pictures that are asked for: step counts and (width, height), each drawn evenly."""

    steps: tuple[int, ...]
    sizes: tuple[tuple[int, int], ...]


def mix_of(settings: LoadSettings, default_steps: int, sizes: Sequence[tuple[int, int]]) -> Mix:
    """The settings' mix; `sizes` are those that can be asked for, the default first.

    Raises:
        UsageError: a size is not among them.
    """
    wanted = [(int(width), int(height)) for width, height in (size.split("x") for size in settings.sizes)]
    check_sizes(wanted, sizes)
    return Mix(tuple(settings.steps) or (default_steps,), tuple(wanted) or (sizes[0],))


def check_sizes(wanted: Sequence[tuple[int, int]], offered: Sequence[tuple[int, int]]) -> None:
    """Raises `UsageError` for a size that is not offered."""
    for width, height in wanted:
        if (width, height) not in offered:
            listed = ", ".join(f"{w}x{h}" for w, h in offered)
            raise UsageError(f"there are no pictures of {width}x{height} here; allowed: {listed}")


def alone(costs: CostModel, mix: Mix) -> float:
    """Seconds of engine time that the mix's pictures take with nobody else there, on average."""
    return float(np.mean([_seconds(costs, steps, size, 1) for steps in mix.steps for size in mix.sizes]))


def capacity(costs: CostModel, mix: Mix, max_batch: int) -> float:
    """Pictures a second that one engine can make in full batches, by the cost model."""
    each = [_seconds(costs, steps, size, max_batch) for steps in mix.steps for size in mix.sizes]
    return 1 / max(float(np.mean(each)), 1e-9)


def _seconds(costs: CostModel, steps: int, size: tuple[int, int], limit: int) -> float:
    encode, denoise = costs.each("encode", TEXT, limit), costs.each("denoise", size, limit)
    return encode + steps * denoise + costs.each("decode", size, limit)


def rates_of(settings: LoadSettings, capacity: float) -> list[float]:
    """The rates in pictures a second; those with an x are times `capacity`. Raises as `read_trace`."""

    def value(rate: str) -> float:
        if rate == RECORDED:
            trace = read_trace(Path(settings.trace))
            return len(trace) / length(trace)
        return float(rate[:-1]) * capacity if rate.endswith("x") else float(rate)

    return [value(rate) for rate in settings.rates]


def make_trace(settings: LoadSettings, mix: Mix, rate: float, number: int = 0) -> list[Arrival]:
    """The trace at `rate`, warm-up first: it depends on the settings, `rate` and its `number`, not on the variant.

    Raises:
        UsageError: the recorded trace cannot be read, or is too short for a warm-up.
    """
    if settings.trace not in TIMES:
        return stretched(read_trace(Path(settings.trace)), rate)
    times = TIMES[settings.trace](
        rate, settings.warmup + settings.duration, np.random.default_rng([settings.seed, number, 1])
    )
    return draw(times, mix.steps, mix.sizes, np.random.default_rng([settings.seed, number, 2]))


def span(settings: LoadSettings, trace: Sequence[Arrival]) -> tuple[float, float]:
    """(seconds of warm-up, seconds measured after them) of a trace that `make_trace` made."""
    whole = settings.warmup + settings.duration if settings.trace in TIMES else length(trace)
    if settings.warmup >= whole:
        raise UsageError(
            f"the trace lasts {whole:.1f} s, all of it warm-up; lower --warmup={settings.warmup:g}"
        )
    return settings.warmup, whole - settings.warmup


def for_variant(trace: Sequence[Arrival], variant: Variant, settings: LoadSettings) -> list[Arrival]:
    """The trace as `variant` asks for it. What a recorded trace says itself stays."""
    deadline = inf if settings.deadline_ms is None else settings.deadline_ms / 1e3
    if variant.urgent and deadline == inf:
        deadline = settings.slo_ms[0] / 1e3
    return [
        replace(
            arrival,
            deadline=arrival.deadline if arrival.deadline < inf else deadline,
            min_steps=arrival.min_steps or (1 if variant.elastic else None),
        )
        for arrival in trace
    ]
