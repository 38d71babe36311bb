"""The two policies that `Scheduler` is measured against; the same interface, chosen by `--policy`.

- `NoBatching`: first come, first served, alone, to the end.
- `RequestBatching`: what batching servers do with whole requests (Triton's dynamic batcher, TorchServe): whoever waits
  when the engine is free, of the same shape and step count, is run to the end together; nobody joins or leaves.
"""

from __future__ import annotations

from collections.abc import Iterable

from cdm_serve.costs import STAGES, TEXT, CostModel, Stage
from cdm_serve.scheduler import Scheduler
from cdm_serve.tasks import Call, Task


class RequestBatching(Scheduler):
    """Whole requests, oldest first, in groups of up to `max_batch`; deadlines, priorities and `auto` are not seen.

    Every deadline is accepted, however late the picture will be.
    """

    def __init__(self, costs: CostModel, max_batch: int, aging_s: float = 5.0) -> None:
        super().__init__(costs, max_batch, aging_s)
        self._group: list[int] = []

    def excess(self, task: Task, now: float) -> float:
        """0: nobody is refused."""
        del now
        task.planned = task.steps
        return 0.0

    def schedule(self, now: float, stages: Iterable[Stage] = STAGES) -> Call | None:
        """The next call of the group in work; a new group when that has ended."""
        self._group = [id for id in self._group if id in self._tasks]
        if not self._group:
            waiting = sorted(
                (t for t in self._tasks.values() if t.arrival <= now), key=lambda t: (t.arrival, t.id)
            )
            if not waiting:
                return None
            alike = [t.id for t in waiting if (t.bucket, t.steps) == (waiting[0].bucket, waiting[0].steps)]
            self._group = alike[: self.max_batch]
        members = [self._tasks[id] for id in self._group]
        newcomers = [task for task in members if not task.encoded]
        members = newcomers or members
        stage = members[0].stage
        if stage not in set(stages) or any(task.running for task in members):
            return None
        for task in members:
            task.running = True
        bucket = TEXT if stage == "encode" else members[0].bucket
        return Call(stage, bucket, tuple(t.id for t in members), tuple(t.left for t in members))


class NoBatching(RequestBatching):
    """One picture at a time."""

    def __init__(self, costs: CostModel, max_batch: int, aging_s: float = 5.0) -> None:
        del max_batch
        super().__init__(costs, 1, aging_s)


POLICIES: dict[str, type[Scheduler]] = {
    "step": Scheduler,
    "request": RequestBatching,
    "none": NoBatching,
}
"""`--policy` → class."""
