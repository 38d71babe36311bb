"""A fleet on a virtual clock: the server's own schedulers, a cost model in the engines' place, and no time passes.

    fleet = Fleet([Scheduler(costs, 8) for _ in range(1000)], router="two")
    run = fleet.run(trace)                         # outcomes in order of arrival, batch sizes, busy seconds

What a runner does with threads and an engine happens here at events: a picture arrives, a call ends. At either, every
idle lane of the replica that it touched asks its scheduler for the next call, which lasts what the cost model says.
Image encoding, HTTP and the network take no time here, and a refused picture is not offered to another replica.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from heapq import heappop, heappush
from math import inf

import numpy as np

from benchmarks.arrivals import Arrival
from benchmarks.outcomes import Outcome
from benchmarks.routers import ROUTERS
from cdm_serve.costs import STAGES, TEXT, Stage
from cdm_serve.runner import OVERLAPPED
from cdm_serve.scheduler import Scheduler
from cdm_serve.tasks import Call, Task


@dataclass(frozen=True, slots=True)
class Run:
    """What happened: an outcome per arrival, calls by stage and batch size, seconds that lanes spent in calls."""

    outcomes: list[Outcome]
    batches: dict[Stage, Counter[int]]
    busy: float
    lanes: int
    """Lanes of all replicas together: what `busy` can be at most, per second."""
    stays: list[Stay]
    """Of pictures with a deadline that were served, in order of their ends."""


@dataclass(frozen=True, slots=True)
class Stay:
    """Seconds in the system of a picture with a deadline: as predicted when it was accepted, really, at most wished."""

    arrival: float
    predicted: float
    real: float
    deadline: float


@dataclass(slots=True, eq=False)
class _Replica:
    scheduler: Scheduler
    index: int
    idle: list[int]
    unfinished: int = field(default=0, init=False)


_End = tuple[float, int, _Replica, int, Call]
"""(when, a serial number that settles ties, whose, lane, call)."""


class Fleet:
    """Replicas behind a router. Runs once: its schedulers must be fresh, and keep what they learned.

    `router` is one of `ROUTERS`. `admit` refuses deadlines that cannot be met (`Scheduler.excess`), `queue_limit` is
    the most unfinished pictures of a replica. `overlap` gives decoding a lane of its own, at no price to the other.
    `jitter` makes calls last a log-normal factor of that deviation longer or shorter than believed, 1 on average.
    `measured`: (from, to) in seconds; batch sizes and busy seconds are counted in between.
    """

    def __init__(
        self,
        schedulers: Sequence[Scheduler],
        router: str = "least",
        *,
        admit: bool = True,
        queue_limit: int = 64,
        overlap: bool = False,
        jitter: float = 0.0,
        seed: int = 0,
        measured: tuple[float, float] = (0.0, inf),
    ) -> None:
        self._lanes = OVERLAPPED if overlap else (STAGES,)
        self._replicas = [
            _Replica(scheduler, index, list(range(len(self._lanes))))
            for index, scheduler in enumerate(schedulers)
        ]
        self._admit, self._queue_limit, self._jitter = admit, queue_limit, jitter
        self._measured = measured
        self._random = np.random.default_rng([seed, 1])
        self._route = ROUTERS[router](len(self._replicas), np.random.default_rng([seed, 2]))
        self._backlog = np.zeros(len(self._replicas))
        self._tasks: dict[int, Task] = {}
        self._predicted: dict[int, float] = {}
        self._stays: list[Stay] = []
        self._ends: list[_End] = []
        self._batches: dict[Stage, Counter[int]] = {stage: Counter() for stage in STAGES}
        self._busy = 0.0
        self._calls = 0

    def run(self, trace: Sequence[Arrival]) -> Run:
        """Serve `trace`, sorted by arrival, to the end."""
        outcomes: dict[int, Outcome] = {}
        at = 0
        while at < len(trace) or self._ends:
            now = min(self._ends[0][0] if self._ends else inf, trace[at].at if at < len(trace) else inf)
            touched: dict[_Replica, None] = {}  # in order
            while self._ends and self._ends[0][0] == now:
                _, _, replica, lane, call = heappop(self._ends)
                replica.idle.append(lane)
                touched[replica] = None
                for id in self._end(replica, call, now):
                    task = self._tasks.pop(id)
                    outcomes[id] = Outcome(task.arrival, "served", now - task.arrival, task.done)
                    if id in self._predicted:
                        limit = task.deadline - task.arrival
                        stay = Stay(task.arrival, self._predicted.pop(id), now - task.arrival, limit)
                        self._stays.append(stay)
            while at < len(trace) and trace[at].at == now:
                replica = self._replicas[self._route(self._backlog)]
                if refusal := self._offer(replica, at, trace[at]):
                    outcomes[at] = Outcome(now, "refused", 0.0, code=refusal)
                else:
                    touched[replica] = None
                at += 1
            for replica in touched:
                self._start(replica, now)
        assert not self._tasks, "the engines are idle and pictures wait"
        lanes = len(self._lanes) * len(self._replicas)
        ordered = [outcomes[id] for id in range(len(trace))]
        return Run(ordered, self._batches, self._busy, lanes, self._stays)

    def _offer(self, replica: _Replica, id: int, arrival: Arrival) -> str | None:
        """Give the picture to `replica`; the server's code for why it was refused, if it was."""
        bucket = (arrival.width, arrival.height)
        deadline = arrival.at + arrival.deadline
        task = Task(id, bucket, arrival.steps, arrival.at, deadline, arrival.priority, arrival.min_steps)
        if replica.unfinished >= self._queue_limit:
            return "queue_full"
        if self._admit and replica.scheduler.excess(task, arrival.at):
            return "deadline_infeasible"
        replica.scheduler.add(task)
        if deadline < inf:
            self._predicted[id] = replica.scheduler.predicted(task, arrival.at) - arrival.at
        replica.unfinished += 1
        self._tasks[id] = task
        self._backlog[replica.index] += (
            self._each(replica, "encode", TEXT)
            + arrival.steps * self._each(replica, "denoise", bucket)
            + self._each(replica, "decode", bucket)
        )
        return None

    def _start(self, replica: _Replica, now: float) -> None:
        for lane in sorted(replica.idle):
            call = replica.scheduler.schedule(now, self._lanes[lane])
            if call is None:
                continue
            replica.idle.remove(lane)
            seconds = replica.scheduler.costs.seconds(call.stage, call.bucket, len(call.ids))
            if self._jitter:
                seconds *= self._random.lognormal(-(self._jitter**2) / 2, self._jitter)
            begin, end = self._measured
            if begin <= now <= end:
                self._batches[call.stage][len(call.ids)] += 1
            self._busy += max(0.0, min(now + seconds, end) - max(now, begin))
            self._calls += 1
            heappush(self._ends, (now + seconds, self._calls, replica, lane, call))

    def _end(self, replica: _Replica, call: Call, now: float) -> tuple[int, ...]:
        finished = replica.scheduler.postprocess(call, now)
        replica.unfinished -= len(finished)
        done = len(call.ids) * self._each(replica, call.stage, call.bucket)
        for id in finished:  # steps that were spared were counted when it came
            task = self._tasks[id]
            done += (task.steps - task.done) * self._each(replica, "denoise", task.bucket)
        # Nothing unfinished is no backlog: sums of many small numbers may say otherwise.
        self._backlog[replica.index] = self._backlog[replica.index] - done if replica.unfinished else 0.0
        return finished

    @staticmethod
    def _each(replica: _Replica, stage: Stage, bucket: object) -> float:
        return replica.scheduler.costs.each(stage, bucket, replica.scheduler.max_batch)
