"""Laws of the virtual fleet: it loses nobody, breaks no limit, and is as fast as queueing theory says."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from math import inf
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.arrivals import Arrival
from benchmarks.routers import ROUTERS
from benchmarks.virtual import Fleet, Run
from cdm_serve.baselines import POLICIES
from cdm_serve.costs import TEXT, CostModel

SIZES = ((64, 64), (128, 64))
ENCODE, STEP, DECODE, EACH = 0.1, 1.0, 0.5, 0.25
POLICY = st.sampled_from(sorted(POLICIES))
ROUTER = st.sampled_from(sorted(ROUTERS))


def costs() -> CostModel:
    model = CostModel()
    for batch in (1, 8):
        extra = EACH * (batch - 1)
        model.record("encode", TEXT, batch, ENCODE)
        for size in SIZES:
            model.record("denoise", size, batch, STEP + extra)
            model.record("decode", size, batch, DECODE * batch)
    return model


def alone(steps: int) -> float:
    return ENCODE + steps * STEP + DECODE


def fleet(policy: str, replicas: int = 1, max_batch: int = 4, router: str = "least", **options: Any) -> Fleet:
    options = {"queue_limit": 1000, **options}
    return Fleet([POLICIES[policy](costs(), max_batch) for _ in range(replicas)], router, **options)


TRACES = st.lists(
    st.builds(
        lambda at, steps, size, deadline, least: Arrival(
            at / 4, steps, *size, deadline, None if least is None else min(least, steps)
        ),
        st.integers(0, 80), st.integers(1, 4), st.sampled_from(SIZES), st.sampled_from([inf, 3.0, 12.0]),
        st.none() | st.integers(1, 4),
    ),
    min_size=1, max_size=25,
).map(lambda trace: sorted(trace, key=lambda item: item.at))  # fmt: skip


@settings(deadline=None)
@given(TRACES, POLICY, ROUTER, st.integers(1, 3), st.integers(1, 6), st.booleans(), st.booleans())
def test_everybody_has_one_outcome_and_nobody_is_faster_than_alone(
    trace: list[Arrival], policy: str, router: str, replicas: int, limit: int, admit: bool, overlap: bool
) -> None:
    run = fleet(policy, replicas, router=router, queue_limit=limit, admit=admit, overlap=overlap).run(trace)
    assert [outcome.at for outcome in run.outcomes] == [arrival.at for arrival in trace]
    for arrival, outcome in zip(trace, run.outcomes, strict=True):
        if outcome.status == "refused":
            assert outcome.code in ("queue_full", "deadline_infeasible")
            assert admit or outcome.code == "queue_full"
            assert arrival.deadline < inf or outcome.code == "queue_full"
            continue
        least = arrival.steps if arrival.min_steps is None or policy != "step" else arrival.min_steps
        assert least <= outcome.steps <= arrival.steps
        assert outcome.latency >= alone(outcome.steps) - 1e-9


@settings(deadline=None)
@given(TRACES, POLICY, ROUTER, st.integers(1, 3), st.integers(1, 4))
def test_queue_limit_bounds_the_unfinished(
    trace: list[Arrival], policy: str, router: str, replicas: int, limit: int
) -> None:
    run = fleet(policy, replicas, router=router, queue_limit=limit).run(trace)
    stays = [(item.at, item.at + item.latency) for item in run.outcomes if item.status == "served"]
    for arrival in trace:
        assert sum(begin <= arrival.at < end for begin, end in stays) <= limit * replicas


@settings(deadline=None)
@given(TRACES, POLICY, ROUTER, st.booleans())
def test_equal_seeds_give_equal_runs(trace: list[Arrival], policy: str, router: str, overlap: bool) -> None:
    first, second = (
        fleet(policy, 3, router=router, overlap=overlap, jitter=0.3, seed=7).run(trace) for _ in range(2)
    )
    assert first == second


@settings(deadline=None)
@given(TRACES, POLICY, st.integers(1, 4))
def test_round_robin_fleet_is_as_many_single_replicas_taking_turns(
    trace: list[Arrival], policy: str, replicas: int
) -> None:
    together = fleet(policy, replicas, router="round-robin").run(trace)
    for index in range(replicas):
        assert together.outcomes[index::replicas] == fleet(policy).run(trace[index::replicas]).outcomes


@settings(deadline=None)
@given(TRACES, ROUTER)
def test_one_at_a_time_is_lindleys_recursion(trace: list[Arrival], router: str) -> None:
    run = fleet("none", router=router, admit=False).run(trace)
    free, busy = 0.0, 0.0
    for arrival, outcome in zip(trace, run.outcomes, strict=True):
        free = max(free, arrival.at) + alone(arrival.steps)
        busy += alone(arrival.steps)
        assert outcome.at + outcome.latency == pytest.approx(free)
    assert run.busy == pytest.approx(busy)
    assert set(run.batches["denoise"]) == {1}


@settings(deadline=None)
@given(TRACES)
def test_who_is_admitted_is_in_time_where_calls_last_as_predicted(trace: list[Arrival]) -> None:
    """Of equal size, one at a time, all at once: predictions are exact then, earliest deadline first is optimal."""
    trace = [replace(arrival, at=0.0, width=64, height=64, min_steps=None) for arrival in trace]
    run = fleet("step", max_batch=1).run(trace)
    late = [
        outcome
        for arrival, outcome in zip(trace, run.outcomes, strict=True)
        if outcome.status == "served" and outcome.latency > arrival.deadline + 1e-9
    ]
    assert not late


@settings(deadline=None)
@given(TRACES)
def test_stays_are_those_of_the_pictures_with_a_deadline(trace: list[Arrival]) -> None:
    run = fleet("step", admit=False).run(trace)
    expected = [
        (outcome.at, outcome.latency)
        for arrival, outcome in zip(trace, run.outcomes, strict=True)
        if arrival.deadline < inf
    ]
    assert sorted((stay.arrival, stay.real) for stay in run.stays) == sorted(expected)
    assert all(stay.predicted > 0 for stay in run.stays)


def test_prediction_is_what_happens_where_it_can_be_known() -> None:
    """One at a time, all at once, earliest deadline first: who comes later has a later deadline."""
    trace = [Arrival(0.0, steps, 64, 64, 100.0 + at) for at, steps in enumerate((3, 1, 2))]
    run = fleet("step", max_batch=1).run(trace)
    assert [stay.real for stay in run.stays] == pytest.approx(
        [alone(3), alone(3) + alone(1), alone(3) + alone(1) + alone(2)]
    )
    assert [stay.predicted for stay in run.stays] == pytest.approx([stay.real for stay in run.stays])
    assert [stay.deadline for stay in run.stays] == [100.0, 101.0, 102.0]


@pytest.mark.parametrize("policy", sorted(POLICIES))
def test_least_backlog_gives_everybody_a_replica_while_there_is_one(policy: str) -> None:
    run = fleet(policy, 5).run([Arrival(0.0, steps, 64, 64) for steps in (1, 4, 2, 3, 4)])
    assert [outcome.latency for outcome in run.outcomes] == pytest.approx([alone(n) for n in (1, 4, 2, 3, 4)])


def test_least_backlog_counts_work_and_not_pictures() -> None:
    trace = [Arrival(0.0, 4, 64, 64), Arrival(0.0, 1, 64, 64), Arrival(0.01, 1, 64, 64)]
    run = fleet("none", 2).run(trace)
    assert run.outcomes[2].latency == pytest.approx(2 * alone(1) - 0.01)


def test_two_choices_wait_less_than_turns_on_uneven_work_and_knowing_all_less_still() -> None:
    """Every second picture is long: taking turns between two gives one replica all of them."""
    trace = [Arrival(3.0 * i, 1 + 7 * (i % 2), 64, 64) for i in range(400)]

    def worst(router: str) -> float:
        return max(
            item.latency for item in fleet("none", 2, router=router, queue_limit=10**6).run(trace).outcomes
        )

    assert worst("least") <= worst("two") < worst("round-robin")


def test_decoding_beside_denoising_takes_no_time_from_it() -> None:
    trace = [Arrival(0.0, 2, 64, 64), Arrival(0.0, 2, 64, 64)]
    one, two = (fleet("step", max_batch=1, overlap=overlap).run(trace) for overlap in (False, True))
    assert max(item.latency for item in one.outcomes) == pytest.approx(2 * alone(2))
    assert max(item.latency for item in two.outcomes) == pytest.approx(2 * alone(2) - DECODE)
    assert two.lanes == 2


def test_only_what_happens_in_the_measured_time_is_counted() -> None:
    trace = [Arrival(float(at), 1, 64, 64) for at in (0, 10, 20)]
    whole: Run = fleet("none").run(trace)
    middle = fleet("none", measured=(10.0, 10.0 + ENCODE + STEP / 2)).run(trace)
    assert whole.batches == {stage: Counter({1: 3}) for stage in whole.batches}
    assert middle.batches == {"encode": {1: 1}, "denoise": {1: 1}, "decode": {}}
    assert middle.busy == pytest.approx(ENCODE + STEP / 2)


def test_jitter_moves_single_calls_and_not_their_mean() -> None:
    trace = [Arrival(100.0 * i, 4, 64, 64) for i in range(500)]
    latencies = [item.latency for item in fleet("none", jitter=0.3).run(trace).outcomes]
    assert len(set(latencies)) == 500
    assert sum(latencies) / 500 == pytest.approx(alone(4), rel=0.02)


def test_nobody_asked_is_nothing_happened() -> None:
    assert fleet("step").run([]).outcomes == []
