"""What stands between a log and a line: nothing that an eye should see may be lost on the way."""

from __future__ import annotations

import math

import pytest

from training.environment import record_start
from training.keys import COSINES, GROUPS, LATENTS, LOSSES, NORMS, OTHER, RATES, WEIGHTS, key_info
from training.report import chart
from training.report.read import Curve, Event, read_run
from training.report.series import (
    downsample,
    log_ticks,
    rates,
    smooth,
    ticks,
    working_seconds,
)
from training.report.words import compact, duration, number, size


def curve(values: list[float], every: int = 1) -> Curve:
    return Curve([every * index for index in range(len(values))], values)


def test_downsampling_keeps_extremes_ends_and_order():
    points = [(float(x), math.sin(x / 50)) for x in range(10_000)]
    points[4321] = (4321.0, 40.0)
    points[7777] = (7777.0, -50.0)
    kept = downsample(points, 100, 0, 9_999)
    assert len(kept) <= 4 * 101
    assert kept == sorted(kept)
    assert set(kept) <= set(points)
    assert {points[0], points[-1], points[4321], points[7777]} <= set(kept)
    for column in range(100):
        inside = [y for x, y in points if int(x / 9_999 * 100) == column]
        seen = [y for x, y in kept if int(x / 9_999 * 100) == column]
        assert (min(seen), max(seen)) == (min(inside), max(inside))


def test_few_points_are_all_kept():
    points = [(float(x), 1.0) for x in range(300)]
    assert downsample(points, 100, 0, 299) == points


def test_smoothing_keeps_a_constant_and_halves_noise():
    assert smooth([3.0] * 50) == pytest.approx([3.0] * 50)
    noisy = [(-1.0) ** index for index in range(4000)]
    assert max(abs(value) for value in smooth(noisy)[100:]) < 0.05
    assert smooth([5.0]) == [5.0]


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [(0, 1000, [0, 200, 400, 600, 800, 1000]), (-0.1, 0.2, [-0.1, 0, 0.1, 0.2]), (3, 3, [3])],
)
def test_ticks_are_round_numbers_within(low, high, expected):
    assert ticks(low, high, 5 if high == 1000 else 4)[: len(expected)] == pytest.approx(expected, abs=1e-12)


def test_logarithmic_ticks_lie_within_and_are_few():
    assert log_ticks(0.0009, 2) == pytest.approx([0.001, 0.01, 0.1, 1])
    assert log_ticks(1, 10) == pytest.approx([1, 2, 5, 10])
    assert 3 <= len(log_ticks(1e-12, 1e3)) <= 6


def test_work_is_counted_without_pauses_and_from_each_start():
    times = Curve(list(range(6)), [100.0, 101.0, 102.0, 5000.0, 5001.0, 5002.0])
    assert working_seconds(times) == pytest.approx(2 + 2)
    assert working_seconds(times, [95.0, 4990.0]) == pytest.approx(7 + 12)
    assert working_seconds(Curve()) == 0


def test_a_quick_resume_is_cut_out_by_its_start():
    times = Curve(list(range(6)), [100.0, 101.0, 102.0, 130.0, 131.0, 132.0])
    assert working_seconds(times) == pytest.approx(32)
    assert working_seconds(times, [99.0, 128.0]) == pytest.approx(3 + 4)


def test_rates_are_those_of_the_work_and_never_cross_a_pause():
    steady = [2.0 * index for index in range(50)]
    times = Curve(list(range(100)), [*steady, *(5000 + value for value in steady)])
    assert rates(times).values == pytest.approx([0.5] * len(rates(times).values))
    assert len(rates(times).values) == 98


@pytest.mark.parametrize(
    ("name", "group", "title"),
    [
        ("cdm", LOSSES, "CDM loss"), ("fake", LOSSES, "Fake teacher loss"), ("loss", LOSSES, "Loss"),
        ("student_norm", NORMS, "Student gradient norm"), ("dm_weight", WEIGHTS, "DM weight"),
        ("cos_ca_dm", COSINES, "Cosine of CA and DM"), ("x0_std", LATENTS, "x̂0 standard deviation"),
        ("cdm_floored", WEIGHTS, "CDM floored"), ("lr_fake", RATES, "Fake teacher learning rate"),
        ("whatever", OTHER, "Whatever"),
    ],
)  # fmt: skip
def test_a_numbers_name_says_where_it_is_drawn(name, group, title):
    key = key_info(name)
    assert (key.group, key.title) == (group, title)
    assert key.axis == ("share of samples" if "floored" in name else group.axis)
    assert key.group in GROUPS


def test_a_charts_line_runs_through_its_plot_and_tells_its_values():
    drawn = chart.draw(
        key_info("student_norm"),
        curve([1.0, 3.0, 2.0], 10),
        [Event(10, "resume", "resumed")],
        20,
        (1.5, "clip"),
    )
    first, second, third = (tuple(map(float, point.split(","))) for point in drawn.raw.split())
    assert (first[0], second[0], third[0]) == (chart.LEFT, (chart.LEFT + chart.RIGHT) / 2, chart.RIGHT)
    assert chart.TOP <= second[1] < third[1] < first[1] <= chart.BOTTOM
    assert drawn.reference.label == "clip"
    assert drawn.marks[0].x == (chart.LEFT + chart.RIGHT) / 2
    assert "between 1 and 3" in drawn.summary
    assert not drawn.logarithmic


def test_a_reference_far_from_the_values_is_left_out():
    assert chart.draw(key_info("ca_norm"), curve([0.01, 0.02]), [], 1, (1.0, "clip")).reference is None


def test_a_curve_over_decades_has_a_logarithmic_axis_and_one_spike_does_not_make_one():
    assert chart.draw(
        key_info("ca"), curve([10 ** (-index / 20) for index in range(100)]), [], 99
    ).logarithmic
    assert not chart.draw(key_info("ca"), curve([1.0] * 50 + [100.0] + [1.0] * 49), [], 99).logarithmic


@pytest.mark.parametrize("values", [[0.0], [5.0], [0.0, 0.0], [-1.0, -1.0], [1e-9, 2e-9], [-3.0, 4e8]])
def test_any_values_have_a_plot(values):
    drawn = chart.draw(key_info("ca"), curve(values), [], max(len(values) - 1, 1))
    places = [float(place) for point in drawn.raw.split() for place in point.split(",")]
    assert all(math.isfinite(place) for place in places)
    low, high = drawn.y_range
    assert low < high
    assert low <= min(values) <= max(values) <= high
    assert drawn.y_ticks


def test_starts_are_read_back_as_a_report_needs_them(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    record_start(tmp_path, 0)
    record_start(tmp_path, 7)
    assert [start["step"] for start in read_run(tmp_path).starts] == [0, 7]


def test_numbers_times_and_sizes_read_well():
    assert [number(value) for value in (12345, 0.00001234, -0.5, 2.0)] == [
        "12\u202f345",
        "1.234e-5",
        "−0.5",
        "2",
    ]
    assert [compact(value) for value in (2000, 1500, -0.5, 1e-5, 3e6)] == ["2k", "1.5k", "−0.5", "1e-5", "3M"]
    assert [duration(value) for value in (8, 848, 11_100, 100_800)] == [
        "8 s",
        "14 min 8 s",
        "3 h 5 min",
        "1 d 4 h",
    ]
    assert [size(value) for value in (12, 1500, 213_544_000)] == ["12 B", "1.5 kB", "214 MB"]
