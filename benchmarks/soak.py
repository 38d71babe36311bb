"""`cdm-bench soak`: more than the server can do, for long, from callers of whom a quarter misbehave. What is left over?

    cdm-bench soak --minutes 30 --load 1.2
    cdm-bench soak --engine fake --fake-costs benchmarks/costs/epyc-2-threads.json --minutes 3

Capacity is measured first: pictures a second with a batch always in work and another waiting. Then callers arrive as a
Poisson process that asks for `--load` times as many pictures. Each is answered as it deserves (`callers.py`), or the
soak has failed; at the end nothing may be left in work, and the server must have logged nothing.
"""

from __future__ import annotations

import asyncio
import json
import sys
from collections import Counter, defaultdict
from collections.abc import Iterable
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import Field

from benchmarks.arrivals import poisson
from benchmarks.balance import COUNTED, DEPTHS, totals, trouble, unbalanced
from benchmarks.callers import GOOD, Callers
from benchmarks.report import show
from benchmarks.server import Server, ServerError, flags_of
from benchmarks.vitals import Vitals
from benchmarks.wire import Wire, get, post
from engines.cli import CommandSettings

START_TIMEOUT_S = 600.0
BODY_TIMEOUT_S = 2.0
"""The servers' `--body-timeout-s`: short, so that many bodies that never end are met in a short soak too."""
EMBEDDINGS = 64
"""The servers' `--embedding-cache`: full before arrivals begin, so that its filling does not look like a leak."""
SETTLE_S = 20.0
"""For what those who left had in work, and for connections to be closed."""
WINDOW_S = 300.0
SAID = 200


class SoakSettings(CommandSettings, env_prefix="CDM_BENCH_SOAK_"):
    """Overload a server for long with callers who leave, send rubbish or read slowly; look for what is lost."""

    bundle: Path | None = Field(None, description="bundle to serve; none: the bundled model")
    engine: Literal["auto", "openvino", "onnxruntime", "fake"] = Field("auto", description="runtime")
    fake_costs: Path | None = Field(None, description="with --engine fake: cost table that it serves by")
    threads: int = Field(0, ge=0, le=1024, description="threads of the server's runtime; 0: it chooses")
    max_batch: int = Field(8, ge=1, le=256, description="pictures that one engine call may advance")
    queue_limit: int = Field(64, ge=4, le=256, description="pictures accepted and unfinished; more get 429")
    minutes: float = Field(30.0, gt=0, le=10_000, description="how long callers arrive")
    load: float = Field(1.2, gt=0, le=100, description="pictures asked for, times what the server can make")
    capacity_s: float = Field(10.0, gt=0, le=600, description="seconds over which capacity is measured")
    max_growth_mb: float = Field(
        10.0,
        gt=0,
        description="growth of the median memory, last minutes against first, beyond which it failed",
    )
    seed: int = Field(0, ge=0, description="seed of arrivals and callers")
    out: Path = Field(Path("runs/soak"), description="folder for soak.json, vitals.csv and vitals.png")


def run(settings: SoakSettings) -> int:
    """Soak and print; the exit code is 1 if anything was lost, wrong, left over, logged, or if memory grew."""
    settings.out.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        server = stack.enter_context(_server(settings))
        vitals = Vitals(server.pid)
        rows, facts = asyncio.run(_Soak(settings, server, vitals).run())
    problems: dict[str, Any] = facts["problems"]
    if logged := trouble(server.log):
        problems["logged"] = logged[:SAID]
    if server.exit_code != 0:
        problems["exit code"] = server.exit_code
    window_s = min(WINDOW_S, settings.minutes * 60 / 5)
    facts["memory"] = vitals.growth(window_s) | {"window s": window_s}
    if facts["memory"]["last MB"] - facts["memory"]["first MB"] > settings.max_growth_mb:
        problems["memory"] = f"grew by more than --max-growth-mb={settings.max_growth_mb:g}"
    engine = facts["engine"]
    vitals.write(
        settings.out, f"{facts['model']} on {engine['runtime']} {engine['precision']}, {settings.load:g}x"
    )
    facts["settings"] = settings.model_dump(mode="json", exclude={"out"})
    (settings.out / "soak.json").write_text(
        json.dumps({"rows": rows, **facts}, ensure_ascii=False) + "\n", "utf-8"
    )
    show("soak", rows, **facts)
    for name, problem in problems.items():
        print(f"soak: {name}: {problem}", file=sys.stderr)
    return int(bool(problems))


def _server(settings: SoakSettings) -> Server:
    given = {
        "engine": settings.engine,
        "bundle": settings.bundle,
        "fake-costs": settings.fake_costs,
        "threads": settings.threads,
        "max-batch": settings.max_batch,
        "queue-limit": settings.queue_limit,
        "max-images": settings.queue_limit,  # so that one request can ask whether every permit is back
        "body-timeout-s": BODY_TIMEOUT_S,
        "embedding-cache": EMBEDDINGS,
        "log-level": "warning",
    }
    return Server(flags_of(given), timeout_s=START_TIMEOUT_S)


