"""Laws of the policy, on a virtual clock."""

from __future__ import annotations

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from cdm_serve.scheduler import Batch, Scheduler, Task

Wish = tuple[int, int, int]
wishes = st.lists(
    st.tuples(st.integers(0, 20), st.integers(1, 8), st.integers(0, 2)), min_size=1, max_size=30
)
"""(arrival, steps, bucket) per picture."""


def simulate(
    asked: list[Wish], max_batch: int, cancelled: dict[int, int] | None = None
) -> list[tuple[int, Batch, tuple[int, ...]]]:
    """One step per tick of the clock: (tick, batch, who finished). `cancelled`: picture → tick at which it leaves."""
    scheduler = Scheduler(max_batch)
    log = []
    for now in range(21 + sum(steps for _, steps, _ in asked)):
        for id, (arrival, steps, bucket) in enumerate(asked):
            if arrival == now:
                scheduler.add(Task(id, bucket, steps, float(arrival)))
        for id, tick in (cancelled or {}).items():
            if tick == now:
                scheduler.cancel(id)
        batch = scheduler.schedule(float(now))
        if batch is not None:
            log.append((now, batch, scheduler.postprocess(batch)))
    assert len(scheduler) == 0
    return log


@given(wishes, st.integers(1, 8))
def test_every_picture_takes_exactly_its_steps_and_finishes_once(asked: list[Wish], max_batch: int) -> None:
    log = simulate(asked, max_batch)
    steps = Counter(id for _, batch, _ in log for id in batch.ids)
    assert steps == {id: steps for id, (_, steps, _) in enumerate(asked)}
    assert sorted(id for _, _, finished in log for id in finished) == list(range(len(asked)))


@given(wishes, st.integers(1, 8))
def test_batch_has_one_bucket_no_doubles_and_at_most_max_batch(asked: list[Wish], max_batch: int) -> None:
    for _, batch, _ in simulate(asked, max_batch):
        assert 1 <= len(batch.ids) <= max_batch
        assert len(set(batch.ids)) == len(batch.ids)
        assert {asked[id][2] for id in batch.ids} == {batch.bucket}


@given(wishes, st.integers(1, 8))
def test_nobody_waits_longer_than_for_those_before_it(asked: list[Wish], max_batch: int) -> None:
    finished_at = {id: now for now, _, finished in simulate(asked, max_batch) for id in finished}
    order = sorted(range(len(asked)), key=lambda id: (asked[id][0], id))
    for place, id in enumerate(order):
        before = sum(asked[other][1] for other in order[: place + 1])
        assert finished_at[id] < asked[id][0] + before


@given(wishes, st.integers(1, 8))
def test_no_place_stays_empty_while_an_equal_shape_waits(asked: list[Wish], max_batch: int) -> None:
    left = {id: steps for id, (_, steps, _) in enumerate(asked)}
    for now, batch, _ in simulate(asked, max_batch):
        could = [
            id
            for id, (arrival, _, bucket) in enumerate(asked)
            if arrival <= now and left[id] and bucket == batch.bucket
        ]
        assert len(batch.ids) == min(len(could), max_batch)
        for id in batch.ids:
            left[id] -= 1


@given(wishes, st.integers(1, 8), st.data())
def test_cancelled_picture_never_runs_again_and_others_lose_nothing(
    asked: list[Wish], max_batch: int, data: st.DataObject
) -> None:
    cancelled = data.draw(st.dictionaries(st.integers(0, len(asked) - 1), st.integers(0, 40)))
    log = simulate(asked, max_batch, {id: max(tick, asked[id][0]) for id, tick in cancelled.items()})
    for now, batch, _ in log:
        assert all(now < max(cancelled[id], asked[id][0]) for id in batch.ids if id in cancelled)
    finished = {id for _, _, done in log for id in done}
    assert finished >= set(range(len(asked))) - set(cancelled)


@given(wishes, st.integers(1, 8))
def test_same_requests_give_the_same_batches(asked: list[Wish], max_batch: int) -> None:
    assert simulate(asked, max_batch) == simulate(asked, max_batch)


def test_newcomer_joins_at_the_next_step_edge() -> None:
    log = simulate([(0, 4, 0), (2, 1, 0)], max_batch=4)
    assert [batch.ids for _, batch, _ in log] == [(0,), (0,), (0, 1), (0,)]


def test_oldest_picture_chooses_the_shape() -> None:
    log = simulate([(0, 2, 0), (0, 1, 1), (0, 2, 0)], max_batch=4)
    assert [batch.ids for _, batch, _ in log] == [(0, 2), (0, 2), (1,)]


def test_cancel_tells_the_steps_that_were_saved() -> None:
    scheduler = Scheduler(max_batch=2)
    scheduler.add(Task(1, "a", 4, 0.0))
    batch = scheduler.schedule(0.0)
    assert batch is not None
    assert scheduler.cancel(1) == 4
    assert scheduler.postprocess(batch) == ()
    assert scheduler.cancel(1) == 0


def test_nobody_is_scheduled_before_its_arrival() -> None:
    scheduler = Scheduler(max_batch=2)
    scheduler.add(Task(1, "a", 1, arrival=5.0))
    assert scheduler.schedule(4.9) is None
    assert scheduler.schedule(5.0) == Batch((1,), "a")
