"""`cdm-bench serve`: real servers under open-loop load, a sweep of rates past saturation, policy beside policy.

    cdm-bench serve --rounds 3 --out runs/load
    cdm-bench serve --engine fake --fake-costs benchmarks/costs/gpu-like.json --duration 10

A server per `--policy` is started and warmed up. In every round and at every rate each variant gets the same trace, one
after the other, in an order that rotates, so that whatever else the machine does falls on all alike. docs/load.md says
what the figures mean.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping
from contextlib import ExitStack
from itertools import chain
from pathlib import Path
from typing import Literal, Self

import httpx
import numpy as np
from pydantic import Field, model_validator

from benchmarks.blocks import Blocks
from benchmarks.cost_tables import cost_model, costs_of_server
from benchmarks.load import VARIANTS, LoadSettings, capacity, key_headers, rates_of
from benchmarks.openloop import transport
from benchmarks.outcomes import KNEE, knees
from benchmarks.plots import plot_sweep
from benchmarks.report import show
from benchmarks.server import Server, flags_of
from benchmarks.sweep import Sweep, fetch_info, progress

START_TIMEOUT_S = 600.0
"""Compiling a large model for a GPU takes minutes."""
DEFAULT_MAX_STEPS = 8
OF_STARTED_SERVERS = ("bundle", "engine", "precision", "threads", "fake_costs", "max_batch", "queue_limit")


class ServeBenchSettings(LoadSettings, env_prefix="CDM_BENCH_SERVE_"):
    """Start a server per policy, drive all with the same open-loop traces, and compare them."""

    url: str | None = Field(None, description="a running server to drive instead; none: start one per policy")
    bundle: Path | None = Field(None, description="bundle to serve; none: the bundled model")
    engine: str = Field("auto", description="runtime of the started servers")
    precision: str = Field("auto", description="arithmetic of the started servers")
    threads: int = Field(0, ge=0, le=1024, description="threads of each server's runtime; 0: it chooses")
    fake_costs: Path | None = Field(None, description="with --engine fake: cost table that it serves by")
    rounds: int = Field(
        3, ge=1, le=1000, description="times that the sweep is run, each with traces of its own"
    )
    format: Literal["png", "jpeg", "webp"] = Field("png", description="image format asked for")
    timeout_s: float = Field(60.0, gt=0, le=3600, description="seconds after which a request has failed")
    out: Path = Field(Path("runs/load"), description="folder for requests.csv, serve.json and plots")

    @model_validator(mode="after")
    def _a_running_server_has_its_policy(self) -> Self:
        if self.url is None:
            return self
        for name in OF_STARTED_SERVERS:
            if getattr(self, name) != type(self).model_fields[name].default:
                raise ValueError(
                    f"--{name.replace('_', '-')}={getattr(self, name)} is for servers to be started, but "
                    f"--url={self.url} is already running; leave one of them out"
                )
        for variant in self.variants:
            if VARIANTS[variant].policy != "step":
                raise ValueError(
                    f"--variants={variant} is a policy that a server is started with, but --url={self.url} is already "
                    "running; give --variants step,step+deadline,step+auto or some of them"
                )
        return self


def run(settings: ServeBenchSettings) -> int:
    """Measure and print; the exit code is 1 if a request failed (a refusal is no failure)."""
    settings.out.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        policies = dict.fromkeys(VARIANTS[name].policy for name in settings.variants)
        urls = {
            policy: settings.url or stack.enter_context(_server(settings, policy)).url for policy in policies
        }
        return asyncio.run(_measure(settings, urls))


def _server(settings: ServeBenchSettings, policy: str) -> Server:
    given = {
        "policy": policy,
        "engine": settings.engine,
        "precision": settings.precision,
        "threads": settings.threads,
        "max-batch": settings.max_batch,
        "queue-limit": settings.queue_limit,
        "max-images": 1,  # else --queue-limit could not be small
        "max-steps": max([DEFAULT_MAX_STEPS, *settings.steps]),
        "log-level": "warning",
        "bundle": settings.bundle,
        "fake-costs": settings.fake_costs,
    }
    return Server(flags_of(given), timeout_s=START_TIMEOUT_S)


async def _measure(settings: ServeBenchSettings, urls: Mapping[str, str]) -> int:
    async with httpx.AsyncClient(
        transport=transport(), timeout=settings.timeout_s, trust_env=False, headers=key_headers()
    ) as client:
        first = next(iter(urls.values()))
        info = await fetch_info(client, first)
        sweep = Sweep(client, urls, info, settings, settings.format)
        table = await asyncio.to_thread(costs_of_server, first)
        predicted = capacity(cost_model(table), sweep.mix, info["engine"]["max_batch"])
        unloaded = {policy: await sweep.unloaded(policy) for policy in urls}
        with Blocks(settings.out / "requests.csv") as blocks:
            for planned in sweep.plan(rates_of(settings, predicted), settings.rounds):
                block = await sweep.block(*planned)
                blocks.add(block)
                progress(block, settings.rounds)
    alone = float(np.median(list(chain.from_iterable(unloaded.values()))))
    rows, details = blocks.rows(settings.variants, [*(slo / 1e3 for slo in settings.slo_ms), 2 * alone])
    engine = info["engine"]
    plot_sweep(rows, settings.out, f"{info['model']} on {engine['runtime']} {engine['precision']}")
    facts = {
        "model": info["model"],
        "engine": engine,
        "predicted_capacity": round(predicted, 3),
        "unloaded_p50_ms": {
            name: round(float(np.median(times)) * 1e3, 3) for name, times in unloaded.items()
        },
        "steps": sweep.mix.steps,
        "sizes": [f"{width}x{height}" for width, height in sweep.mix.sizes],
        "knees": knees(details),
        "knee_share": KNEE,
        "details": details,
        "costs": [row.model_dump(exclude_none=True) for row in table.rows],
        "settings": settings.model_dump(mode="json"),
    }
    (settings.out / "serve.json").write_text(
        json.dumps({"rows": rows, **facts}, ensure_ascii=False) + "\n", "utf-8"
    )
    show("serve", rows, **facts)
    return int(any(row["failed"] for row in rows))
