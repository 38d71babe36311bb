"""Requests a second of `cdm-serve`'s surface, beside a bare FastAPI route that answers with the same bytes.

Contenders take turns in rounds, each in a process of its own that is idle while others have theirs:

- `bare`: `bare.py`'s stored file;
- `bare, encoding`: the same pixels, encoded for every request in a thread;
- `cdm-serve, prepared`: `prepared.py`, whose engine costs nothing: everything but the engine;
- `cdm-serve, fake`: the fake engine without costs, whose painting takes processor time of its own.

Where there are two cores or more, the client has one to itself and the servers share the rest; its processor time is
told, for a client that is always busy measures itself. So is the servers' processor time per request, which depends
less on what else the machine does than requests a second do.
"""

from __future__ import annotations

import asyncio
import json
import os
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.server import Server, ServerError
from benchmarks.vitals import cpu_seconds
from benchmarks.wire import Broken, Wire, post

BARE = "bare"
FAKE = ("--engine", "fake", "--log-level", "warning")
WARMUP_S = 0.5
_numbers = count()
"""Every prompt of a run is another, so that no cache answers."""


@dataclass(frozen=True)
class Contender:
    """A running server and the path that is posted to."""

    name: str
    server: Server
    path: str


@dataclass(frozen=True)
class Turn:
    """One contender's share of a round."""

    per_s: float
    cpu_ms: float
    """Of the server, per request."""
    client: float
    """Share of a core that the client took."""


def surface(
    formats: Sequence[str], concurrency: int, steps: int, rounds: int, round_s: float
) -> list[dict[str, Any]]:
    """A row per contender and format: medians over the rounds, and requests a second as a share of the bare routes'."""
    rows = []
    for format in formats:
        with ExitStack() as stack:
            with pinned(servers=True):
                contenders = _contenders(stack, format)
            turns: dict[str, list[Turn]] = {contender.name: [] for contender in contenders}
            with pinned(servers=False):
                for number in range(rounds):
                    for place in range(len(contenders)):
                        contender = contenders[(place + number) % len(contenders)]
                        turns[contender.name].append(
                            asyncio.run(_turn(contender, format, concurrency, steps, round_s))
                        )
        rows += _rows(format, turns)
    return rows


@contextmanager
def pinned(*, servers: bool) -> Iterator[None]:
    """Keep this process, and those it starts, to the servers' cores or to the client's, where there are two or more."""
    cores = os.sched_getaffinity(0)
    client = max(cores)
    if len(cores) > 1:
        os.sched_setaffinity(0, cores - {client} if servers else {client})
    try:
        yield
    finally:
        os.sched_setaffinity(0, cores)


def _contenders(stack: ExitStack, format: str) -> list[Contender]:
    prepared = stack.enter_context(Server(FAKE, module="benchmarks.prepared"))
    fake = stack.enter_context(Server(FAKE))
    folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="cdm-bare-")))
    picture = folder / f"picture.{format}"
    picture.write_bytes(
        prepared.fetch("/generate", json.dumps({"prompt": "red apple", "format": format}).encode())
    )
    bare = stack.enter_context(Server(["--picture", str(picture)], module="benchmarks.bare"))
    return [
        Contender(BARE, bare, "/generate"),
        Contender(f"{BARE}, encoding", bare, "/encode"),
        Contender("cdm-serve, prepared", prepared, "/generate"),
        Contender("cdm-serve, fake", fake, "/generate"),
    ]


async def _turn(contender: Contender, format: str, concurrency: int, steps: int, round_s: float) -> Turn:
    address, process = ("127.0.0.1", contender.server.port), Path("/proc", str(contender.server.pid))

    async def ask_until(end: float) -> int:
        answered = 0
        async with Wire(address) as wire:
            while time.perf_counter() < end:
                body = {
                    "prompt": f"red apple {next(_numbers)}",
                    "seed": answered,
                    "steps": steps,
                    "format": format,
                }
                reply = await wire.ask(post(contender.path, json.dumps(body).encode()))
                if reply.status != 200:
                    raise ServerError(f"{contender.name} answered {reply.status}: {reply.body[:300]!r}")
                answered += 1
        return answered

    async def ask_for(seconds: float) -> int:
        end = time.perf_counter() + seconds
        return sum(await asyncio.gather(*(ask_until(end) for _ in range(concurrency))))

    try:
        await ask_for(min(WARMUP_S, round_s))
        began, client, server = time.perf_counter(), time.process_time(), cpu_seconds(process)
        answered = await ask_for(round_s)
    except (OSError, Broken) as error:
        raise ServerError(f"{contender.name} does not answer: {error}") from error
    took = time.perf_counter() - began
    used = cpu_seconds(process) - server
    return Turn(answered / took, used / answered * 1e3, (time.process_time() - client) / took)


def _rows(format: str, turns: dict[str, list[Turn]]) -> list[dict[str, Any]]:
    per_s = {name: float(np.median([turn.per_s for turn in of])) for name, of in turns.items()}
    return [
        {
            "surface": name,
            "format": format,
            "requests/s": round(per_s[name], 1),
            "of bare": round(per_s[name] / per_s[BARE], 3),
            "of bare, encoding": round(per_s[name] / per_s[f"{BARE}, encoding"], 3),
            "server CPU, ms/request": round(float(np.median([turn.cpu_ms for turn in of])), 3),
            "client CPU": round(float(np.median([turn.client for turn in of])), 2),
            "rounds": len(of),
        }
        for name, of in turns.items()
    ]
