"""Who is let in: a permit per picture, and an honest `Retry-After` for whoever gets none."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from cdm_serve.errors import QueueFull


class Permits:
    """At most `capacity` unfinished pictures. All calls come from the event loop.

    `wait_for`: seconds until that many of the pictures in work should be finished.
    """

    def __init__(self, capacity: int, wait_for: Callable[[int], float]) -> None:
        self.capacity = capacity
        self.in_use = 0
        self._wait_for = wait_for

    @contextmanager
    def take(self, pictures: int) -> Iterator[None]:
        """Hold permits for `pictures`.

        Raises:
            QueueFull: there are not as many left; it carries the seconds after which there should be.
        """
        if self.in_use + pictures > self.capacity:
            seconds = self._wait_for(self.in_use + pictures - self.capacity)
            raise QueueFull(
                f"{self.in_use} pictures are in work and {pictures} more exceed --queue-limit={self.capacity}; "
                f"try again in {max(0.001, round(seconds, 3)):g} s, or ask for fewer",
                retry_after_s=seconds,
            )
        self.in_use += pictures
        try:
            yield
        finally:
            self.in_use -= pictures
