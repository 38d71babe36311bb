"""The load that the scheduler believes in is the work that arrives per second."""

from __future__ import annotations

import pytest

from cdm_serve.inflow import Inflow


@pytest.mark.parametrize("work", [0.01, 0.1, 2.0])
@pytest.mark.parametrize("load", [0.2, 0.7, 1.5])
def test_steady_arrivals_are_their_work_per_second(work: float, load: float) -> None:
    inflow, now = Inflow(), 0.0
    for _ in range(max(1000, round(50 * load / work))):
        now += work / load
        inflow.add(work, now)
    assert inflow.share(now) == pytest.approx(load, rel=0.05, abs=0.04)


@pytest.mark.parametrize(
    ("kinds", "load"), [(((10.0, 0.01), (0.4, 2.0)), 0.9), (((5.0, 0.04), (1.0, 0.6)), 0.8)]
)
def test_pictures_of_different_sizes_count_by_their_work(
    kinds: tuple[tuple[float, float], ...], load: float
) -> None:
    inflow = Inflow()
    arrivals = sorted((n / rate, work) for rate, work in kinds for n in range(1, round(400 * rate)))
    shares = []
    for at, work in arrivals:
        inflow.add(work, at)
        shares.append(inflow.share(at))
    tail = shares[len(shares) // 2 :]
    assert sum(tail) / len(tail) == pytest.approx(load, rel=0.15)


def test_what_is_taken_back_never_came() -> None:
    inflow = Inflow()
    inflow.add(0.02, 1.0)
    before = inflow.share(1.0)
    inflow.add(0.02, 1.0)
    inflow.take_back(0.02)
    assert inflow.share(1.0) == pytest.approx(before)


def test_it_fades_when_nobody_comes() -> None:
    inflow = Inflow()
    inflow.add(0.01, 100.0)
    assert inflow.share(100.0) == pytest.approx(0.002)
    assert 0 < inflow.share(130.0) < 1e-5


def test_a_few_large_pictures_together_are_no_load() -> None:
    inflow = Inflow()
    for _ in range(4):
        inflow.add(10.0, 0.0)
    assert inflow.share(0.0) == pytest.approx(4 / 32)
