"""The cost model: between measurements a line, and the batch under which a queue leaves soonest."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cdm_serve.costs import EQUAL, NEWEST, TEXT, CostModel


def curve(*points: tuple[int, float]) -> CostModel:
    return CostModel.of([("denoise", "x", batch, seconds) for batch, seconds in points])


def test_unmeasured_batches_lie_on_the_line_and_beyond_it_cost_per_picture() -> None:
    costs = curve((2, 2.0), (4, 3.0))
    assert [costs.seconds("denoise", "x", batch) for batch in (1, 2, 3, 4, 8)] == [1.0, 2.0, 2.5, 3.0, 6.0]
    assert costs.seconds("denoise", "y", 1) == costs.seconds("decode", "x", 1) == 0.0


def test_cost_follows_the_load_and_survives_an_outlier() -> None:
    costs = curve((1, 1.0))
    costs.record("denoise", "x", 1, 10.0)
    assert 1.0 < costs.seconds("denoise", "x", 1) <= 1 + NEWEST + 1e-9  # as if it had been twice as long
    for _ in range(80):
        costs.record("denoise", "x", 1, 10.0)
    assert costs.seconds("denoise", "x", 1) == pytest.approx(10.0, rel=0.01)


@given(st.lists(st.floats(0.01, 10), min_size=1, max_size=8), st.integers(1, 40), st.integers(1, 8))
def test_best_batch_is_the_one_of_least_mean_wait(seconds: list[float], waiting: int, limit: int) -> None:
    costs = curve(*enumerate(seconds, start=1))
    best = costs.best_batch("denoise", "x", waiting, limit)

    def mean(batch: int) -> float:
        # The queue in batches of `batch`, each picture weighed by when its batch ends; a last, smaller batch counts
        # in proportion, as in the formula.
        return (waiting / batch + 1) * costs.seconds("denoise", "x", batch) / 2

    means = {batch: mean(batch) for batch in range(1, min(waiting, limit, len(seconds)) + 1)}
    assert best in means
    if waiting <= 4 * limit:
        assert means[best] == pytest.approx(min(means.values()))
    else:  # the largest of those as good as equal
        assert means[best] <= EQUAL * min(means.values()) * (1 + 1e-9)
        assert all(means[batch] > EQUAL * min(means.values()) * (1 - 1e-9) for batch in means if batch > best)


def test_no_batch_is_larger_than_what_was_measured() -> None:
    """A request that is served in the middle of the warm-up must not pay for compiling the rest of it."""
    assert CostModel().best_batch("denoise", "x", 100, 8) == 1
    assert curve((1, 1.0), (2, 1.1)).best_batch("denoise", "x", 100, 8) == 2


def test_warm_up_replaces_what_held_a_compilation_and_keeps_what_was_faster() -> None:
    costs = curve((1, 9.0))
    costs.record("denoise", "x", 1, 1.0, undisturbed=True)
    assert costs.seconds("denoise", "x", 1) == 1.0
    costs.record("denoise", "x", 1, 1.5, undisturbed=True)
    assert costs.seconds("denoise", "x", 1) == pytest.approx(1 + NEWEST * 0.5)


def test_rows_are_the_model() -> None:
    rows = [("encode", TEXT, 1, 0.5), ("denoise", (64, 64), 1, 1.0), ("denoise", (64, 64), 4, 2.0)]
    assert CostModel.of(rows).rows() == rows  # type: ignore[arg-type]
