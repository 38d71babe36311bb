"""Laws of the policy, on a virtual clock."""

from __future__ import annotations

from collections import Counter
from math import inf

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cdm_serve.baselines import POLICIES
from cdm_serve.scheduler import Scheduler
from tests.cdm_serve.wishes import BUCKETS, POLICY, Wish, costs_of, finished_at, simulate, wishes


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
    finished = finished_at(simulate(asked, POLICIES[policy](costs_of(), max_batch)))
    for id, wish in enumerate(asked):
        assert id in finished or wish.leaves < inf


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
    finished = finished_at(simulate(made, Scheduler(costs, max_batch=1)))
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
    finished = finished_at(simulate(asked, Scheduler(costs_of(), max_batch, aging_s=aging)))
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
    finished = finished_at(simulate(asked, scheduler))
    before = [wish for wish in asked if wish.arrival <= lowly.arrival + 3 * aging]
    step, decode = (scheduler.costs.seconds(stage, "large", max_batch) for stage in ("denoise", "decode"))
    # Each of them needs its calls, at worst alone in a full one; between two steps others may leave and come.
    most = sum(0.1 + wish.steps * (step + (max_batch - 1) * (0.1 + decode)) + decode for wish in before)
    assert finished[asked.index(lowly)] <= lowly.arrival + 3 * aging + most
