"""How far a run is: rich's bar on a terminal, elsewhere a line a minute."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

EVERY_S = 60.0
SPEED_S = 600.0
"""The bar's speed is that of the last so many seconds: steps of large models take half a minute."""


class Bar:
    """Progress on standard error; silent unless `shown`."""

    def __init__(
        self, name: str, total: int, start: int, shown: bool = True, clock: Callable[[], float] = time.monotonic
    ) -> None:  # fmt: skip
        """`start` of `total` steps were done by earlier starts: they count as done, and not for the speed."""
        self.name, self.total, self.start, self.shown, self._clock = name, total, start, shown, clock
        self._began = self._said = clock()
        self._bar: Progress | None = None
        if shown and sys.stderr.isatty():
            columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
                       TimeRemainingColumn(), TextColumn("{task.fields[note]}"))  # fmt: skip
            console = Console(stderr=True)
            self._bar = Progress(
                *columns, console=console, refresh_per_second=1, speed_estimate_period=SPEED_S
            )
            self._task = self._bar.add_task(name, total=total, completed=start, note="")

    def __enter__(self) -> Self:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def update(self, done: int, smoothed: Mapping[str, float]) -> None:
        """`done` steps of all are done; `smoothed` losses are shown with them."""
        note = " ".join(f"{key} {value:.4g}" for key, value in smoothed.items())
        if self._bar is not None:
            self._bar.update(self._task, completed=done, note=note)
        now = self._clock()
        if self._bar is None and self.shown and (now - self._said >= EVERY_S or done == self.total):
            self._said = now
            print(
                line(self.name, done, self.total, done - self.start, now - self._began, note), file=sys.stderr
            )

    def say(self, sentence: str) -> None:
        """A line of its own."""
        if self._bar is not None:
            self._bar.console.print(sentence)
        elif self.shown:
            print(sentence, file=sys.stderr)


def line(name: str, done: int, total: int, new: int, seconds: float, note: str) -> str:
    """`runs 120/4001, 0.50 steps/s, 2:09:22 left: fake 0.31`; speed and time left are of `new` steps in `seconds`."""
    speed = new / max(seconds, 1e-9)
    left = round((total - done) / speed) if speed else 0
    text = (
        f"{name} {done}/{total}, {speed:.3g} steps/s, {left // 3600}:{left // 60 % 60:02}:{left % 60:02} left"
    )
    return f"{text}: {note}" if note else text
