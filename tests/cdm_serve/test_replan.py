"""A schedule that is changed on its way still ends in the picture, on the bundle's own curve."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cdm_serve.replan import replan


def shifted(u: float, shift: float = 3.0) -> float:
    sigma = 1 - u
    return shift * sigma / (1 + (shift - 1) * sigma)


SCHEDULES = {n: tuple(shifted(i / n) for i in range(n + 1)) for n in (1, 2, 4, 8)}


@given(st.floats(0.001, 1.0), st.integers(1, 12))
def test_falls_strictly_from_where_it_stands_to_zero(sigma: float, left: int) -> None:
    sigmas = replan(SCHEDULES, sigma, left)
    assert len(sigmas) == left + 1
    assert (sigmas[0], sigmas[-1]) == (sigma, 0.0)
    assert all(high > low for high, low in pairwise(sigmas))


@pytest.mark.parametrize("steps", [1, 2, 4, 8])
def test_from_noise_it_is_the_bundles_schedule(steps: int) -> None:
    assert replan(SCHEDULES, 1.0, steps) == SCHEDULES[steps]


@pytest.mark.parametrize(("steps", "done"), [(8, 4), (4, 2), (8, 6), (4, 1)])
def test_as_many_steps_as_planned_change_nothing(steps: int, done: int) -> None:
    rest = SCHEDULES[steps][done:]
    assert replan(SCHEDULES, rest[0], steps - done) == pytest.approx(rest, abs=1e-9)


def test_half_the_steps_are_every_other_sigma() -> None:
    rest = SCHEDULES[8][4:]
    assert replan(SCHEDULES, rest[0], 2) == pytest.approx(rest[::2], abs=1e-9)
