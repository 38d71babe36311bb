"""The scheduler's policy, case by case."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from math import inf

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cdm_serve.costs import CostModel
from cdm_serve.scheduler import Scheduler
from cdm_serve.tasks import Call
from tests.cdm_serve.wishes import BUCKETS, Wish, costs_of, finished_at, simulate


def test_newcomer_joins_at_the_next_step_edge_of_any_schedule() -> None:
    asked = [Wish(steps=4, encoded=True), Wish(arrival=0.5, steps=1, encoded=True)]
    log = simulate(asked, Scheduler(costs_of(call=1.0, each=0.1), max_batch=4))
    steps = [(call.ids, call.left) for _, call, _, _ in log if call.stage == "denoise"]
    assert steps == [((0,), (4,)), ((0, 1), (3, 1)), ((0,), (2,)), ((0,), (1,))]


def test_batch_grows_only_while_it_pays() -> None:
    asked = [Wish(steps=2, encoded=True)] * 4
    cheap = simulate(asked, Scheduler(costs_of(call=1.0, each=0.01), max_batch=8))
    dear = simulate(asked, Scheduler(costs_of(call=0.0, each=1.0), max_batch=8))
    assert {len(call.ids) for _, call, _, _ in cheap if call.stage == "denoise"} == {4}
    assert {len(call.ids) for _, call, _, _ in dear if call.stage == "denoise"} == {1}
    # Decoding costs the same alone: the first picture does not wait for the others.
    assert {len(call.ids) for _, call, _, _ in cheap if call.stage == "decode"} == {1}


def test_decoding_waits_for_company_where_that_saves_everybody_time() -> None:
    """Six wait behind two that are done and two that will be a step later: one decode call instead of two."""
    costs = decoding_costs()
    asked = [Wish(steps=1, encoded=True)] * 2 + [Wish(steps=2, encoded=True)] * 2
    asked += [Wish(arrival=0.1, steps=4, encoded=True)] * 6
    log = simulate(asked, Scheduler(costs, max_batch=4))
    assert next(len(call.ids) for _, call, _, _ in log if call.stage == "decode") == 4


def decoding_costs(seconds: float = 2.0, max_batch: int = 4) -> CostModel:
    """As `costs_of`, steps nearly free of size, and a decode call as long for `max_batch` pictures as for one."""
    costs = CostModel.of([row for row in costs_of(call=1.0, each=0.01).rows() if row[0] != "decode"])
    for bucket in BUCKETS:
        for size in (1, max_batch):
            costs.record("decode", bucket, size, seconds)
    return costs


def ready_to_decode(scheduler: Scheduler, wish: Wish, ids: range) -> None:
    """Put pictures into `scheduler` whose steps are done."""
    for id in ids:
        task = replace(wish, steps=1, encoded=True).task(id)
        scheduler.add(task)
        task.done = 1


def test_decoding_waits_for_as_many_as_the_call_can_still_take() -> None:
    """Two are ready, three will be: with room for two of them it still pays to wait."""
    scheduler = Scheduler(decoding_costs(), max_batch=4)
    ready_to_decode(scheduler, Wish(), range(2))
    for id in range(2, 5):
        scheduler.add(Wish(steps=1, encoded=True).task(id))
    for id in range(5, 9):
        scheduler.add(Wish(steps=4, encoded=True, arrival=0.1).task(id))
    call = scheduler.schedule(0.2)
    assert call is not None
    assert (call.stage, set(call.ids) >= {2, 3, 4}) == ("denoise", True)


def test_full_decode_call_does_not_wait() -> None:
    scheduler = Scheduler(decoding_costs(), max_batch=4)
    ready_to_decode(scheduler, Wish(), range(5))
    for id in range(5, 12):
        scheduler.add(Wish(steps=1, encoded=True).task(id))
    assert scheduler.schedule(0.0) == Call("decode", "small", (0, 1, 2, 3), (0, 0, 0, 0))


def test_decoding_does_not_wait_for_a_shape_that_is_not_being_stepped() -> None:
    """The leader is of another shape, so its step brings the group no company."""
    scheduler = Scheduler(decoding_costs(), max_batch=4)
    ready_to_decode(scheduler, Wish(arrival=0.5), range(2))
    for id in range(2, 8):
        scheduler.add(Wish(steps=4, encoded=True, bucket="large").task(id))
    for id in range(8, 10):
        scheduler.add(Wish(arrival=0.5, steps=1, encoded=True).task(id))
    call = scheduler.schedule(1.0)
    assert call == Call("decode", "small", (0, 1), (0, 0))


def test_urgent_leader_goes_before_decoding_unless_the_others_have_waited_an_aging_longer() -> None:
    def first(arrival: float) -> str:
        scheduler = Scheduler(costs_of(call=1.0, each=0.0), max_batch=1, aging_s=5.0)
        ready_to_decode(scheduler, Wish(arrival=arrival), range(1))
        scheduler.add(Wish(arrival=10.0, steps=1, patience=1.0 + 0.5 + 0.1, encoded=True).task(1))
        call = scheduler.schedule(10.0)
        assert call is not None
        return call.stage

    assert first(9.0) == "denoise"
    assert first(4.0) == "decode"


def test_longer_queue_makes_larger_batches() -> None:
    """Four per call are 5 % cheaper than two: worth their waiting for each other if many wait, of any shape."""
    costs = CostModel()
    for size, seconds in ((1, 1.5), (2, 2.0), (4, 3.8)):
        costs.record("denoise", "small", size, seconds)
        costs.record("decode", "small", size, 0.1 * size)

    def first(waiting: int) -> int:
        scheduler = Scheduler(costs, max_batch=4)
        for id in range(waiting):
            scheduler.add(Wish(steps=1, encoded=True, bucket="small" if id < 4 else "large").task(id))
        call = scheduler.schedule(0.0)
        assert call is not None
        return len(call.ids)

    assert [first(waiting) for waiting in (1, 4, 32)] == [1, 2, 4]


@pytest.mark.parametrize("patience", [inf, 1.0])
def test_place_of_a_full_call_goes_to_who_has_no_deadline_to_meet(patience: float) -> None:
    scheduler = Scheduler(costs_of(call=1.0, each=0.0), max_batch=3)
    scheduler.add(Wish(steps=3, encoded=True, patience=patience).task(0))
    for id, spare in ((1, 30.0), (2, 20.0), (3, 10.0), (4, 40.0)):
        scheduler.add(Wish(steps=2, encoded=True, patience=spare).task(id))
    call = scheduler.schedule(0.0)
    assert call is not None
    assert call.ids == (3, 2, 0)


def test_place_is_kept_by_who_would_miss_its_deadline_without_it() -> None:
    costs = costs_of(call=1.0, each=0.0)
    tight = 2 * 1.0 + 0.5 + 0.6  # its own calls, and less than one more

    def members(spares: tuple[float, ...]) -> tuple[int, ...]:
        scheduler = Scheduler(costs, max_batch=3)
        scheduler.add(Wish(steps=3, encoded=True).task(0))
        for id, spare in enumerate(spares, start=1):
            scheduler.add(Wish(steps=2, encoded=True, patience=spare).task(id))
        call = scheduler.schedule(0.0)
        assert call is not None
        return call.ids

    assert members((tight, tight, tight, tight)) == (1, 2, 3)
    assert members((tight, tight + 2, tight + 3, tight + 4)) == (1, 2, 0)


def test_place_is_not_given_across_priorities() -> None:
    scheduler = Scheduler(costs_of(call=1.0, each=0.0), max_batch=2)
    scheduler.add(Wish(steps=1, encoded=True).task(0))
    for id in (1, 2, 3):
        scheduler.add(Wish(steps=1, encoded=True, patience=30.0, priority=1).task(id))
    call = scheduler.schedule(0.0)
    assert call is not None
    assert call.ids == (1, 2)


def test_tighter_deadline_goes_first_and_a_lost_one_last() -> None:
    asked = [
        Wish(steps=1, patience=1.0, encoded=True),  # cannot be met at all
        Wish(steps=1, patience=50.0, encoded=True),
        Wish(steps=1, patience=10.0, encoded=True),
        Wish(steps=1, priority=1, encoded=True),
    ]
    finished = finished_at(simulate(asked, Scheduler(costs_of(call=1.0, each=0.0), max_batch=1)))
    assert sorted(finished, key=finished.__getitem__) == [3, 2, 1, 0]


def test_text_of_the_next_in_line_is_encoded_in_the_same_call() -> None:
    log = simulate([Wish(steps=1)] * 6, Scheduler(costs_of(encode=1.0), max_batch=3))
    assert [len(call.ids) for _, call, _, _ in log if call.stage == "encode"] == [3, 3]


@given(st.integers(1, 30), st.integers(1, 4))
def test_fewer_steps_only_under_load_and_never_below_the_least(count: int, least: int) -> None:
    asked = [Wish(steps=8, min_steps=least, patience=20.0, encoded=True)] * count
    scheduler = Scheduler(costs_of(call=1.0, each=0.0, decode=0.1), max_batch=1)
    steps = Counter(
        id for _, call, _, _ in simulate(asked, scheduler) if call.stage == "denoise" for id in call.ids
    )
    assert all(least <= steps[id] <= 8 for id in range(count))
    if count * (8 + 0.1) <= 20.0:
        assert set(steps.values()) == {8}
    elif count * (least + 0.1) <= 20.0:  # all can be in time in the fewest steps: then all are
        finished = finished_at(simulate(asked, Scheduler(scheduler.costs, max_batch=1)))
        assert max(finished.values()) <= 20.0 + 1e-9


def test_degradation_is_shared() -> None:
    asked = [Wish(steps=4, min_steps=1, patience=10.0, encoded=True)] * 4
    log = simulate(asked, Scheduler(costs_of(call=1.0, each=0.0, decode=0.1), max_batch=1))
    steps = Counter(id for _, call, _, _ in log if call.stage == "denoise" for id in call.ids)
    assert max(steps.values()) - min(steps.values()) <= 1


def test_lanes_take_what_is_theirs() -> None:
    scheduler = Scheduler(costs_of(), max_batch=4)
    scheduler.add(Wish(steps=1, encoded=True).task(1))
    assert scheduler.schedule(0.0, ("decode",)) is None
    first = scheduler.schedule(0.0, ("encode", "denoise"))
    assert first == Call("denoise", "small", (1,), (1,))
    assert scheduler.schedule(0.0) is None  # it is in a call
    scheduler.postprocess(first, 1.0)
    scheduler.add(Wish(steps=1, encoded=True).task(2))
    assert scheduler.schedule(1.0, ("encode", "denoise")) == Call("denoise", "small", (2,), (1,))
    assert scheduler.schedule(1.0, ("decode",)) == Call("decode", "small", (1,), (0,))


def test_cancel_tells_the_steps_that_were_saved() -> None:
    scheduler = Scheduler(costs_of(), max_batch=2)
    for id in (1, 2):
        scheduler.add(Wish(encoded=True).task(id))
    assert scheduler.cancel(2) == 4
    call = scheduler.schedule(0.0)
    assert call is not None
    assert scheduler.cancel(1) == 3  # one is running
    assert scheduler.postprocess(call, 1.0) == ()
    assert scheduler.cancel(1) == 0


def test_nobody_is_scheduled_before_its_arrival() -> None:
    scheduler = Scheduler(costs_of(), max_batch=2)
    scheduler.add(Wish(arrival=5.0, encoded=True).task(1))
    assert scheduler.schedule(4.9) is None
    assert scheduler.schedule(5.0) is not None


def test_predictions_become_careful_when_deadlines_break() -> None:
    scheduler = Scheduler(costs_of(call=1.0, each=0.0), max_batch=1)
    wish = Wish(steps=2, patience=3.0, encoded=True)
    assert scheduler.excess(wish.task(0), 0.0) == 0.0
    for id in range(20):  # every call takes three times what was measured
        scheduler.add(replace(wish, arrival=10.0 * id).task(id))
        now = 10.0 * id
        while call := scheduler.schedule(now):
            now += 3.0
            scheduler.postprocess(call, now)
    assert scheduler.excess(replace(wish, arrival=200.0).task(99), 200.0) > 0.0
    # Nobody who is refused can teach it better: time does.
    assert scheduler.excess(replace(wish, arrival=2000.0).task(99), 2000.0) == 0.0


def test_one_long_pause_does_not_shut_the_door() -> None:
    scheduler = Scheduler(costs_of(call=1.0, each=0.0), max_batch=8)
    for id in range(64):
        scheduler.add(Wish(steps=2, patience=3.0, encoded=True).task(id))
    now = 0.0
    while call := scheduler.schedule(now):
        now += 100.0
        scheduler.postprocess(call, now)
    wish = Wish(arrival=now, steps=2, patience=6.0, encoded=True)  # it takes 2.5
    assert scheduler.excess(wish.task(99), now) == 0.0


def test_leaving_tells_when_the_first_of_those_in_work_are_done() -> None:
    scheduler = Scheduler(costs_of(call=1.0, each=0.0, decode=0.5), max_batch=1)
    for id, steps in enumerate((2, 4)):
        scheduler.add(Wish(steps=steps, encoded=True).task(id))
    assert scheduler.leaving(0.0, 1) == pytest.approx(2.5)
    assert scheduler.leaving(0.0, 2) == pytest.approx(7.0)
    assert scheduler.leaving(0.0, 9) == pytest.approx(7.0)
