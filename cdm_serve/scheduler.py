"""Which pictures share the next engine call. Pure policy: no clock, no threads, no arrays; the time is an argument.

    scheduler = Scheduler(max_batch=8)
    scheduler.add(Task(id=1, bucket=(128, 128), steps_left=4, arrival=0.0))
    while batch := scheduler.schedule(now):        # who takes part in the next step
        ...                                        # the engine advances batch.ids by one step
        finished = scheduler.postprocess(batch)

Policy: at every step edge the oldest picture leads, and pictures of its shape join it, oldest first, up to
`max_batch`, whatever their step counts. The oldest always takes part, so nobody starves: a picture waits at most for
the steps of those that came before it.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass


@dataclass(slots=True)
class Task:
    """One picture, as the policy sees it. `bucket`: only equal ones can share a call. `arrival`: in seconds."""

    id: int
    bucket: Hashable
    steps_left: int
    arrival: float


@dataclass(frozen=True, slots=True)
class Batch:
    """The pictures of one engine call, oldest first."""

    ids: tuple[int, ...]
    bucket: Hashable


class Scheduler:
    """Owns the order of unfinished pictures. Calls come from one thread."""

    def __init__(self, max_batch: int) -> None:
        assert max_batch >= 1
        self.max_batch = max_batch
        self._tasks: dict[int, Task] = {}

    def __len__(self) -> int:
        return len(self._tasks)

    def add(self, task: Task) -> None:
        """Take a picture in; it may join from the next `schedule` on."""
        assert task.steps_left >= 1
        assert task.id not in self._tasks
        self._tasks[task.id] = task

    def schedule(self, now: float) -> Batch | None:
        """The next batch, or None when nobody has arrived by `now`. Asking twice gives the same answer."""
        waiting = [task for task in self._tasks.values() if task.arrival <= now]
        if not waiting:
            return None
        waiting.sort(key=lambda task: task.arrival)  # stable: equal arrivals keep the order of `add`
        bucket = waiting[0].bucket
        ids = [task.id for task in waiting if task.bucket == bucket]
        return Batch(tuple(ids[: self.max_batch]), bucket)

    def postprocess(self, batch: Batch) -> tuple[int, ...]:
        """Count the step that `batch` has just run; retire and return the pictures that needed no more."""
        finished = []
        for id in batch.ids:
            task = self._tasks.get(id)
            if task is None:  # cancelled while its step ran
                continue
            task.steps_left -= 1
            if task.steps_left == 0:
                del self._tasks[id]
                finished.append(id)
        return tuple(finished)

    def cancel(self, id: int) -> int:
        """Forget a picture; returns the steps it will not run (0: it is not here any more)."""
        task = self._tasks.pop(id, None)
        return task.steps_left if task else 0
