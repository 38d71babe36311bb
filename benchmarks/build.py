"""`cdm-bench build`: what stands between a student's folder and its first picture, in time, memory and bytes.

The export runs in a process of its own, as `cdm-export` does, and its memory is watched. Every engine is then loaded in
fresh processes: with an empty cache, which builds it, and with what that left. Files' pages are in the operating
system's cache throughout.

    cdm-bench build --student runs/emoji-cdm/student --runs 5 --threads 2
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from collections import Counter
from math import prod
from pathlib import Path
from statistics import median
from typing import Any

from pydantic import Field, field_validator
from safetensors import SafetensorError, safe_open

from benchmarks.child_memory import Watched, run_watched
from benchmarks.report import show
from benchmarks.turns import spread
from engines.bundle import Bundle, load_bundle
from engines.cli import CommandSettings, UsageError
from engines.errors import ExecutionError, ExportError
from engines.export.settings import read_size
from engines.families.base import INDEX

MEMORY_GOAL = 1.3
"""The most that the export may hold, over its largest component's weights in float32."""

MB = 1e6
UNCACHED = {"onnxruntime:f32"}
"""Engines without a compiled form to keep."""

START, STAGES, VERIFICATION = "start", "stages", "verification"
TITLES = {START: "imports", STAGES: "without verification", VERIFICATION: "whole"}
"""Phases in order → what had been done at the end of each."""


class BuildBenchSettings(CommandSettings, env_prefix="CDM_BENCH_BUILD_"):
    """Measure export time and memory, then every engine's build, load from cache and first picture, and bytes on disk.

    The export writes a bundle of float32 graphs, and proves it on the runtimes of --verify.
    """

    student: Path = Field(description="diffusers folder")
    out: Path | None = Field(None, description="folder to keep the bundle in; none keeps none")
    sizes: list[str] = Field([], description="picture sizes WxH, default first; empty: the model's own")
    batches: list[int] = Field([1, 2, 3, 5], min_length=1, description="batch sizes that the export compares")
    verify: list[str] = Field([], description="runtimes that the export proves itself on; empty: its default")
    allow_unfused: bool = Field(False, description="export even where attention falls apart")
    engines: list[str] = Field(
        ["openvino:bf16", "openvino:f32", "onnxruntime:f32", "onnxruntime:int8"],
        description="engines to build, as runtime:precision",
    )
    runs: int = Field(3, ge=1, le=100, description="builds of every engine, and loads from its cache")
    threads: int = Field(0, ge=0, description="threads of the engines; 0 lets each choose")

    @field_validator("engines")
    @classmethod
    def _are_engines(cls, value: list[str]) -> list[str]:
        for name in value:
            if len(name.split(":")) != 2 or not all(name.split(":")):
                raise ValueError(f"{name!r} is no engine; write runtime:precision, as openvino:bf16")
        return value

    @field_validator("sizes")
    @classmethod
    def _are_sizes(cls, value: list[str]) -> list[str]:
        for text in value:
            read_size(text)
        return value


def run(settings: BuildBenchSettings) -> int:
    """Export, build, load, print the table and the JSON line.

    Raises:
        UsageError: no such student.
        ExportError: the export refused it.
        ExecutionError: an engine could not be built or run.
    """
    largest, name = largest_component(settings.student)
    with tempfile.TemporaryDirectory() as work:
        out = settings.out or Path(work) / "bundle"
        export = _export(settings, out)
        bundle = load_bundle(out)
        rows = export_rows(export, largest)
        for engine in settings.engines:
            rows += _engine_rows(settings, bundle, engine, Path(work))
        rows += [
            {"what": f"bundle, {kind}", "MB": size / MB} for kind, size in sorted(bytes_by_kind(out).items())
        ]
    show(
        "build",
        rows,
        student=settings.student.resolve().name,
        bundle=bundle.manifest.name,
        sizes=[f"{size.width}x{size.height}" for size in bundle.manifest.sizes],
        threads=settings.threads,
        runs=settings.runs,
        largest_component={"name": name, "MB": round(largest / MB, 1)},
        export={
            "phases_begin_s": {phase: round(at, 2) for phase, at in export.began_s.items()},
            "own_mb": {phase: round(peak, 1) for phase, peak in export.own_mb.items()},
            "peak_mb": {phase: round(peak, 1) for phase, peak in export.peak_mb.items()},
        },
        goal=goal(export, largest),
    )
    return 0


def largest_component(student: Path) -> tuple[int, str]:
    """Bytes of the largest component's weights in float32, and its name, by the headers of its files.

    Raises:
        UsageError: it is no diffusers folder, or has no weights.
    """
    if not (student / INDEX).is_file():
        raise UsageError(f"--student={student}: there is no {INDEX} in it; name a diffusers folder")
    sizes: Counter[str] = Counter()
    try:
        for path in sorted(student.glob("*/*.safetensors")):
            if "." in path.stem:  # a variant (model.fp16), which is not loaded
                continue
            with safe_open(path, framework="np") as file:
                sizes[path.parent.name] += sum(
                    4 * prod(file.get_slice(name).get_shape())
                    for name in file.keys()  # noqa: SIM118
                )
    except (OSError, SafetensorError) as error:
        raise UsageError(
            f"--student={student}: {path.name} is no whole safetensors file ({error})"
        ) from error
    if not sizes:
        raise UsageError(f"--student={student}: no component of it has safetensors; save the model again")
    name, size = sizes.most_common(1)[0]
    return size, name


