"""Laws of the predictions: the cap is the best there is, and nobody is promised more than the engine can do."""

from __future__ import annotations

from math import inf

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cdm_serve.costs import TEXT, CostModel
from cdm_serve.forecast import BROKEN, MOST, Forecast
from cdm_serve.tasks import Task

ENCODE, CALL, EACH, DECODE = 0.1, 1.0, 0.2, 0.5


def forecast(max_batch: int = 4) -> Forecast:
    costs = CostModel()
    for batch in range(1, max_batch + 1):
        costs.record("encode", TEXT, batch, ENCODE)
        costs.record("denoise", "x", batch, CALL + EACH * batch)
        costs.record("decode", "x", batch, DECODE * batch)
    return Forecast(costs, max_batch)


def task(id: int, steps: int, deadline: float, least: int | None, done: int, encoded: bool) -> Task:
    made = Task(id, "x", steps, 0.0, deadline, min_steps=least, encoded=encoded or done > 0)
    made.planned, made.done = steps, min(done, steps)
    made.live = deadline < inf
    return made


TASKS = st.lists(
    st.builds(
        lambda steps, deadline, least, done, encoded: task(
            0, steps, deadline, least and min(least, steps), done, encoded
        ),
        st.integers(1, 8), st.sampled_from([inf, 2.0, 5.0, 9.0, 20.0, 40.0]), st.none() | st.integers(1, 8),
        st.integers(0, 8), st.booleans(),
    ),
    min_size=1, max_size=12,
)  # fmt: skip


@given(TASKS, st.integers(1, 8), st.integers(1, 9), st.floats(0, 3))
def test_cap_is_the_highest_under_which_the_most_deadlines_hold(
    order: list[Task], top: int, first: int, busy: float
) -> None:
    made = forecast()
    made.look(len(order), sum(task.steps for task in order), 0.0)

    def met(cap: int) -> int:
        finishes = list(made.finishes(made.rows(order), busy, cap))
        return sum(finish <= task.deadline < inf for finish, task in zip(finishes, order, strict=True))

    best = max(met(cap) for cap in range(1, top + 1))
    expected = max(cap for cap in range(1, top + 1) if met(cap) == best)
    assert made.cap(made.rows(order), 0.0, busy, first, top) == expected


@given(TASKS, st.integers(1, 9))
def test_nobody_is_finished_before_its_own_calls_have_run(order: list[Task], cap: int) -> None:
    made = forecast()
    made.look(len(order), sum(task.steps for task in order), 0.0)
    finishes = list(made.finishes(made.rows(order), 0.5, cap))
    left = [min(max(min(cap, task.steps) - task.done, task.fewest), task.left) for task in order]
    for steps, finish in zip(left, finishes, strict=True):
        assert finish >= 0.5 + steps * (CALL + EACH) + DECODE - 1e-9
    assert finishes == sorted(finishes) or len(set(left)) > 1  # who has fewer steps may overtake


def test_step_that_runs_is_not_counted_again() -> None:
    made = forecast()
    made.look(1, 4, 0.0)
    running = task(1, 4, inf, None, 1, True)
    waiting = list(made.finishes(made.rows([running]), 0.0, 8))
    running.running = True
    assert waiting[0] - next(made.finishes(made.rows([running]), 0.0, 8)) == pytest.approx(CALL + EACH)


def test_others_calls_between_two_steps_are_counted() -> None:
    """Four pictures of two steps: at every step two of them leave, and two more are encoded."""
    made, lone = forecast(), forecast()
    lone.look(1, 2, 0.0)
    made.look(4, 8, 0.0)
    picture = task(1, 2, inf, None, 0, True)
    alone = next(lone.finishes(lone.rows([picture]), 0.0, 8))
    among = next(made.finishes(made.rows([picture]), 0.0, 8))
    assert alone == pytest.approx(2 * (CALL + EACH) + DECODE)
    # Three others, two steps each: one and a half of them come and go per step.
    between = 1.5 * (ENCODE / 4 + DECODE)
    assert among == pytest.approx(2 * (CALL + 4 * EACH + between) + DECODE)


def test_stretch_grows_until_the_allowed_share_breaks() -> None:
    made = forecast()
    for i in range(1000):
        made.learn(i % round(1 / BROKEN) == 0, arrival=i, now=i + 0.5)
    steady = made.stretch
    assert steady < 1.21
    for i in range(1000, 1003):
        made.learn(True, arrival=i, now=i + 0.5)
    assert made.stretch > steady + 0.25
    for i in range(10_000):
        made.learn(False, arrival=2000 + i, now=2000.5 + i)
    assert made.stretch == 1.0


def queue_ends(made: Forecast, now: float) -> float:
    """Seconds until the last of forty pictures of four steps should be finished."""
    order = [task(i, 4, inf, None, 0, True) for i in range(40)]
    made.look(len(order), 160, now)
    return list(made.finishes(made.rows(order), 0.0, 8))[-1]


def test_predictions_grow_to_twice_and_no_further() -> None:
    made = forecast(max_batch=1)
    before = queue_ends(made, 10_000.0)
    for i in range(100):
        made.learn(True, arrival=10_000.0 + i / 50, now=10_000.01 + i / 50)
        made.spent(5.0, 1.0)
    assert made.stretch == MOST == 2.0
    assert queue_ends(made, 10_000.0) == pytest.approx(2 * before)


def test_those_that_one_pause_makes_late_are_one_lesson() -> None:
    made, lone = forecast(), forecast()
    lone.learn(True, arrival=0.0, now=1.0)
    for i in range(10):
        made.learn(True, arrival=i / 20, now=1.0 + i / 100)
    assert made.stretch == lone.stretch > 1.0
    made.learn(True, arrival=1.5, now=2.0)  # let in after that
    assert made.stretch > lone.stretch


def test_what_calls_that_are_not_full_cost_is_counted_for_the_queue() -> None:
    made = forecast()
    before = queue_ends(made, 0.0)
    for _ in range(400):
        made.spent(1.5, 1.0)
    assert queue_ends(made, 0.0) == pytest.approx(1.5 * before, rel=0.01)
    for _ in range(400):
        made.spent(0.5, 1.0)  # whatever was measured wrongly: nothing is better than full calls
    assert queue_ends(made, 0.0) == pytest.approx(before, rel=0.01)
