"""How busy newcomers keep the engine: what of its time the pictures of the last seconds ask for.

    inflow = Inflow()
    inflow.add(seconds=0.014, at=3.0)      # a picture that will take so long in full batches came at 3.0
    inflow.share(3.5)                      # 0.0025: 14 ms in the last five seconds, and fading

Pure: the time is an argument.
"""

from __future__ import annotations

from math import exp

WINDOW_S = 5.0
"""Seconds over which the share is judged."""
PICTURES = 32
"""And at least so many pictures' own time, for a few that come together are no load."""


class Inflow:
    """Seconds of work, a moving sum that fades exponentially, over the seconds in which it came."""

    def __init__(self) -> None:
        self._work = 0.0
        self._at = 0.0
        self._each = 0.0  # what a picture takes, on average

    def add(self, seconds: float, at: float) -> None:
        """Count a picture that came `at` some time and takes so many seconds in full batches."""
        self._work = self._left(at) + seconds
        self._each += (seconds - self._each) / (PICTURES if self._each else 1)
        self._at = max(self._at, at)

    def take_back(self, seconds: float) -> None:
        """A picture that was just counted does not come after all."""
        self._work = max(0.0, self._work - seconds)

    def share(self, now: float) -> float:
        """1 is as much as the engine can do; it may be more."""
        return self._left(now) / self._window()

    def _left(self, now: float) -> float:
        return self._work * exp(min(0.0, self._at - now) / self._window())

    def _window(self) -> float:
        return max(WINDOW_S, PICTURES * self._each)
