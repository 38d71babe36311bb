"""`python -m benchmarks.edges`: what the policy itself costs, in microseconds of CPU time, by the queue's length.

    python -m benchmarks.edges --costs gpu-like --waiting 8,64,512

Every edge is `schedule` and `postprocess`; the engine takes no time. A finished picture is followed by a new one, so
the queue keeps its length. `fixed`: no deadlines; `auto`: all may be shortened and have a deadline that some will miss.
"""

from __future__ import annotations

import argparse
import time
from itertools import count

from benchmarks.cost_tables import cost_model, find_costs
from benchmarks.report import show
from cdm_serve.baselines import POLICIES
from cdm_serve.scheduler import Scheduler
from cdm_serve.tasks import Task

STEPS = (1, 2, 4, 8)


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
        now += scheduler.costs.seconds(call.stage, call.bucket, len(call.ids))
        scheduler.postprocess(call, now)
        spent.append((time.process_time_ns() - began) / 1e3)
    return spent


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--costs", default="gpu-like", help="as for cdm-bench simulate")
    parser.add_argument("--waiting", default="8,64,512", help="pictures in the system")
    parser.add_argument(
        "--calls", type=int, default=2000, help="edges to time; a tenth as many before them are not"
    )
    parser.add_argument("--max-batch", type=int, default=8)
    options = parser.parse_args()
    table = find_costs(options.costs)
    costs = cost_model(table)
    each = 4 * costs.each("denoise", table.sizes[0], options.max_batch)
    rows = []
    for waiting in map(int, options.waiting.split(",")):
        for name, policy, deadline in (
            ("request", "request", None),
            ("step, fixed", "step", None),
            ("step, auto", "step", 0.75 * waiting * each),
        ):
            scheduler = POLICIES[policy](costs, options.max_batch)
            warm = options.calls // 10
            spent = sorted(edges(scheduler, table.sizes[0], waiting, options.calls + warm, deadline)[warm:])
            at = {f"p{share} µs": round(spent[len(spent) * share // 100], 1) for share in (50, 99)}
            rows.append(
                {"policy": name, "waiting": waiting, "mean µs": round(sum(spent) / len(spent), 1), **at}
            )
    show("edges", rows, costs={"name": table.name, "source": table.source}, calls=options.calls)


if __name__ == "__main__":
    main()
