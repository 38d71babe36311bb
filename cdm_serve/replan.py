"""The sigmas of a picture whose number of steps is changed on its way.

A CDM student is trained on schedules of random length, so from wherever a picture stands it can be finished in any
number of steps. The path is the bundle's own: its longest schedule, read as a curve σ(u), u from 0 (noise) to 1.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise

Schedules = Mapping[int, tuple[float, ...]]


def replan(schedules: Schedules, sigma: float, left: int) -> tuple[float, ...]:
    """`left + 1` falling sigmas from `sigma` to 0, evenly spaced in u; from noise the bundle's, if it has them."""
    assert 0 < sigma <= 1
    assert left >= 1
    if sigma == 1.0 and left in schedules:
        return schedules[left]
    curve = schedules[max(schedules)]
    start = _position(curve, sigma)
    inner = [_value(curve, start + (1 - start) * step / left) for step in range(1, left)]
    return (sigma, *inner, 0.0)


def _position(curve: tuple[float, ...], sigma: float) -> float:
    last = len(curve) - 1
    for index, (high, low) in enumerate(pairwise(curve)):
        if low <= sigma <= high:
            return (index + (high - sigma) / (high - low)) / last
    raise AssertionError(f"{sigma} is not on {curve}")


def _value(curve: tuple[float, ...], u: float) -> float:
    place = u * (len(curve) - 1)
    index = min(int(place), len(curve) - 2)
    return curve[index] + (place - index) * (curve[index + 1] - curve[index])
