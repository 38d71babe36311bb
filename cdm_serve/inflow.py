"""How busy newcomers keep the engine: what of its time the pictures of the last seconds ask for.

inflow = Inflow()
inflow.add(seconds=0.014, at=3.0)      # a picture that will take so long in full batches came at 3.0
inflow.share(3.5)                      # 0.0025: 14 ms in the last five seconds, and fading
"""

from __future__ import annotations

from math import exp

WINDOW_S = 5.0
"""Seconds over which the share is judged."""
PICTURES = 32
"""And at least so many pictures' own time, for a few that come together are no load."""


class Inflow:
    """A moving sum that fades exponentially. Pure: the time is an argument."""

    def __init__(self) -> None:
        self._share = 0.0
        self._at = 0.0
        self._window = WINDOW_S

    def add(self, seconds: float, at: float) -> None:
        """Count a picture that came `at` some time and takes so many seconds in full batches."""
        share = self.share(at)
        self._window = max(WINDOW_S, PICTURES * seconds)
        self._share = share + seconds / self._window
        self._at = max(self._at, at)

    def share(self, now: float) -> float:
        """1 is as much as the engine can do; it may be more."""
        return self._share * exp(min(0.0, self._at - now) / self._window)
