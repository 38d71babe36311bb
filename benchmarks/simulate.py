"""`cdm-bench simulate`: the server's own schedulers on a virtual clock, for one replica or a thousand.

    cdm-bench simulate --replicas 1000 --router two --duration 5 --rates 0.8x,1.1x
    cdm-bench simulate --costs http://127.0.0.1:8000 --trace monday.csv --rates recorded,1.2x

The policies, their cost model, the admission of deadlines and the queue's limit are the server's; calls last what a
cost table says. Not simulated: image encoding, HTTP and the network, what a server does between two calls, cached
embeddings (every text is encoded), clients that leave or try again. Real latencies are longer by all of these.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import Field

from benchmarks.cost_tables import built_in, cost_model, find_costs, save_costs
from benchmarks.load import (
    VARIANTS,
    LoadSettings,
    Mix,
    alone,
    capacity,
    check_sizes,
    for_variant,
    make_trace,
    mix_of,
    rates_of,
    span,
)
from benchmarks.outcomes import KNEE, codes, in_time, knees, mean_size, summary
from benchmarks.plots import plot_sweep
from benchmarks.report import show
from benchmarks.virtual import Fleet, Stay
from cdm_serve.baselines import POLICIES
from cdm_serve.costs import CostModel
from engines.call_costs import CostTable

DEFAULT_STEPS = 4


class SimulateSettings(LoadSettings, env_prefix="CDM_BENCH_SIMULATE_"):
    """Serve a trace on a virtual clock by the server's own schedulers, and compare the policies."""

    costs: str = Field(
        "gpu-like",
        description=f"what calls take: {', '.join(built_in())}; a JSON file; the URL of a running server, which has "
        "measured it; measure: start one",
    )
    save_costs: Path | None = Field(None, description="JSON file to keep those costs in")
    replicas: int = Field(1, ge=1, le=100_000, description="servers behind the router")
    router: Literal["round-robin", "least", "two"] = Field(
        "least",
        description="who gets the next picture: in turn, the least predicted backlog, the lesser of two drawn",
    )
    admit: bool = Field(True, description="refuse deadlines that cannot be met")
    overlap: bool = Field(False, description="decode beside denoising, at no price to it")
    jitter: float = Field(
        0.0, ge=0, le=2, description="deviation of the logarithm of calls' times from the table"
    )
    jobs: int = Field(1, ge=1, le=1024, description="processes that share the runs; the figures are the same")
    out: Path | None = Field(None, description="folder for plots; none: no plots")


@dataclass(frozen=True)
class _Job:
    settings: SimulateSettings
    table: CostTable
    mix: Mix
    slos: tuple[float, ...]
    variant: str
    rate: float


def run(settings: SimulateSettings) -> int:
    """Simulate and print."""
    table = find_costs(settings.costs)
    if settings.save_costs is not None:
        save_costs(table, settings.save_costs)
    costs = cost_model(table)
    mix = mix_of(settings, DEFAULT_STEPS, table.sizes)
    unloaded = alone(costs, mix)
    slos = (*(slo / 1e3 for slo in settings.slo_ms), 2 * unloaded)
    predicted = settings.replicas * capacity(costs, mix, settings.max_batch)
    jobs = [
        _Job(settings, table, mix, slos, variant, rate)
        for rate in rates_of(settings, predicted)
        for variant in settings.variants
    ]
    began = time.perf_counter()
    rows = _all(jobs)
    details = [row.pop("details") for row in rows]
    if settings.out is not None:
        plot_sweep(rows, settings.out, f"simulated: {settings.replicas} × {table.name}")
    show(
        "simulate",
        rows,
        costs={"name": table.name, "source": table.source},
        details=details,
        knees=knees(details),
        knee_share=KNEE,
        predicted_capacity=round(predicted, 3),
        unloaded_ms=round(unloaded * 1e3, 3),
        steps=mix.steps,
        sizes=[f"{width}x{height}" for width, height in mix.sizes],
        settings=settings.model_dump(mode="json"),
        not_simulated="image encoding, HTTP, network, time between calls, cached embeddings, clients that leave",
        seconds=round(time.perf_counter() - began, 3),
    )
    return 0


def _all(jobs: list[_Job]) -> list[dict[str, Any]]:
    processes = min(jobs[0].settings.jobs, len(jobs))
    if processes == 1:
        return [simulate(job) for job in jobs]
    with ProcessPoolExecutor(processes, get_context("spawn")) as pool:
        return list(pool.map(simulate, jobs))


def simulate(job: _Job) -> dict[str, Any]:
    """One variant at one rate: its row."""
    settings, variant = job.settings, VARIANTS[job.variant]
    costs: CostModel = cost_model(job.table)
    trace = make_trace(settings, job.mix, job.rate)
    warmup, duration = span(settings, trace)
    check_sizes([(arrival.width, arrival.height) for arrival in trace], job.table.sizes)
    fleet = Fleet(
        [POLICIES[variant.policy](costs, settings.max_batch) for _ in range(settings.replicas)],
        settings.router,
        admit=settings.admit,
        queue_limit=settings.queue_limit,
        overlap=settings.overlap,
        jitter=settings.jitter,
        seed=settings.seed,
        measured=(warmup, warmup + duration),
    )
    run = fleet.run(for_variant(trace, variant, settings))
    outcomes = [outcome for outcome in run.outcomes if outcome.at >= warmup]
    which = {"variant": variant.name, "rate /s": round(job.rate, 3)}
    return {
        **which,
        **summary(outcomes, duration, job.slos),
        "batch": mean_size(run.batches["denoise"]),
        "utilisation": round(run.busy / run.lanes / duration, 3),
        "details": {
            **which,
            "not_served": codes(outcomes),
            "in_time": in_time(outcomes, job.slos),
            **promises([stay for stay in run.stays if stay.arrival >= warmup]),
            "batches": {stage: dict(sorted(sizes.items())) for stage, sizes in run.batches.items()},
            "warmup": summary(
                [outcome for outcome in run.outcomes if outcome.at < warmup], warmup or 1.0, job.slos
            ),
        },
    }


def promises(stays: Sequence[Stay]) -> dict[str, Any]:
    """What became of accepted deadlines: the share that broke, and how long pictures took by what was predicted.

    Real over predicted stays by quantile: 1 at all of them would be a perfect prediction, above 1 is an optimistic one.
    """
    if not stays:
        return {}
    ratios = [stay.real / stay.predicted for stay in stays]
    quantiles = np.quantile(ratios, [0.05, 0.5, 0.95, 0.99])
    return {
        "deadlines_accepted": len(stays),
        "deadlines_broken": round(sum(stay.real > stay.deadline for stay in stays) / len(stays), 5),
        "real_by_predicted": dict(zip(("p5", "p50", "p95", "p99"), quantiles.round(3).tolist(), strict=True)),
    }
