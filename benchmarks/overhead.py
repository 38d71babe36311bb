"""What a picture costs beyond the engine: the client's wall time less what the engine is answerable for.

    samples = asyncio.run(measure(("127.0.0.1", 8000), {"format": "png"}, concurrency=32, warmup=50, requests=500))
    row(samples)["overhead"]                             # p50, ms

Subtracted are, from the answer's `Server-Timing`:

- `encode`, `denoise`, `decode`: the spans of the engine calls that this picture was in, with whoever shared them;
- `others`: how long it waited, before its first call and between its calls, while the engine was in calls of others.

What is left is ours: HTTP both ways, validation, admission, the scheduler's own time, threads that wake up late,
metrics, image encoding, and the client's reading. `image_encode` is part of the overhead, and shown apart. An engine
that keeps all cores busy delays all of these; that is overhead too, as a client has to wait for it. Among many, a
picture also waits through the scheduler's pauses between others' calls; `without waiting` is the overhead less those,
which is what HTTP and image encoding alone take.
"""

from __future__ import annotations

import asyncio
import json
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from typing import Any

import numpy as np

from benchmarks.report import percentiles
from benchmarks.server import ServerError
from benchmarks.wire import Broken, Wire, post

CALLS = ("encode", "denoise", "decode")
NEEDED = (*CALLS, "others")
_ENTRY = re.compile(r"([\w-]+);\s*dur=([\d.]+)")


@dataclass(frozen=True)
class Sample:
    """One answered request, milliseconds: the client's wall time and the server's stages."""

    wall: float
    stages: Mapping[str, float]

    @property
    def engine(self) -> float:
        """Time that the engine had the picture."""
        return sum(self.stages[stage] for stage in CALLS)

    @property
    def others(self) -> float:
        """Time that it waited for others in the engine."""
        return self.stages["others"]

    @property
    def overhead(self) -> float:
        """All the rest."""
        return self.wall - self.engine - self.others

    @property
    def without_waiting(self) -> float:
        """The overhead less all waiting for a call, whatever the engine did meanwhile."""
        return self.wall - self.engine - self.stages["queue"]


def parse_server_timing(header: str) -> dict[str, float]:
    """Durations by name, in milliseconds, of a `Server-Timing` header.

    Raises:
        ServerError: a stage is not among them.
    """
    stages = {name: float(duration) for name, duration in _ENTRY.findall(header)}
    missing = [stage for stage in NEEDED if stage not in stages]
    if missing:
        raise ServerError(f"server-timing={header!r} lacks {', '.join(missing)}; is this a cdm-serve?")
    return stages


async def measure(
    address: tuple[str, int], fields: Mapping[str, Any], concurrency: int, warmup: int, requests: int
) -> list[Sample]:
    """Ask for `warmup` + `requests` pictures over `concurrency` connections; each asks again when it is answered.

    `fields`: of the body, beside prompt and seed. The warm-up is not among what is returned.

    Raises:
        ServerError: a request was not answered with a picture.
    """
    numbers = count()
    samples: list[Sample] = []

    async def ask_again() -> None:
        try:
            async with Wire(address) as wire:
                while (number := next(numbers)) < warmup + requests:
                    # A prompt of its own each time, so that the embedding cache does not flatter the engine's part.
                    sample = await _ask(wire, fields, f"red apple {concurrency} {number}", number)
                    if number >= warmup:
                        samples.append(sample)
        except (OSError, Broken) as error:
            raise ServerError(f"http://{address[0]}:{address[1]} does not answer: {error}") from error

    tasks = [asyncio.create_task(ask_again()) for _ in range(concurrency)]
    try:
        await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    return samples


async def _ask(wire: Wire, fields: Mapping[str, Any], prompt: str, seed: int) -> Sample:
    body = {"prompt": prompt, "seed": seed, **fields}
    request = post("/generate", json.dumps(body).encode())
    began = time.perf_counter()
    reply = await wire.ask(request)
    wall = (time.perf_counter() - began) * 1e3
    if reply.status != 200 or not reply.headers.get("content-type", "").startswith("image/"):
        text = reply.body[:300].decode(errors="replace")
        raise ServerError(f"POST /generate answered {reply.status}: {text}")
    return Sample(wall, parse_server_timing(reply.headers.get("server-timing", "")))


def row(samples: Sequence[Sample]) -> dict[str, Any]:
    """Medians in ms of wall time, its parts and the server's stages; of the overhead the 95th percentile too."""
    overhead = percentiles([sample.overhead for sample in samples])
    apart = [sample.overhead - sample.stages.get("image_encode", 0.0) for sample in samples]
    return {
        "wall": _median([sample.wall for sample in samples]),
        "others": _median([sample.others for sample in samples]),
        **{stage: _median([sample.stages[stage] for sample in samples]) for stage in CALLS},
        "overhead": overhead["p50"],
        "overhead p95": overhead["p95"],
        "of it image_encode": _median([sample.stages.get("image_encode", 0.0) for sample in samples]),
        "without image_encode": _median(apart),
        "without waiting": _median([sample.without_waiting for sample in samples]),
        "n": overhead["n"],
    }


def _median(values: Sequence[float]) -> float:
    return round(float(np.median(values)), 3)
