"""How far a run is, where no terminal shows a bar."""

from __future__ import annotations

import pytest

from training.progress import Bar, line


def told(
    capsys: pytest.CaptureFixture[str], start: int, total: int, seconds_a_step: float, shown: bool = True
) -> list[str]:
    now = [1000.0]
    with Bar("toy", total, start, shown, lambda: now[0]) as bar:
        for done in range(start + 1, total + 1):
            now[0] += seconds_a_step
            bar.update(done, {"fake": 0.25})
    captured = capsys.readouterr()
    assert captured.out == ""
    return captured.err.splitlines()


def test_a_line_a_minute_and_one_at_the_end(capsys):
    said = told(capsys, 0, 70, 4.0)
    assert [text.split(",")[0] for text in said] == [
        "toy 15/70",
        "toy 30/70",
        "toy 45/70",
        "toy 60/70",
        "toy 70/70",
    ]
    assert said[0] == "toy 15/70, 0.25 steps/s, 0:03:40 left: fake 0.25"


def test_the_time_left_is_of_this_starts_own_speed(capsys):
    said = told(capsys, 1000, 1900, 4.0)
    assert said[0] == "toy 1015/1900, 0.25 steps/s, 0:59:00 left: fake 0.25"


def test_a_process_that_is_not_the_first_is_silent(capsys):
    assert told(capsys, 0, 70, 4.0, shown=False) == []


def test_on_a_terminal_it_is_a_bar(capsys, monkeypatch):
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    said = "\n".join(told(capsys, 0, 70, 4.0))
    assert "steps/s" not in said
    assert "70/70" in said


def test_hours_are_told_and_no_step_is_no_speed():
    assert line("r", 1, 10_001, 1, 2.0, "") == "r 1/10001, 0.5 steps/s, 5:33:20 left"
    assert line("r", 7, 9, 0, 2.0, "") == "r 7/9, 0 steps/s, 0:00:00 left"
