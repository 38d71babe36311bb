"""Permits bound the queue, and a refusal says when to come back."""

from __future__ import annotations

from contextlib import ExitStack

import pytest

from cdm_serve.admission import Costs, Permits
from cdm_serve.errors import QueueFull


def measured(**seconds: float) -> Costs:
    costs = Costs()
    for stage, value in seconds.items():
        costs.record(stage, value)
    return costs


def test_permits_come_back_when_a_request_ends_or_fails() -> None:
    permits = Permits(4, 2, Costs())
    with permits.take(3, 4):
        assert permits.in_use == 3
    with pytest.raises(ZeroDivisionError), permits.take(4, 4):
        raise ZeroDivisionError
    assert permits.in_use == 0


def test_refusal_takes_nothing_and_names_value_and_limit() -> None:
    permits = Permits(4, 2, Costs())
    with permits.take(3, 4):
        with (
            pytest.raises(QueueFull, match=r"3 pictures are in work and 2 more exceed --queue-limit=4"),
            permits.take(2, 4),
        ):
            pass
        assert permits.in_use == 3


def test_wait_is_the_measured_cost_of_the_oldest_that_must_leave() -> None:
    permits = Permits(8, 4, measured(encode=0.5, denoise=2.0, decode=1.0))
    with ExitStack() as stack:
        for steps in (2, 8):
            stack.enter_context(permits.take(4, steps))
        # 4 pictures × 2 steps in calls of 4 → 2 calls of 2 s, one encode and one decode
        assert permits.wait_for(1) == permits.wait_for(4) == 6  # 5.5, rounded up
        # and the other four, 8 steps each: 10 calls, two batches
        assert permits.wait_for(5) == 23


def test_wait_is_a_second_at_least() -> None:
    permits = Permits(1, 4, measured(denoise=0.001, decode=0.001))
    with permits.take(1, 1):
        assert permits.wait_for(1) == 1


def test_cost_follows_the_load_and_survives_an_outlier() -> None:
    costs = measured(denoise=1.0)
    costs.record("denoise", 10.0)
    assert 1.0 < costs.seconds("denoise") < 4.0
    for _ in range(40):
        costs.record("denoise", 10.0)
    assert costs.seconds("denoise") == pytest.approx(10.0, rel=0.01)
    assert costs.seconds("decode") == 0.0
