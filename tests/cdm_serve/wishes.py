"""Drawn requests, and a scheduler that serves them on a virtual clock."""

from __future__ import annotations

from dataclasses import dataclass
from math import inf

from hypothesis import strategies as st

from cdm_serve.baselines import POLICIES
from cdm_serve.costs import TEXT, CostModel
from cdm_serve.scheduler import Scheduler
from cdm_serve.tasks import Call, Task

BUCKETS = ("small", "large")
POLICY = st.sampled_from(sorted(POLICIES))


def costs_of(
    encode: float = 0.1, call: float = 1.0, each: float = 0.2, decode: float = 0.5, most: int = 8
) -> CostModel:
    """c(batch) = call + each·batch for a step; a decode call costs `decode` per picture."""
    costs = CostModel()
    for batch in (1, most):
        costs.record("encode", TEXT, batch, encode)
        for bucket in BUCKETS:
            costs.record("denoise", bucket, batch, call + each * batch)
            costs.record("decode", bucket, batch, decode * batch)
    return costs


@dataclass(frozen=True)
class Wish:
    """One picture asked for, and when its client leaves (never: infinity)."""

    arrival: float = 0.0
    steps: int = 4
    bucket: str = "small"
    patience: float = inf
    priority: int = 0
    min_steps: int | None = None
    encoded: bool = False
    leaves: float = inf

    def task(self, id: int) -> Task:
        return Task(
            id, self.bucket, self.steps, self.arrival, self.arrival + self.patience, self.priority,
            self.min_steps, self.encoded,
        )  # fmt: skip


@st.composite
def wishes(draw: st.DrawFn, leaving: bool = False) -> list[Wish]:
    times = st.integers(0, 40).map(lambda tenths: tenths / 2)
    made = []
    for _ in range(draw(st.integers(1, 20))):
        steps = draw(st.integers(1, 8))
        made.append(
            Wish(
                arrival=draw(times), steps=steps, bucket=draw(st.sampled_from(BUCKETS)),
                patience=draw(st.sampled_from([inf, 2.0, 8.0, 30.0])), priority=draw(st.integers(0, 2)),
                min_steps=draw(st.none() | st.integers(1, steps)), encoded=draw(st.booleans()),
                leaves=draw(times) if leaving and draw(st.booleans()) else inf,
            )
        )  # fmt: skip
    return sorted(made, key=lambda wish: wish.arrival)


Log = list[tuple[float, Call, tuple[int, ...], float]]
"""(start, call, who finished by it, end)."""


def simulate(asked: list[Wish], scheduler: Scheduler, until: float = inf) -> Log:
    """One engine on a virtual clock; calls last what the cost model says."""
    log: Log = []
    now, at = 0.0, 0
    gone: set[int] = set()
    while (at < len(asked) or len(scheduler)) and now < until:
        while at < len(asked) and asked[at].arrival <= now:
            scheduler.add(asked[at].task(at))
            at += 1
        for id, wish in enumerate(asked[:at]):
            if wish.leaves <= now and id not in gone:
                gone.add(id)
                scheduler.cancel(id)
        call = scheduler.schedule(now)
        if call is None:
            assert len(scheduler) == 0, "pictures wait and the engine is idle"
            if at == len(asked):
                break
            now = asked[at].arrival
            continue
        end = now + scheduler.costs.seconds(call.stage, call.bucket, len(call.ids))
        log.append((now, call, scheduler.postprocess(call, end), end))
        now = end
    return log


def finished_at(log: Log) -> dict[int, float]:
    return {id: end for _, _, finished, end in log for id in finished}
