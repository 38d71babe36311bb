"""`cdm-bench edges`: what the policy itself costs, in microseconds of CPU time, by the queue's length.

    cdm-bench edges --costs gpu-like --waiting 8,64,512

Every edge is `schedule` and `postprocess`; the engine takes no time. A finished picture is followed by a new one, so
the queue keeps its length. `fixed`: no deadlines; `auto`: all may be shortened and have a deadline that some will miss.
"""

from __future__ import annotations

import time
from itertools import count
from typing import Annotated

from pydantic import Field

from benchmarks.cost_tables import built_in, cost_model, find_costs
from benchmarks.report import show
from cdm_serve.baselines import POLICIES
from cdm_serve.scheduler import Scheduler
from cdm_serve.tasks import Task
from engines.cli import CommandSettings

STEPS = (1, 2, 4, 8)


class EdgesSettings(CommandSettings, env_prefix="CDM_BENCH_EDGES_"):
    """CPU time of the scheduler's decisions."""

    costs: str = Field(
        "gpu-like", description=f"cost table: {', '.join(built_in())}; a JSON file; a server's URL"
    )
    waiting: list[Annotated[int, Field(ge=1)]] = Field(
        [8, 64, 512], min_length=1, description="pictures in the system"
    )
    calls: int = Field(2000, ge=10, description="edges to time; a tenth as many before them are not")
    max_batch: int = Field(8, ge=1, le=256, description="pictures that one engine call may advance")


def edges(
    scheduler: Scheduler, size: tuple[int, int], waiting: int, calls: int, deadline: float | None
) -> list[float]:
    """Microseconds of CPU time of each of `calls` edges with `waiting` pictures in the system."""
    numbers, now, spent = count(), 0.0, []

    def add() -> None:
        id = next(numbers)
        steps = STEPS[id % len(STEPS)]
        if deadline is None:
            scheduler.add(Task(id, size, steps, now))
        else:
            scheduler.add(Task(id, size, steps, now, now + deadline, min_steps=1))

    for _ in range(calls):
        while len(scheduler) < waiting:
            add()
        began = time.process_time_ns()
        call = scheduler.schedule(now)
        assert call is not None
        seconds = scheduler.costs.seconds(call.stage, call.bucket, len(call.ids))
        now += seconds
        scheduler.costs.record(call.stage, call.bucket, len(call.ids), seconds)  # as every real call does
        scheduler.postprocess(call, now)
        spent.append((time.process_time_ns() - began) / 1e3)
    return spent


def run(settings: EdgesSettings) -> int:
    """Measure, print the table and the JSON line."""
    table = find_costs(settings.costs)
    costs = cost_model(table)
    each = 4 * costs.each("denoise", table.sizes[0], settings.max_batch)
    rows = []
    for waiting in settings.waiting:
        for name, policy, deadline in (
            ("request", "request", None),
            ("step, fixed", "step", None),
            ("step, auto", "step", 0.75 * waiting * each),
        ):
            scheduler = POLICIES[policy](costs, settings.max_batch)
            warm = settings.calls // 10
            spent = sorted(edges(scheduler, table.sizes[0], waiting, settings.calls + warm, deadline)[warm:])
            at = {f"p{share} µs": round(spent[len(spent) * share // 100], 1) for share in (50, 99)}
            rows.append(
                {"policy": name, "waiting": waiting, "mean µs": round(sum(spent) / len(spent), 1), **at}
            )
    show("edges", rows, costs={"name": table.name, "source": table.source}, calls=settings.calls)
    return 0
