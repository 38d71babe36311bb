"""Laws of traces: as many as were asked for, bunched as they say, the same for the same seed, and kept by a file."""

from __future__ import annotations

from math import inf
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.arrivals import TIMES, Arrival, Times, draw, length, read_trace, stretched
from engines.cli import UsageError
from tests.benchmarks.traces import write_trace

KINDS = pytest.mark.parametrize("kind", sorted(TIMES))


def times_of(kind: str, rate: float = 50.0, duration: float = 400.0, seed: int = 0) -> Times:
    return TIMES[kind](rate, duration, np.random.default_rng(seed))


def dispersion(times: Times, window: float = 2.0, duration: float = 400.0) -> float:
    """Variance over mean of the counts in windows: 1 for a Poisson process."""
    counts, _ = np.histogram(times, np.arange(0, duration + window, window))
    return float(counts.var() / counts.mean())


@KINDS
def test_times_rise_within_the_duration_at_the_rate(kind: str) -> None:
    times = times_of(kind)
    assert np.all(np.diff(times) >= 0)
    assert times[0] >= 0
    assert times[-1] <= 400
    assert len(times) / 400 == pytest.approx(50, rel=0.15 if kind == "bursty" else 0.03)


@KINDS
def test_equal_seeds_give_equal_times_and_others_others(kind: str) -> None:
    assert np.array_equal(times_of(kind, seed=3), times_of(kind, seed=3))
    assert not np.array_equal(times_of(kind, seed=3)[:50], times_of(kind, seed=4)[:50])


def test_only_poisson_is_not_bunched() -> None:
    assert dispersion(times_of("poisson")) == pytest.approx(1, abs=0.3)
    assert dispersion(times_of("bursty")) > 5


def test_day_is_busiest_after_a_quarter_and_quietest_after_three() -> None:
    quarters, _ = np.histogram(times_of("diurnal"), [0, 50, 150, 250, 350, 400])
    assert quarters[1] > 1.3 * quarters[2] > 1.3 * 1.3 * quarters[3]


def test_no_time_is_no_arrival() -> None:
    assert all(len(times_of(kind, rate=0.001, duration=0.001)) == 0 for kind in TIMES)


def test_every_mixed_step_count_and_size_is_drawn_as_often() -> None:
    trace = draw(times_of("poisson"), [1, 4], [(64, 64), (128, 64)], np.random.default_rng(0))
    for chosen in ((item.steps == 4) for item in trace), ((item.width == 64) for item in trace):
        assert sum(chosen) / len(trace) == pytest.approx(0.5, abs=0.02)


ARRIVALS = st.builds(
    lambda at, steps, fewer, width, deadline, priority: Arrival(
        at / 1e3, steps, width, 64, deadline / 1e3, None if fewer is None else min(fewer, steps), priority
    ),
    st.integers(0, 10**6), st.integers(1, 8), st.none() | st.integers(1, 8), st.sampled_from([64, 128]),
    st.just(inf) | st.integers(1, 10**5), st.integers(0, 9),
)  # fmt: skip


@settings(deadline=None)
@given(st.lists(ARRIVALS, min_size=1, max_size=20))
def test_file_keeps_a_trace_from_its_first_arrival_on(
    tmp_path_factory: pytest.TempPathFactory, trace: list[Arrival]
) -> None:
    path = tmp_path_factory.mktemp("trace") / "trace.csv"
    write_trace(path, trace)
    wanted = sorted(trace, key=lambda item: item.at)
    found = read_trace(path)
    assert [item.at for item in found] == pytest.approx([item.at - wanted[0].at for item in wanted])
    kept = ("steps", "width", "height", "min_steps", "priority")
    assert [[getattr(item, name) for name in kept] for item in found] == [
        [getattr(item, name) for name in kept] for item in wanted
    ]
    assert [item.deadline for item in found] == pytest.approx([item.deadline for item in wanted])


def test_stretched_trace_has_the_rate_and_the_same_pictures() -> None:
    trace = draw(times_of("bursty", duration=20), [1, 2], [(64, 64)], np.random.default_rng(0))
    faster = stretched(trace, 500.0)
    assert len(faster) / length(faster) == pytest.approx(500)
    assert [item.steps for item in faster] == [item.steps for item in trace]


def test_optional_columns_may_be_missing(tmp_path: Path) -> None:
    path = tmp_path / "trace.csv"
    path.write_text("arrival_s,steps,width,height\n1.5,4,128,64\n", encoding="utf-8")
    assert read_trace(path) == [Arrival(0.0, 4, 128, 64)]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("arrival_s,steps,width\n", "has no column height"),
        ("arrival_s,steps,width,height,colour\n", "unknown column 'colour'"),
        ("arrival_s,steps,width,height\n", "holds no arrival"),
        (
            "arrival_s,steps,width,height\n0,four,64,64\n",
            "line 2: steps='four' must be a whole number of at least 1",
        ),
        ("arrival_s,steps,width,height\n0,0,64,64\n", "steps='0' must be"),
        ("arrival_s,steps,width,height\n-1,1,64,64\n", "arrival_s='-1' must be a number of at least 0"),
        ("arrival_s,steps,width,height\nnan,1,64,64\n", "arrival_s='nan'"),
        ("arrival_s,steps,width,height\n0,1,64,inf\n", "height='inf'"),
        ("arrival_s,steps,width,height,min_steps\n0,1,64,64,2\n", "min_steps=2 exceeds steps=1"),
        ("arrival_s,steps,width,height\n0,1,64,64,7\n", "line 2 has more cells than columns"),
    ],
)
def test_file_that_is_no_trace_is_told_with_its_line(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "trace.csv"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(UsageError) as raised:
        read_trace(path)
    assert message in str(raised.value)


def test_missing_file_is_told(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"no-such\.csv cannot be read"):
        read_trace(tmp_path / "no-such.csv")
