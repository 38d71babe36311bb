"""Calls in turns: each once in every round, in a new order each time, so that all share what else the machine does.

times = take_turns({"on": step_on, "off": step_off}, rounds=10)        # {"on": [ms, …], "off": [ms, …]}
spread("step", times["on"])                                            # {"step ms": 7.31, "step IQR": 0.12}
"""

from __future__ import annotations

import random
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

import numpy as np

SETTLE_S = 0.02
"""The last call's idle worker threads spin for a moment."""

Key = TypeVar("Key")


def take_turns(
    calls: Mapping[Key, Callable[[], object]], rounds: int, seed: int = 0
) -> dict[Key, list[float]]:
    """Milliseconds of every call in every round, after one call of each that does not count."""
    order, turns = random.Random(seed), list(calls)
    for call in calls.values():
        call()
    times: dict[Key, list[float]] = {key: [] for key in calls}
    for number in range(rounds):
        order.shuffle(turns)
        for key in turns:
            time.sleep(SETTLE_S)
            began = time.perf_counter()
            calls[key]()
            times[key].append(1e3 * (time.perf_counter() - began))
        print(f"\rround {number + 1}/{rounds}", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    return times


def spread(what: str, values: Sequence[float]) -> dict[str, float]:
    """`{what} ms`, the median, and `{what} IQR`, how far apart the quartiles are (0 of a single value)."""
    low, middle, high = np.percentile(np.asarray(values, np.float64), [25, 50, 75])
    return {f"{what} ms": float(middle), f"{what} IQR": float(high - low)}
