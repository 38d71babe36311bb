"""`cdm-bench coldstart`: from the creation of the `cdm-serve` process to the last byte of the first picture.

`cold` starts with an empty folder for compiled models, `warm` with the one that the cold start left. The files'
pages are in the operating system's cache in both: this is a restart, not a reboot. `--install` measures what comes
before: a fresh environment, and serving installed into it.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from benchmarks.report import percentiles, show
from benchmarks.server import Server, ServerError
from engines.cli import CommandSettings

ROOT = Path(__file__).resolve().parent.parent
MB = 1e6
CACHING = ("auto", "openvino")
"""Runtimes that keep compiled models; the others start alike every time."""

Info = dict[str, Any]
"""What `/info` answers."""


class ColdStartSettings(CommandSettings, env_prefix="CDM_BENCH_COLDSTART_"):
    """Time from process start to the first picture, with cold and warm compiled cache; with --install, install cost."""

    bundle: Path | None = Field(None, description="bundle to serve; none: the bundled model")
    engine: Literal["auto", "openvino", "onnxruntime", "fake"] = Field("auto", description="runtime")
    runs: int = Field(5, ge=1, le=100, description="cold and warm starts each (starts, without a cache)")
    install: bool = Field(False, description="measure installation as well, in a fresh environment")
    extra: Literal["", "openvino"] = Field(
        "openvino", description="extra that --install installs; empty: none"
    )


def first_picture(
    settings: ColdStartSettings, cache: Path, python: str = sys.executable
) -> tuple[float, Info]:
    """Seconds from process creation to the first picture, asked for as soon as anybody listens; and `/info`."""
    flags = ["--engine", settings.engine, "--log-level", "warning"]
    flags += ["--cache-dir", str(cache)] if settings.engine in CACHING else []
    flags += ["--bundle", str(settings.bundle)] if settings.bundle else []
    with Server(flags, python=python, wait_ready=False) as server:
        picture = server.fetch("/generate", b'{"prompt": "red apple"}')
        seconds = time.perf_counter() - server.started
        info: Info = json.loads(server.fetch("/info"))
    if not picture.startswith(b"\x89PNG"):
        raise ServerError(f"the first picture is no PNG: {picture[:100]!r}")
    return seconds, info


@contextmanager
def installed(extra: str) -> Iterator[tuple[Path, dict[str, float]]]:
    """A fresh environment with serving in it, and what it cost: seconds, megabytes (with and without pip's own)."""
    with tempfile.TemporaryDirectory() as folder:
        python = Path(folder) / "bin" / "python"
        subprocess.run([sys.executable, "-m", "venv", folder], check=True)
        empty = _megabytes(Path(folder))
        target = f"{ROOT}[{extra}]" if extra else str(ROOT)
        pip = [str(python), "-m", "pip", "--disable-pip-version-check", "install", "--quiet"]
        began = time.perf_counter()
        try:
            subprocess.run(
                [*pip, "--constraint", str(ROOT / "constraints.txt"), target],
                check=True,
                stderr=subprocess.PIPE,
                text=True,
            )
        except subprocess.CalledProcessError as error:
            raise ServerError(f"pip could not install {target}: {error.stderr[-1000:].strip()}") from error
        seconds, size = time.perf_counter() - began, _megabytes(Path(folder))
        yield python, {"install seconds": seconds, "MB": size, "MB without pip": size - empty}


def run(settings: ColdStartSettings) -> None:
    """Measure and print."""
    states = ("cold", "warm") if settings.engine in CACHING else ("no",)
    seconds: dict[str, list[float]] = {state: [] for state in states}
    for _ in range(settings.runs):
        with tempfile.TemporaryDirectory() as cache:
            for state in seconds:
                taken, info = first_picture(settings, Path(cache))
                seconds[state].append(taken)
    rows = [
        {"first picture, s": f"{state} cache", **percentiles(values)} for state, values in seconds.items()
    ]
    facts: dict[str, Any] = {"model": info["model"], "engine": info["engine"]}
    if settings.install:
        with installed(settings.extra) as (python, cost), tempfile.TemporaryDirectory() as cache:
            taken, _ = first_picture(settings, Path(cache), str(python))
        rows.append({"first picture, s": "right after installation", **percentiles([taken])})
        facts["install"] = cost
        print(", ".join(f"{name}: {value:.1f}" for name, value in cost.items()))
    show("coldstart", rows, **facts)


def _megabytes(folder: Path) -> float:
    return sum(path.lstat().st_size for path in folder.rglob("*") if path.is_file()) / MB
