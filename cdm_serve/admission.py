"""Who is let in: a permit per picture, and an honest `Retry-After` for whoever gets none."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

from cdm_serve.errors import QueueFull


class Costs:
    """Seconds of one engine call per stage, as measured: a moving average of real spans.

    The runner's thread writes, the event loop reads; single floats need no lock.
    """

    WEIGHT = 0.2
    """Of the newest span: a change of load shows within a few calls, one outlier does not."""

    def __init__(self) -> None:
        self._seconds: dict[str, float] = {}

    def record(self, stage: str, seconds: float) -> None:
        """Take one measured call of `stage` in."""
        known = self._seconds.get(stage, seconds)
        self._seconds[stage] = known + self.WEIGHT * (seconds - known)

    def seconds(self, stage: str) -> float:
        """Of one call of `stage`; 0 before any was measured."""
        return self._seconds.get(stage, 0.0)


class Permits:
    """At most `capacity` unfinished pictures. All calls come from the event loop."""

    def __init__(self, capacity: int, max_batch: int, costs: Costs) -> None:
        self.capacity = capacity
        self.in_use = 0
        self._max_batch = max_batch
        self._costs = costs
        self._leases: dict[object, tuple[int, int]] = {}

    @contextmanager
    def take(self, pictures: int, steps: int) -> Iterator[None]:
        """Hold permits for `pictures` of `steps` each.

        Raises:
            QueueFull: there are not as many left; it carries the seconds after which there should be.
        """
        if self.in_use + pictures > self.capacity:
            seconds = self.wait_for(pictures)
            raise QueueFull(
                f"{self.in_use} pictures are in work and {pictures} more exceed --queue-limit={self.capacity}; "
                f"try again in {seconds} s, or ask for fewer",
                retry_after_s=seconds,
            )
        lease = object()
        self._leases[lease] = (pictures, steps)
        self.in_use += pictures
        try:
            yield
        finally:
            self.in_use -= pictures
            del self._leases[lease]

    def wait_for(self, pictures: int) -> int:
        """Whole seconds (1 at least) until `pictures` permits should be free: the oldest requests leave first, in
        full batches, each call at its measured cost. Steps they have already run are counted again, so it rather says
        too long than too short."""
        missing = self.in_use + pictures - self.capacity
        leaving = total_steps = 0
        for count, steps in self._leases.values():
            if leaving >= missing:
                break
            leaving += count
            total_steps += count * steps
        calls = math.ceil(total_steps / self._max_batch)
        batches = math.ceil(leaving / self._max_batch)
        seconds = calls * self._costs.seconds("denoise")
        seconds += batches * (self._costs.seconds("encode") + self._costs.seconds("decode"))
        return max(1, math.ceil(seconds))
