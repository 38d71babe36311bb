"""The scheduler on a virtual clock: one replica, a cost model in the engine's place, and no time passes.

    outcomes = run_replica(Scheduler(costs, 8), arrivals)

What the runner does with threads and an engine happens here in a loop: arrivals are taken in at the edges between
calls, every call lasts what the cost model says, and what is finished is noted with its time and steps.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from cdm_serve.costs import CostModel
from cdm_serve.scheduler import Scheduler
from cdm_serve.tasks import Task


@dataclass(frozen=True, slots=True)
class Outcome:
    """When a picture arrived and left, in seconds, and in how many steps."""

    id: int
    arrival: float
    finish: float
    steps: int


def run_replica(
    scheduler: Scheduler, tasks: Iterable[Task], truth: CostModel | None = None, admit: bool = False
) -> list[Outcome]:
    """Serve `tasks` (sorted by arrival) to the end. `truth`: what calls really cost, where the scheduler is wrong."""
    costs = truth or scheduler.costs
    pending: Sequence[Task] = list(tasks)
    by_id = {task.id: task for task in pending}
    outcomes: list[Outcome] = []
    now, at = 0.0, 0
    while at < len(pending) or len(scheduler):
        while at < len(pending) and pending[at].arrival <= now:
            if not admit or not scheduler.excess(pending[at], now):
                scheduler.add(pending[at])
            at += 1
        call = scheduler.schedule(now)
        if call is None:
            assert at < len(pending), "a waiting picture was not scheduled"
            now = pending[at].arrival
            continue
        now += costs.seconds(call.stage, call.bucket, len(call.ids))
        for id in scheduler.postprocess(call, now):
            outcomes.append(Outcome(id, by_id[id].arrival, now, by_id[id].done))
    return outcomes
