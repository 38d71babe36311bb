"""The figures: goodput, quantiles and batch sizes of outcomes that are known."""

from __future__ import annotations

import pytest
from prometheus_client import CollectorRegistry, Histogram, generate_latest

from benchmarks.outcomes import Outcome, codes, in_time, knee, mean_size, quantiles, summary
from benchmarks.scrape import NOTHING, BatchSizes


def test_goodput_counts_only_what_was_served_in_time() -> None:
    outcomes = [
        Outcome(0.0, "served", 0.2, 4),
        Outcome(0.1, "served", 0.3, 1),
        Outcome(0.2, "refused", 0.001, code="queue_full"),
        Outcome(0.3, "failed", 0.002, code="no_picture"),
    ]
    row = summary(outcomes, duration=2.0, slos=[1.0, 0.2])
    assert (row["offered"], row["served"], row["refused"], row["failed"]) == (4, 2, 1, 1)
    assert row["≤200 ms /s"] == 0.5
    assert row["≤1000 ms /s"] == 1.0
    assert row["p50 ms"] == 250.0  # of the two that were served: a quick refusal is no fast picture
    assert row["steps"] == 2.5
    assert codes(outcomes) == {"no_picture": 1, "queue_full": 1}


def test_nothing_served_has_no_latency() -> None:
    row = summary([Outcome(0.0, "refused", 0.1)], 1.0, [1.0])
    assert row["p50 ms"] is None
    assert row["steps"] is None
    assert row["≤1000 ms /s"] == 0.0


@pytest.mark.parametrize(("count", "known"), [(1, 0), (2, 1), (20, 2), (99, 2), (100, 3), (1000, 4)])
def test_quantile_needs_a_value_beyond_it(count: int, known: int) -> None:
    assert sum(value is not None for value in quantiles([1.0] * count).values()) == known


def exposed(batches: list[int]) -> str:
    registry = CollectorRegistry()
    histogram = Histogram("cdm_batch_size", "…", ["stage"], buckets=(1, 2, 4, 8), registry=registry)
    for batch in batches:
        histogram.labels("denoise").observe(batch)
        histogram.labels("encode").observe(1)
    return generate_latest(registry).decode()


def test_batch_sizes_are_those_since_the_first_look() -> None:
    before, after = BatchSizes.read(exposed([1, 8])), BatchSizes.read(exposed([1, 8, 1, 2, 3, 4, 4, 9]))
    assert after.since(before).histogram() == {"1": 1, "2": 1, "3-4": 3, "9+": 1}
    assert after.since(before).mean == pytest.approx(23 / 6, abs=1e-3)
    assert before.plus(after.since(before)) == after
    assert BatchSizes.read("").histogram() == {}
    assert NOTHING.mean is None


def test_mean_size_weighs_by_calls() -> None:
    assert mean_size({1: 3, 5: 1}) == 2.0
    assert mean_size({}) is None


def test_share_in_time_counts_everything_that_was_asked_for() -> None:
    outcomes = [Outcome(0.0, "served", 0.2), Outcome(0.1, "served", 0.3), Outcome(0.2, "refused", 0.001)]
    assert in_time(outcomes, [0.25, 1.0]) == {
        "≤250 ms": pytest.approx(1 / 3),
        "≤1000 ms": pytest.approx(2 / 3),
    }


@pytest.mark.parametrize(
    ("points", "expected"),
    [
        ([(10.0, 1.0), (20.0, 0.9)], 15.0),  # half of the way down to 0.95
        ([(20.0, 0.9), (10.0, 1.0), (30.0, 1.0)], 15.0),  # what comes after the first drop is luck
        ([(10.0, 0.9)], 0.0),
        ([(10.0, 0.99), (20.0, 0.96)], 20.0),
    ],
)
def test_knee_is_where_the_curve_first_falls_below_the_share(
    points: list[tuple[float, float]], expected: float
) -> None:
    assert knee(points, 0.95) == pytest.approx(expected)
