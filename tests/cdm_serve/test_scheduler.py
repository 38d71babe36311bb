"""Laws of the policy, on a virtual clock."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from math import inf

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cdm_serve.baselines import POLICIES
from cdm_serve.costs import TEXT, CostModel
from cdm_serve.scheduler import Scheduler
from cdm_serve.tasks import Call, Task

BUCKETS = ("small", "large")
POLICY = st.sampled_from(sorted(POLICIES))


def costs_of(
    encode: float = 0.1, call: float = 1.0, each: float = 0.2, decode: float = 0.5, most: int = 8
) -> CostModel:
    """c(batch) = call + each·batch for a step; a decode call costs `decode` per picture."""
    costs = CostModel()
    for batch in (1, most):
        costs.record("encode", TEXT, batch, encode)
        for bucket in BUCKETS:
            costs.record("denoise", bucket, batch, call + each * batch)
            costs.record("decode", bucket, batch, decode * batch)
    return costs


@dataclass(frozen=True)
class Wish:
    """One picture asked for, and when its client leaves (never: infinity)."""

    arrival: float = 0.0
    steps: int = 4
    bucket: str = "small"
    patience: float = inf
    priority: int = 0
    min_steps: int | None = None
    encoded: bool = False
    leaves: float = inf

    def task(self, id: int) -> Task:
        return Task(
            id, self.bucket, self.steps, self.arrival, self.arrival + self.patience, self.priority,
            self.min_steps, self.encoded,
        )  # fmt: skip


@st.composite
def wishes(draw: st.DrawFn, leaving: bool = False) -> list[Wish]:
    times = st.integers(0, 40).map(lambda tenths: tenths / 2)
    made = []
    for _ in range(draw(st.integers(1, 20))):
        steps = draw(st.integers(1, 8))
        made.append(
            Wish(
                arrival=draw(times), steps=steps, bucket=draw(st.sampled_from(BUCKETS)),
                patience=draw(st.sampled_from([inf, 2.0, 8.0, 30.0])), priority=draw(st.integers(0, 2)),
                min_steps=draw(st.none() | st.integers(1, steps)), encoded=draw(st.booleans()),
                leaves=draw(times) if leaving and draw(st.booleans()) else inf,
            )
        )  # fmt: skip
    return sorted(made, key=lambda wish: wish.arrival)


Log = list[tuple[float, Call, tuple[int, ...], float]]
"""(start, call, who finished by it, end)."""


def simulate(asked: list[Wish], scheduler: Scheduler, until: float = inf) -> Log:
    """One engine on a virtual clock; calls last what the cost model says."""
    log: Log = []
    now, at = 0.0, 0
    gone: set[int] = set()
    while (at < len(asked) or len(scheduler)) and now < until:
        while at < len(asked) and asked[at].arrival <= now:
            scheduler.add(asked[at].task(at))
            at += 1
        for id, wish in enumerate(asked[:at]):
            if wish.leaves <= now and id not in gone:
                gone.add(id)
                scheduler.cancel(id)
        call = scheduler.schedule(now)
        if call is None:
            assert len(scheduler) == 0, "pictures wait and the engine is idle"
            if at == len(asked):
                break
            now = asked[at].arrival
            continue
        end = now + scheduler.costs.seconds(call.stage, call.bucket, len(call.ids))
        log.append((now, call, scheduler.postprocess(call, end), end))
        now = end
    return log


def _finished(log: Log) -> dict[int, float]:
    return {id: end for _, _, finished, end in log for id in finished}


@given(wishes(), st.integers(1, 8), POLICY)
def test_everybody_is_finished_once_after_the_steps_it_allows(
    asked: list[Wish], max_batch: int, policy: str
) -> None:
    log = simulate(asked, POLICIES[policy](costs_of(), max_batch))
    steps = Counter(id for _, call, _, _ in log if call.stage == "denoise" for id in call.ids)
    encodings = Counter(id for _, call, _, _ in log if call.stage == "encode" for id in call.ids)
    for id, wish in enumerate(asked):
        least = wish.steps if wish.min_steps is None or policy != "step" else wish.min_steps
        assert least <= steps[id] <= wish.steps
        assert encodings[id] == (not wish.encoded)
    assert sorted(id for _, _, finished, _ in log for id in finished) == list(range(len(asked)))


@given(wishes(leaving=True), st.integers(1, 8), POLICY)
def test_call_has_one_stage_one_shape_no_doubles_and_at_most_max_batch(
    asked: list[Wish], max_batch: int, policy: str
) -> None:
    encoded = {id for id, wish in enumerate(asked) if wish.encoded}
    for now, call, _, _ in simulate(asked, POLICIES[policy](costs_of(), max_batch)):
        assert 1 <= len(call.ids) <= max_batch
        assert len(set(call.ids)) == len(call.ids) == len(call.left)
        assert all(asked[id].arrival <= now < asked[id].leaves for id in call.ids)
        if call.stage == "encode":
            assert not encoded & set(call.ids)
            encoded |= set(call.ids)
            continue
        assert {asked[id].bucket for id in call.ids} == {call.bucket}
        assert set(call.ids) <= encoded
        assert all((left > 0) == (call.stage == "denoise") for left in call.left)


@given(wishes(leaving=True), st.integers(1, 8), POLICY)
def test_who_leaves_costs_nobody_else_its_picture(asked: list[Wish], max_batch: int, policy: str) -> None:
    finished = _finished(simulate(asked, POLICIES[policy](costs_of(), max_batch)))
    for id, wish in enumerate(asked):
        assert id in finished or wish.leaves < inf
        # Its last call may be running when it leaves; then it is not finished either.
        assert finished.get(id, 0.0) <= wish.leaves or id not in finished or finished[id] >= wish.leaves


@given(wishes(leaving=True), st.integers(1, 8), POLICY)
def test_equal_inputs_give_equal_schedules(asked: list[Wish], max_batch: int, policy: str) -> None:
    first, second = (simulate(asked, POLICIES[policy](costs_of(), max_batch)) for _ in range(2))
    assert first == second


@given(st.lists(st.tuples(st.integers(1, 8), st.integers(1, 60)), min_size=1, max_size=12))
def test_deadlines_hold_when_all_can(asked: list[tuple[int, int]]) -> None:
    """Without gain from batching and with everybody there, earliest deadline first is optimal (Jackson 1955)."""
    made = [Wish(steps=steps, patience=float(patience), encoded=True) for steps, patience in asked]
    costs = costs_of(call=0.0, each=1.0)
    elapsed, feasible = 0.0, True
    for wish in sorted(made, key=lambda wish: wish.patience):
        elapsed += wish.steps * 1.0 + 0.5
        feasible = feasible and elapsed <= wish.patience
    finished = _finished(simulate(made, Scheduler(costs, max_batch=1)))
    if feasible:
        assert all(finished[id] <= wish.patience for id, wish in enumerate(made))


@given(st.lists(st.tuples(st.integers(1, 8), st.integers(1, 60)), min_size=1, max_size=12))
def test_admission_lets_in_exactly_who_harms_no_deadline(asked: list[tuple[int, int]]) -> None:
    scheduler = Scheduler(costs_of(call=0.0, each=1.0), max_batch=1)
    accepted: dict[int, Wish] = {}

    def feasible(wishes: list[Wish]) -> bool:
        elapsed = 0.0
        for wish in sorted(wishes, key=lambda wish: wish.patience):
            elapsed += wish.steps + 0.5
            if elapsed > wish.patience:
                return False
        return True

    for id, (steps, patience) in enumerate(asked):
        wish = Wish(steps=steps, patience=float(patience), encoded=True)
        excess = scheduler.excess(wish.task(id), 0.0)
        assert (excess == 0.0) == feasible([*accepted.values(), wish])
        if not excess:
            accepted[id] = wish
            scheduler.add(wish.task(id))


@pytest.mark.parametrize("patience", [inf, 40.0])
@pytest.mark.parametrize("max_batch", [1, 4])
@pytest.mark.parametrize("priority", [0, 2])
def test_nobody_starves_under_an_endless_stream_of_more_urgent_pictures(
    patience: float, priority: int, max_batch: int
) -> None:
    gap, aging, alone = 1.0, 4.0, 0.1 + 2 * 1.2 + 0.5  # three times what one picture at a time can take
    stream = [Wish(arrival=gap * i, steps=2, patience=patience, priority=priority) for i in range(150)]
    lowly = Wish(arrival=gap * 3 + 0.01, steps=4, bucket="large")
    asked = sorted([*stream, lowly], key=lambda wish: wish.arrival)
    finished = _finished(simulate(asked, Scheduler(costs_of(), max_batch, aging_s=aging)))
    # It outranks whoever comes more than (priority + 1) agings after it: at most those before them go first.
    head_start = lowly.arrival + (priority + 2) * aging
    assert finished[asked.index(lowly)] < (head_start / gap + 2) * alone
    assert finished[asked.index(lowly)] < max(finished.values()) / 2


@settings(max_examples=25, deadline=None)
@given(
    st.lists(
        st.tuples(st.integers(1, 4), st.integers(0, 2), st.sampled_from([inf, 8.0, 20.0]), st.sampled_from(BUCKETS)),
        min_size=1, max_size=4,
    ),
    st.sampled_from([0.5, 1.0]), st.integers(1, 4), st.sampled_from([inf, 1.0]), st.integers(1, 4),
)  # fmt: skip
def test_waiting_is_bounded_whatever_comes_after(
    kinds: list[tuple[int, int, float, str]], gap: float, steps: int, patience: float, max_batch: int
) -> None:
    """Whoever comes more than (2 + 1) agings after a picture of priority 0 never goes before it."""
    aging, count = 4.0, 90
    stream = []
    for i in range(count):
        length, priority, allowed, bucket = kinds[i % len(kinds)]
        stream.append(Wish(gap * i, length, bucket, allowed, priority))
    lowly = Wish(arrival=gap * 3 + 0.01, steps=steps, patience=patience, bucket="large")
    asked = sorted([*stream, lowly], key=lambda wish: wish.arrival)
    scheduler = Scheduler(costs_of(), max_batch, aging_s=aging)
    finished = _finished(simulate(asked, scheduler))
    before = [wish for wish in asked if wish.arrival <= lowly.arrival + 3 * aging]
    step, decode = (scheduler.costs.seconds(stage, "large", max_batch) for stage in ("denoise", "decode"))
    # Each of them needs its calls, at worst alone in a full one; between two steps others may leave and come.
    most = sum(0.1 + wish.steps * (step + (max_batch - 1) * (0.1 + decode)) + decode for wish in before)
    assert finished[asked.index(lowly)] <= lowly.arrival + 3 * aging + most


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
    """Four per call are 10 % cheaper than two: worth their waiting for each other if many wait, of any shape."""
    costs = CostModel()
    for size, seconds in ((1, 1.5), (2, 2.0), (4, 3.6)):
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
    finished = _finished(simulate(asked, Scheduler(costs_of(call=1.0, each=0.0), max_batch=1)))
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
        finished = _finished(simulate(asked, Scheduler(scheduler.costs, max_batch=1)))
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
    assert scheduler.excess(replace(wish, arrival=1000.0).task(99), 1000.0) > 0.0


def test_leaving_tells_when_the_first_of_those_in_work_are_done() -> None:
    scheduler = Scheduler(costs_of(call=1.0, each=0.0, decode=0.5), max_batch=1)
    for id, steps in enumerate((2, 4)):
        scheduler.add(Wish(steps=steps, encoded=True).task(id))
    assert scheduler.leaving(0.0, 1) == pytest.approx(2.5)
    assert scheduler.leaving(0.0, 2) == pytest.approx(7.0)
    assert scheduler.leaving(0.0, 9) == pytest.approx(7.0)