class _Soak:
    """One soak of a running server."""

    def __init__(self, settings: SoakSettings, server: Server, vitals: Vitals) -> None:
        self._settings = settings
        self._address = ("127.0.0.1", server.port)
        self._vitals = vitals
        self._info = json.loads(server.fetch("/info"))
        self._max_body_bytes = 65536
        self._results: dict[str, Counter[str]] = defaultdict(Counter)
        self._wrong: list[str] = []
        self._late = 0.0

    async def run(self) -> tuple[list[dict[str, object]], dict[str, Any]]:
        """The table's rows, and what else there is to tell."""
        settings, info = self._settings, self._info
        callers = Callers(
            self._address, info, settings.seed, BODY_TIMEOUT_S, self._max_body_bytes,
            exact=info["engine"]["runtime"] == "fake",
        )  # fmt: skip
        at_rest = self._vitals.read().files
        capacity = await self._capacity(callers)
        rate = settings.load * capacity / callers.pictures_per_call
        before = await self._metrics()
        at_start = dict(callers.counts)
        sampling = asyncio.create_task(self._sample())
        times = poisson(rate, settings.minutes * 60, np.random.default_rng(settings.seed))
        await self._arrive(callers, times)
        sampling.cancel()
        callers.close()
        problems, after = await self._left_over(at_rest)
        problems |= await self._fit()
        grown = {name: after[name] - before.get(name, 0.0) for name in after}
        served, left = (callers.counts[name] - at_start[name] for name in ("served", "left"))
        problems |= unbalanced(
            grown, served, left, sum(counts["refused"] for counts in self._results.values())
        )
        problems |= self._badly_answered()
        facts = {
            "model": info["model"],
            "engine": info["engine"],
            "capacity": round(capacity, 3),
            "arrivals_per_s": round(rate, 3),
            "pictures_asked_per_s": round(settings.load * capacity, 3),
            "pictures_served": served,
            "latest_s": round(self._late, 3),
            "compared": callers.answers.compared,
            "largest_difference": round(callers.answers.largest, 3),
            "server": {name: grown[name] for name in sorted(grown) if name.startswith(COUNTED)},
            "most": {
                "files": max(s.files for s in self._vitals.signs),
                "threads": max(s.threads for s in self._vitals.signs),
            },
            "problems": problems,
        }
        return self._rows(callers), facts

    async def _capacity(self, callers: Callers) -> float:
        """Pictures a second, with two batches' worth of callers who ask again as soon as they are answered."""
        loop = asyncio.get_running_loop()
        finished = 0

        async def again(until: float) -> None:
            nonlocal finished
            while loop.time() < until:
                said = await callers.one()
                if said != "served":
                    raise ServerError(f"a plain picture was not served: {said}")
                finished += 1

        began = loop.time()
        async with asyncio.TaskGroup() as group:
            for _ in range(min(2 * self._settings.max_batch, self._settings.queue_limit)):
                group.create_task(again(began + self._settings.capacity_s))
        return finished / (loop.time() - began)

    async def _arrive(self, callers: Callers, times: Iterable[float]) -> None:
        """A task per arrival, at its time, whatever became of those before."""
        loop = asyncio.get_running_loop()
        began = loop.time()

        async def call() -> None:
            kind, said = await callers.call()
            self._results[kind][said if said in GOOD else "wrong"] += 1
            if said not in GOOD and len(self._wrong) < SAID:
                self._wrong.append(f"{kind}: {said}")

        async with asyncio.TaskGroup() as group:
            for at in times:
                await asyncio.sleep(max(0.0, began + at - loop.time()))
                self._late = max(self._late, loop.time() - began - at)
                group.create_task(call())

    async def _sample(self) -> None:
        while True:
            self._vitals.sample()
            await asyncio.sleep(1)

    async def _left_over(self, files_at_rest: int) -> tuple[dict[str, Any], dict[str, float]]:
        """What is still there when nobody calls any more, which should be nothing; and all metrics."""
        loop = asyncio.get_running_loop()
        end = loop.time() + SETTLE_S
        while True:
            metrics = await self._metrics()
            left = {name: value for name, value in metrics.items() if name.startswith(DEPTHS) and value}
            if (files := self._vitals.read().files) > files_at_rest + 1:  # the one that asks for /metrics
                left["open files"] = files - files_at_rest
            if not left or loop.time() > end:
                return {"left over": left} if left else {}, metrics
            await asyncio.sleep(0.2)

    async def _fit(self) -> dict[str, Any]:
        """Whether the server can still do all that it could: as many pictures at once as its queue may hold, too."""
        problems = {}
        # A permit that was not given back is one picture less that can be asked for.
        body = {
            "prompt": "red apple",
            "num_images": self._settings.queue_limit,
            "steps": self._info["steps"][0],
        }
        asked = {
            "permits": post("/generate", json.dumps(body).encode()),
            "/livez": get("/livez"),
            "/readyz": get("/readyz"),
        }
        for name, request in asked.items():
            async with Wire(self._address) as wire:
                reply = await wire.ask(request)
            if reply.status != 200:
                problems[name] = f"{reply.status} {reply.body[:SAID].decode(errors='replace')}"
        return problems

    def _badly_answered(self) -> dict[str, Any]:
        return {"wrong answers": self._wrong} if self._wrong else {}

    def _rows(self, callers: Callers) -> list[dict[str, object]]:
        columns = (*GOOD, "wrong")
        rows = [
            {"caller": kind, "calls": counts.total(), **{name: counts[name] for name in columns}}
            for kind in callers.kinds
            if (counts := self._results[kind])
        ]
        total = {name: sum(counts[name] for counts in self._results.values()) for name in columns}
        return [*rows, {"caller": "all", "calls": sum(total.values()), **total}]

    async def _metrics(self) -> dict[str, float]:
        async with Wire(self._address) as wire:
            reply = await wire.ask(get("/metrics"))
        return totals(reply.body.decode())
