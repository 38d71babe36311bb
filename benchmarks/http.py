"""`cdm-bench http`: what a picture costs beyond the engine.

One client asks for one picture after the other over one connection. The response's `Server-Timing` header tells what
the engine took (encode + denoise + decode, wall time in the runner); the rest is HTTP, validation, queueing between
threads and image encoding, and is reported apart.
"""

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Self

import httpx
from pydantic import Field, model_validator

from benchmarks.report import percentiles, show
from benchmarks.server import Server, ServerError
from engines.cli import CommandSettings

ENGINE_STAGES = ("encode", "denoise", "decode")
_ENTRY = re.compile(r"([\w-]+);\s*dur=([\d.]+)")


class HttpBenchSettings(CommandSettings, env_prefix="CDM_BENCH_HTTP_"):
    """HTTP overhead with one client: wall time of POST /generate minus the engine's own time."""

    url: str | None = Field(None, description="a running server; none: start one")
    bundle: Path | None = Field(None, description="bundle for the started server; none: the bundled model")
    engine: Literal["auto", "openvino", "onnxruntime", "fake"] = Field(
        "auto", description="runtime of the started server"
    )
    requests: int = Field(200, ge=1, le=100_000, description="measured requests")
    warmup: int = Field(20, ge=0, le=10_000, description="requests before, not counted")
    steps: int | None = Field(None, ge=1, description="denoising steps; none: the bundle's default")
    format: Literal["png", "jpeg", "webp"] = Field("png", description="image format asked for")

    @model_validator(mode="after")
    def _a_running_server_has_its_engine(self) -> Self:
        for name, value, nothing in (("engine", self.engine, "auto"), ("bundle", self.bundle, None)):
            if self.url is not None and value != nothing:
                raise ValueError(
                    f"--{name}={value} is for a server to be started, but --url={self.url} is already running; "
                    "leave one of them out"
                )
        return self


@dataclass(frozen=True)
class Sample:
    """One answered request, milliseconds: the client's wall time and the server's stages."""

    wall: float
    stages: dict[str, float]

    @property
    def engine(self) -> float:
        """Time that the engine had the picture."""
        return sum(self.stages[stage] for stage in ENGINE_STAGES)

    @property
    def overhead(self) -> float:
        """All the rest."""
        return self.wall - self.engine


def parse_server_timing(header: str) -> dict[str, float]:
    """Durations by name, in milliseconds, of a `Server-Timing` header.

    Raises:
        ServerError: an engine stage is not among them.
    """
    stages = {name: float(duration) for name, duration in _ENTRY.findall(header)}
    missing = [stage for stage in ENGINE_STAGES if stage not in stages]
    if missing:
        raise ServerError(f"server-timing={header!r} lacks {', '.join(missing)}; is this a cdm-serve?")
    return stages


def measure(client: httpx.Client, settings: HttpBenchSettings) -> list[Sample]:
    """Ask for `warmup` + `requests` pictures, one after the other; the warm-up is not among what is returned."""
    samples = []
    for number in range(settings.warmup + settings.requests):
        # A prompt of its own each time, so that the embedding cache does not flatter the engine's part.
        body = {"prompt": f"red apple {number}", "seed": number, "format": settings.format}
        if settings.steps is not None:
            body["steps"] = settings.steps
        began = time.perf_counter()
        try:
            response = client.post("/generate", json=body)
        except httpx.HTTPError as error:
            raise ServerError(f"{client.base_url} does not answer: {error}") from error
        wall = (time.perf_counter() - began) * 1e3
        if response.status_code != httpx.codes.OK or not response.headers["content-type"].startswith(
            "image/"
        ):
            raise ServerError(f"POST /generate answered {response.status_code}: {response.text[:300]}")
        samples.append(Sample(wall, parse_server_timing(response.headers.get("server-timing", ""))))
    return samples[settings.warmup :]


def rows(samples: Sequence[Sample]) -> list[dict[str, object]]:
    """One row per part: wall, engine (encode + denoise + decode), overhead (wall − engine), the server's stages."""
    parts = {
        "wall": [s.wall for s in samples],
        "engine": [s.engine for s in samples],
        "overhead": [s.overhead for s in samples],
    }
    for stage in samples[0].stages:
        parts[f"stage {stage}"] = [s.stages[stage] for s in samples]
    return [{"part, ms": name, **percentiles(values)} for name, values in parts.items()]


def run(settings: HttpBenchSettings) -> None:
    """Measure and print."""
    with ExitStack() as stack:
        url = settings.url
        if url is None:
            flags = ["--engine", settings.engine, "--log-level", "warning"]
            flags += ["--bundle", str(settings.bundle)] if settings.bundle else []
            url = stack.enter_context(Server(flags)).url
        client = stack.enter_context(httpx.Client(base_url=url, timeout=60, trust_env=False))
        samples = measure(client, settings)
        info = client.get("/info").json()
    served = {key: info[key] for key in ("model", "engine")}
    show(
        "http", rows(samples), **served, steps=settings.steps or info["default_steps"], format=settings.format
    )