def _export(settings: BuildBenchSettings, out: Path) -> Watched:
    command = [sys.executable, "-m", "engines.export.main", str(settings.student), "--out", str(out)]
    command += ["--batches", ",".join(map(str, settings.batches))]
    command += ["--sizes", ",".join(settings.sizes)] if settings.sizes else []
    command += ["--verify", ",".join(settings.verify)] if settings.verify else []
    command += ["--allow-unfused"] if settings.allow_unfused else []
    print("exporting", file=sys.stderr, flush=True)
    found = run_watched(command, phase_of, START)
    if found.code:
        raise ExportError(found.messages[-1] if found.messages else f"cdm-export ended with {found.code}")
    return found


def phase_of(message: str) -> str:
    """Which phase of an export begins with what it said: a component's stage, or a runtime's verification."""
    if message.startswith("… parity: "):
        return VERIFICATION
    return STAGES if re.match(r"… (text_encoder\w*|denoiser|decoder): ", message) else ""


def export_rows(export: Watched, largest: int) -> list[dict[str, Any]]:
    """Time and memory up to the end of each phase: `peak` resident with libraries and mapped files, `own` without."""
    ends = [*list(export.began_s.values())[1:], export.seconds]
    rows: list[dict[str, Any]] = []
    for phase, end in zip(export.began_s, ends, strict=True):
        peak, own = _until(export.peak_mb, phase), _until(export.own_mb, phase)
        rows.append(
            {
                "what": f"export, {TITLES[phase]}",
                "s": end,
                "peak MB": peak,
                "own MB": own,
                "peak / largest component": peak * MB / largest,
            }
        )
    return rows


def goal(export: Watched, largest: int) -> dict[str, Any]:
    """Peaks over the largest component, and which of them stay within `MEMORY_GOAL`.

    What a process holds after its imports, before any weight, is most of a small model's peak: so once without that.
    """
    imported = export.own_mb.get(START, 0.0)
    ratios = {
        "whole": _until(export.peak_mb, VERIFICATION) * MB / largest,
        "without verification": _until(export.peak_mb, STAGES) * MB / largest,
        "without verification, own memory beyond imports": (_until(export.own_mb, STAGES) - imported)
        * MB
        / largest,
    }
    return {
        "goal": MEMORY_GOAL,
        "ratios": {name: round(ratio, 3) for name, ratio in ratios.items()},
        "met": {name: ratio <= MEMORY_GOAL for name, ratio in ratios.items()},
    }


def _until(peaks: dict[str, float], last: str) -> float:
    """The highest of the phases up to `last`."""
    phases = list(TITLES)[: list(TITLES).index(last) + 1]
    return max((peaks[phase] for phase in phases if phase in peaks), default=0.0)


def _engine_rows(
    settings: BuildBenchSettings, bundle: Bundle, engine: str, work: Path
) -> list[dict[str, Any]]:
    """A row for builds with an empty cache, one for loads from a full one, one per kind of file in the cache."""
    states = ("no cache",) if engine in UNCACHED else ("empty cache", "its cache")
    times: dict[str, list[dict[str, float]]] = {state: [] for state in states}
    sizes: Counter[str] = Counter()
    for number in range(settings.runs):
        print(f"{engine}, run {number + 1}/{settings.runs}", file=sys.stderr, flush=True)
        with tempfile.TemporaryDirectory(dir=work) as cache:
            for state in states:
                times[state].append(
                    first_load(bundle.root, engine, settings.threads, None if state == "no cache" else cache)
                )
            sizes = bytes_by_kind(Path(cache))
    rows: list[dict[str, Any]] = []
    for state, found in times.items():
        row: dict[str, Any] = {"what": f"{engine.replace(':', ' ')}, {state}"}
        for label, key in (
            ("check", "check_s"),
            ("load", "load_s"),
            ("first picture", "first_picture_s"),
            ("next", "second_picture_s"),
        ):
            row |= spread(label, [1e3 * item[key] for item in found])
        rows.append({**row, "import ms": 1e3 * median(item["import_s"] for item in found), "n": len(found)})
    cached = sum(size for kind, size in sizes.items() if kind != ".json")
    if cached:
        rows[-1]["MB"] = cached / MB
    return rows


def first_load(root: Path, engine: str, threads: int, cache: str | None) -> dict[str, float]:
    """What `benchmarks.first_load` measured in a fresh process, in seconds.

    Raises:
        ExecutionError: it failed.
    """
    runtime, precision = engine.split(":")
    options = {
        "runtime": runtime,
        "precision": precision,
        "threads": threads,
        "cache_dir": cache,
        "max_batch": 1,
    }
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.first_load", str(root), json.dumps(options)],
        capture_output=True,
        text=True,
    )
    if done.returncode:
        last = (done.stderr.strip().splitlines() or [f"it ended with {done.returncode}"])[-1]
        raise ExecutionError(f"{engine} could not be loaded: {last}")
    times: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return times


def bytes_by_kind(folder: Path) -> Counter[str]:
    """Bytes of all files below `folder` by suffix: `.onnx`, `.data`, `.json`, `.blob`."""
    sizes: Counter[str] = Counter()
    for path in folder.rglob("*"):
        if path.is_file():
            sizes[path.suffix] += path.stat().st_size
    return sizes
