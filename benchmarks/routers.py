"""Which replica gets the next picture. A router sees each replica's backlog: predicted engine seconds of what it has
accepted and not finished."""

from __future__ import annotations

from collections.abc import Callable
from itertools import count

import numpy as np
from numpy.typing import NDArray

Backlog = NDArray[np.float64]
Router = Callable[[Backlog], int]


def round_robin(replicas: int, random: np.random.Generator) -> Router:
    """One after the other, whatever they have to do."""
    del random
    turn = count()
    return lambda _: next(turn) % replicas


def least(replicas: int, random: np.random.Generator) -> Router:
    """The least backlog; of several the first. Needs to know all of them at every arrival."""
    del replicas, random
    return lambda backlog: int(backlog.argmin())


def two(replicas: int, random: np.random.Generator) -> Router:
    """The lesser backlog of two drawn at random (Mitzenmacher 2001): nearly as good, and asks only two."""

    def route(backlog: Backlog) -> int:
        a, b = (int(value) for value in random.integers(replicas, size=2))
        return a if backlog[a] <= backlog[b] else b

    return route


ROUTERS: dict[str, Callable[[int, np.random.Generator], Router]] = {
    "round-robin": round_robin,
    "least": least,
    "two": two,
}
