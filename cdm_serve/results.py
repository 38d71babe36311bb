"""The same picture asked for twice is made once: finished ones are kept, and one in work is waited for.

    results.find(key)                                  # pixels, if it is kept
    flight = results.in_work(key, deadline, priority)  # or in work: flight.followers.append(reply)
    flight = results.begin(key, deadline, priority, stop)
    results.finish(flight, pixels)

A picture is its bundle (each has its own `Results`), its tokens, seed, steps and size. Lives on the event loop.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cdm_serve.errors import ServeError
from engines.base import TokenIds

Key = tuple[TokenIds, int, int, int, int]
"""(tokens, seed, steps, width, height)."""
Outcome = Any  # uint8 (height, width, 3), or a ServeError
Reply = Callable[[Outcome], None]


@dataclass(eq=False)
class Flight:
    """One picture in work, and who waits for it beside the one who began it."""

    key: Key
    deadline: float
    priority: int
    stop: Callable[[], None]
    """Ends the work; called when nobody waits any more."""
    followers: list[Reply] = field(default_factory=list)
    abandoned: bool = False
    """Whether who began it has left."""
    flying: bool = True


class Results:
    """At most `capacity` finished pictures; the least recently asked for leave first."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self._kept: OrderedDict[Key, NDArray[np.uint8]] = OrderedDict()
        self._flights: dict[Key, Flight] = {}

    def __len__(self) -> int:
        return len(self._kept)

    def find(self, key: Key) -> NDArray[np.uint8] | None:
        """The finished picture, uint8 `(height, width, 3)`, if it is kept."""
        if key in self._kept:
            self._kept.move_to_end(key)
        return self._kept.get(key)

    def in_work(self, key: Key, deadline: float, priority: int) -> Flight | None:
        """The same picture in work, if it is as urgent as this."""
        flight = self._flights.get(key)
        if flight is None or flight.deadline > deadline or flight.priority < priority:
            return None
        return flight

    def begin(self, key: Key, deadline: float, priority: int, stop: Callable[[], None]) -> Flight:
        """The picture goes to work; from now on others may wait for it."""
        flight = Flight(key, deadline, priority, stop)
        self._flights[key] = flight
        return flight

    def finish(self, flight: Flight, outcome: Outcome) -> None:
        """It is finished, or failed: keep it, and tell whoever waited for it."""
        self._land(flight)
        if not isinstance(outcome, ServeError):
            # A view would keep its whole batch.
            self._kept[flight.key] = outcome if outcome.base is None else outcome.copy()
            self._kept.move_to_end(flight.key)
            while len(self._kept) > self.capacity:
                self._kept.popitem(last=False)
        for reply in flight.followers:
            reply(outcome)

    def leave(self, flight: Flight, reply: Reply | None = None) -> None:
        """Whoever follows with `reply` (none: who began it) waits no more; the work goes on while anybody does."""
        if reply is None:
            flight.abandoned = True
        elif reply in flight.followers:
            flight.followers.remove(reply)
        if flight.flying and flight.abandoned and not flight.followers:
            self._land(flight)
            flight.stop()

    def _land(self, flight: Flight) -> None:
        flight.flying = False
        if self._flights.get(flight.key) is flight:  # not replaced by a more urgent one
            del self._flights[flight.key]
