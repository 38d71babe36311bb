"""`cdm-bench http`: what HTTP, scheduling and image encoding cost beside the engine.

Two questions, two tables: by how much is a picture later than its engine calls (`overhead.py` says what is subtracted
and why), and how many requests a second does the surface bear when the engine costs nothing (`surface.py`)?
"""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal, Self
from urllib.parse import urlsplit

from pydantic import Field, model_validator

from benchmarks.overhead import measure, row
from benchmarks.report import show, table
from benchmarks.server import Server, ServerError
from benchmarks.surface import surface
from benchmarks.wire import Broken, Wire, get
from engines.cli import CommandSettings, UsageError

Runtime = Literal["auto", "openvino", "onnxruntime", "fake"]
ImageFormat = Literal["png", "jpeg", "webp"]

Info = dict[str, Any]
"""What `/info` answers."""


class HttpBenchSettings(CommandSettings, env_prefix="CDM_BENCH_HTTP_"):
    """Overhead of POST /generate beyond the engine's own time, and the surface's requests per second."""

    url: str | None = Field(
        None, description="a running server, whose overhead is measured alone; none: start some"
    )
    bundle: Path | None = Field(None, description="bundle for the started servers; none: the bundled model")
    engine: list[Runtime] = Field(
        ["auto", "fake"], min_length=1, description="runtimes of the started servers"
    )
    concurrency: list[Annotated[int, Field(ge=1, le=64)]] = Field(
        [1, 32], min_length=1, description="connections that ask at once"
    )
    requests: int = Field(
        500, ge=1, le=100_000, description="measured requests, for each runtime and concurrency"
    )
    warmup: int = Field(50, ge=0, le=10_000, description="requests before, not counted")
    steps: int | None = Field(None, ge=1, description="denoising steps; none: the bundle's default")
    format: list[ImageFormat] = Field(
        ["png", "jpeg"], min_length=1, description="image formats; overhead is measured with the first"
    )
    rounds: int = Field(5, ge=0, le=1000, description="rounds of the surface's contenders; 0: leave them out")
    round_s: float = Field(3.0, gt=0, le=600, description="seconds of a contender's turn in a round")

    @model_validator(mode="after")
    def _a_running_server_has_its_engine(self) -> Self:
        for name in ("engine", "bundle"):
            value = getattr(self, name)
            if self.url is not None and value != type(self).model_fields[name].default:
                given = ",".join(value) if isinstance(value, list) else value
                raise ValueError(
                    f"--{name}={given} is for a server to be started, but --url={self.url} is already running; "
                    "leave one of them out"
                )
        return self


def run(settings: HttpBenchSettings) -> None:
    """Measure and print."""
    rows, details, served, busy = [], [], [], os.getloadavg()[0]
    fields: dict[str, Any] = {"format": settings.format[0]}
    if settings.steps is not None:
        fields["steps"] = settings.steps
    for engine in settings.engine if settings.url is None else ["running"]:
        with _server(settings, engine) as address:
            info = asyncio.run(_info(address))
            name = f"{info['model']}, {info['engine']['runtime']} {info['engine']['precision']}"
            served.append({key: info[key] for key in ("model", "engine")})
            for concurrency in settings.concurrency:
                samples = asyncio.run(
                    measure(address, fields, concurrency, settings.warmup, settings.requests)
                )
                rows.append({"p50, ms": name, "concurrency": concurrency, **row(samples)})
    if settings.url is None and settings.rounds:
        most = max(settings.concurrency)
        details = surface(settings.format, most, settings.steps or 1, settings.rounds, settings.round_s)
        print(table(details), end="\n\n")
    facts = settings.model_dump(mode="json", exclude={"url", "bundle"})
    show("http", rows, surface=details, served=served, settings=facts, load_average_before=busy)


@contextmanager
def _server(settings: HttpBenchSettings, engine: str) -> Iterator[tuple[str, int]]:
    """The address of the running server, or of one that is started for as long as the body takes."""
    if settings.url is not None:
        parts = urlsplit(settings.url)
        if parts.scheme != "http" or not parts.hostname:
            raise UsageError(f"--url={settings.url} must be http://host:port")
        yield parts.hostname, parts.port or 80
        return
    flags = ["--engine", engine, "--log-level", "warning"]
    flags += ["--bundle", str(settings.bundle)] if settings.bundle else []
    with Server(flags) as server:
        yield "127.0.0.1", server.port


async def _info(address: tuple[str, int]) -> Info:
    try:
        async with Wire(address) as wire:
            info: Info = json.loads((await wire.ask(get("/info"))).body)
    except (OSError, Broken, ValueError) as error:
        raise ServerError(f"http://{address[0]}:{address[1]} does not answer /info: {error}") from error
    return info
