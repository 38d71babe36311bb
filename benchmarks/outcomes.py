"""What became of a trace's pictures, and the figures drawn from that: the same for simulated and for real servers.

    summary(outcomes, duration=60.0, slos=[0.25, 1.0])

Every latency counts from the *scheduled* arrival. Goodput is what was served within an SLO, in pictures a second; what
was refused, failed or late counts as nothing, so a server cannot gain by refusing.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

Status = Literal["served", "refused", "failed"]

QUANTILES = {"p50": 0.5, "p95": 0.95, "p99": 0.99, "p99.9": 0.999}


KNEE = 0.95
"""The share of all that were asked for that must be in time up to the knee of a curve over rates."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """One picture: scheduled arrival and latency (of a refusal too) in seconds, steps really run, why not served."""

    at: float
    status: Status
    latency: float
    steps: int = 0
    code: str = ""


def summary(outcomes: Sequence[Outcome], duration: float, slos: Sequence[float]) -> dict[str, Any]:
    """Counts, goodput (pictures/s) per SLO (s), latency quantiles (ms) of what was served, mean steps."""
    counts = Counter(item.status for item in outcomes)
    served = [item for item in outcomes if item.status == "served"]
    latencies = np.array([item.latency for item in served], np.float64)
    return {
        "offered": len(outcomes),
        "served": counts["served"],
        "refused": counts["refused"],
        "failed": counts["failed"],
        **{
            f"≤{slo * 1e3:.0f} ms /s": round(float((latencies <= slo).sum()) / duration, 3)
            for slo in sorted(set(slos))
        },
        **{f"{name} ms": value for name, value in quantiles(latencies * 1e3).items()},
        "steps": round(sum(item.steps for item in served) / len(served), 3) if served else None,
    }


def in_time(outcomes: Sequence[Outcome], slos: Sequence[float]) -> dict[str, float]:
    """The share of everything offered that was served within each SLO (s)."""
    within = [item.latency for item in outcomes if item.status == "served"]
    return {
        f"≤{slo * 1e3:.0f} ms": sum(latency <= slo for latency in within) / max(1, len(outcomes))
        for slo in sorted(set(slos))
    }


def knee(points: Sequence[tuple[float, float]], share: float = KNEE) -> float:
    """The rate up to which at least `share` is in time, of (rate, share in time) points: on the line between two.

    The first drop counts, whatever comes after; 0 if the lowest rate is beyond it, the highest if none is.
    """
    carried = 0.0
    before = 1.0
    for rate, held in sorted(points):
        if held < share:
            return carried + (rate - carried) * (before - share) / (before - held) if carried else 0.0
        carried, before = rate, held
    return carried


def knees(details: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    """Variant → SLO → knee, of rows with `variant`, `rate /s` and `in_time`."""
    return {
        variant: {
            slo: round(
                knee([(row["rate /s"], row["in_time"][slo]) for row in details if row["variant"] == variant]),
                3,
            )
            for slo in details[0]["in_time"]
        }
        for variant in dict.fromkeys(row["variant"] for row in details)
    }


def codes(outcomes: Sequence[Outcome]) -> dict[str, int]:
    """How many were not served, by why."""
    return dict(sorted(Counter(item.code for item in outcomes if item.status != "served").items()))


def quantiles(values: Sequence[float] | np.ndarray[Any, np.dtype[np.float64]]) -> dict[str, float | None]:
    """`QUANTILES` of `values`; None where fewer values than one lie beyond it on average."""
    if not len(values):
        return dict.fromkeys(QUANTILES)
    found = np.quantile(np.asarray(values, np.float64), list(QUANTILES.values()))
    return {
        name: round(float(value), 3) if len(values) * (1 - share) >= 1 - 1e-9 else None
        for (name, share), value in zip(QUANTILES.items(), found, strict=True)
    }


def mean_size(batches: Mapping[int, int]) -> float | None:
    """The mean of a histogram {size: calls}."""
    calls = sum(batches.values())
    return round(sum(size * n for size, n in batches.items()) / calls, 3) if calls else None
