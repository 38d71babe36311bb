"""The scheduler under load: what arrivals and the calls themselves teach it."""

from __future__ import annotations

import pytest
from hypothesis import given

from cdm_serve.costs import CostModel
from cdm_serve.scheduler import Scheduler
from tests.cdm_serve.wishes import Wish, costs_of, simulate, wishes

WISH = Wish(steps=1, encoded=True)


def first_batch(recent: int, waiting: int, now: float = 1000.0) -> int:
    """The first call's size for `waiting` pictures after `recent` others came and left."""
    costs = CostModel()
    for size, seconds in ((1, 1.0), (2, 1.7), (4, 3.0)):
        costs.record("denoise", "small", size, seconds)
    scheduler = Scheduler(costs, max_batch=4)
    for id in range(recent):
        scheduler.add(Wish(steps=1, encoded=True, arrival=990.0).task(1000 + id))
        scheduler.cancel(1000 + id)
    for id in range(waiting):
        scheduler.add(Wish(steps=1, encoded=True, arrival=now).task(id))
    call = scheduler.schedule(now)
    assert call is not None
    return len(call.ids)


def test_batches_are_larger_while_many_come() -> None:
    assert first_batch(recent=0, waiting=4) == 1
    assert first_batch(recent=200, waiting=4) == 3
    assert first_batch(recent=200, waiting=4, now=2000.0) == 1  # that was long ago


def test_withdrawn_pictures_are_neither_there_nor_load() -> None:
    """As `Runner.submit` does with those before the one that is refused."""
    scheduler = Scheduler(costs_of(call=1.0, each=0.0), max_batch=4)
    for id in range(200):
        scheduler.add(WISH.task(id))
        scheduler.withdraw(id)
    assert len(scheduler) == 0
    assert scheduler._inflow.share(0.0) == pytest.approx(0.0)


def leaving_after(slowness: float, pictures: int, gap: float = 0.0) -> float:
    """Seconds until eight new pictures should be finished, after calls that took `slowness` times what was measured,
    with an idle `gap` before each."""
    scheduler = Scheduler(costs_of(call=0.01, each=0.01), max_batch=4)
    now, id = 0.0, 0
    for _ in range(100):
        for _ in range(pictures):
            scheduler.add(Wish(arrival=now, steps=1, encoded=True).task(id))
            id += 1
        while call := scheduler.schedule(now):
            now += slowness * scheduler.costs.seconds(call.stage, call.bucket, len(call.ids))
            scheduler.postprocess(call, now)
        now += gap
    for _ in range(8):
        scheduler.add(Wish(arrival=now, steps=1, encoded=True).task(id))
        id += 1
    return scheduler.leaving(now, 8)


def test_queues_that_take_longer_than_full_calls_are_expected_to_again() -> None:
    usual = leaving_after(1.0, 4)
    assert leaving_after(1.6, 4) > 1.2 * usual
    assert leaving_after(1.6, 3) == pytest.approx(leaving_after(1.0, 3))  # too few to fill a call: no queue
    assert leaving_after(1.0, 4, gap=1.0) == pytest.approx(usual, rel=0.05)  # nothing to do is no delay


@given(wishes(leaving=True))
def test_nothing_is_kept_of_calls_that_have_ended(asked: list[Wish]) -> None:
    scheduler = Scheduler(costs_of(), max_batch=3)
    simulate(asked, scheduler)
    assert not scheduler._ends
    assert not scheduler._began
