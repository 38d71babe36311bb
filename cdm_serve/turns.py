"""Engines that share a device take turns on it: whoever asked first is next."""

from __future__ import annotations

from collections import deque
from threading import Lock


class Turns:
    """A lock that is given in the order in which it was asked for.

    What two engines measure of their calls while both run on the same cores is no cost of their own. A plain lock
    would let a busy engine take its next turn before the others wake up.
    """

    def __init__(self) -> None:
        self._lock = Lock()
        self._taken = False
        self._waiting: deque[Lock] = deque()

    def __enter__(self) -> None:
        with self._lock:
            if not self._taken:
                self._taken = True
                return
            mine = Lock()
            mine.acquire()
            self._waiting.append(mine)
        mine.acquire()  # until whoever is before us leaves

    def __exit__(self, *_: object) -> None:
        with self._lock:
            if self._waiting:
                self._waiting.popleft().release()
            else:
                self._taken = False
