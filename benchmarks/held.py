"""Signals held back for a moment, so that a process is not started and lost.

with held_signals():
    process = subprocess.Popen(command)

Between the fork and the assignment an interruption would leave a process that nobody knows.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

HELD = (signal.SIGINT, signal.SIGTERM)


@contextmanager
def held_signals() -> Iterator[None]:
    """What Python would do on SIGINT or SIGTERM meanwhile, it does at the end.

    A signal that is ignored or ends the process at once stays so, also in a process started meanwhile. Handlers run in
    the main thread alone: in another one nothing is held.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    came: list[int] = []

    def hold(number: int, frame: FrameType | None) -> None:
        del frame
        came.append(number)

    before = {number: handler for number in HELD if callable(handler := signal.getsignal(number))}
    for number in before:
        signal.signal(number, hold)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        for late in came:
            signal.raise_signal(late)
