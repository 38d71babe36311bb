"""`cdm-bench steps`: one denoiser call and one whole request, at every batch, beside the peers on the same weights.

All contenders that fit in memory together take turns in every round, in a new order each time; `--apart` loads one
after the other instead, twice over, for models of which only one copy fits. Only ratios within one run mean much.

    cdm-bench steps --bundle bundles/emoji --student runs/emoji-cdm/student --batches 1,2,4,8 --threads 2
"""

from __future__ import annotations

import gc
import random
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, field_validator

from benchmarks.peers import Peer, Workload
from benchmarks.report import show
from engines.base import EngineOptions, load_engine
from engines.bundle import Bundle, Size, load_bundle
from engines.cli import CommandSettings, UsageError

Contender = Literal[
    "ours",
    "onnxruntime-f32",
    "onnxruntime-int8",
    "openvino-f32",
    "diffusers-f32",
    "diffusers-bf16",
    "compile-bf16",
    "genai",
]
ALL: tuple[Contender, ...] = get_args(Contender)
SETTLE_S = 0.02
"""The last contender's idle worker threads spin for a moment."""

CYCLES = 2
"""How often `--apart` goes through the contenders."""


class StepsBenchSettings(CommandSettings, env_prefix="CDM_BENCH_STEPS_"):
    """Time one denoiser call and one whole request through the bundle and through every peer, in alternating rounds."""

    bundle: Path = Field(description="bundle folder")
    student: Path = Field(description="the diffusers folder that the bundle was exported from")
    contenders: list[Contender] = Field(
        [*ALL], min_length=1, description="who takes part; ours is what auto chooses"
    )
    batches: list[int] = Field([1, 2, 4, 8], min_length=1, description="pictures per call")
    size: str = Field("", description="picture size WxH; empty: the bundle's default")
    steps: int = Field(4, ge=1, description="steps of a whole request")
    rounds: int = Field(10, ge=1, description="measured rounds; every contender runs once in each")
    threads: int = Field(2, ge=0, description="threads of every contender; 0 lets each choose")
    apart: bool = Field(False, description="load one contender at a time, for models that fit in memory once")
    pictures: bool = Field(True, description="time whole requests too, not only steps")
    converted: Path = Field(Path("runs/genai"), description="folder for OpenVINO GenAI's form of the student")
    seed: int = Field(0, ge=0, description="seed of the request and of the contenders' order")

    @field_validator("contenders")
    @classmethod
    def _ours_takes_part(cls, value: list[Contender]) -> list[Contender]:
        if "ours" not in value:
            raise ValueError("ours must be among the contenders: all ratios are to it")
        return value


@dataclass
class Series:
    """One contender at one batch, and what it took (ms)."""

    contender: Contender
    batch: int
    name: str = ""
    steps: list[float] = field(default_factory=list)
    pictures: list[float] = field(default_factory=list)
    image: NDArray[np.uint8] | None = None


def run(settings: StepsBenchSettings) -> int:
    """Measure, print the table and the JSON line."""
    bundle = load_bundle(settings.bundle)
    size = _size(settings, bundle)
    if settings.steps not in bundle.manifest.schedules:
        raise UsageError(
            f"--steps={settings.steps}: the bundle has schedules for {sorted(bundle.manifest.schedules)}"
        )
    loads = [(name, _LOADERS[name]) for name in settings.contenders]
    workloads = [
        Workload("red apple", settings.steps, batch, size.height, size.width, settings.seed)
        for batch in settings.batches
    ]
    table = {(name, batch): Series(name, batch) for name, _ in loads for batch in settings.batches}
    order = random.Random(settings.seed)
    for cycle in range(CYCLES if settings.apart else 1):
        groups = [[item] for item in loads] if settings.apart else [loads]
        for group in groups:
            with _loaded(group, settings, bundle, workloads) as peers:
                rounds = -(-settings.rounds // CYCLES) if settings.apart else settings.rounds
                _measure(peers, table, rounds, order, settings.pictures)
        print(f"cycle {cycle + 1} done", file=sys.stderr, flush=True)
    show(
        "steps",
        _rows(table, settings.batches),
        bundle=bundle.manifest.name,
        size=size.model_dump(),
        threads=settings.threads,
        apart=settings.apart,
        max_difference=_differences(table),
    )
    return 0


def _size(settings: StepsBenchSettings, bundle: Bundle) -> Size:
    names = {f"{size.width}x{size.height}": size for size in bundle.manifest.sizes}
    if settings.size and settings.size not in names:
        raise UsageError(f"--size={settings.size}: the bundle makes {', '.join(names)}")
    return names[settings.size] if settings.size else bundle.manifest.default_size


Peers = dict[tuple[Contender, int], Peer]
Load = Callable[[StepsBenchSettings, Bundle, list[Workload]], list[Peer]]


@contextmanager
def _loaded(
    group: list[tuple[Contender, Load]],
    settings: StepsBenchSettings,
    bundle: Bundle,
    workloads: list[Workload],
) -> Iterator[Peers]:
    """The group's peers, warmed up; freed afterwards."""
    peers: Peers = {}
    for name, load in group:
        print(f"loading {name}", file=sys.stderr, flush=True)
        for workload, peer in zip(workloads, load(settings, bundle, workloads), strict=True):
            peers[name, workload.batch] = peer
            peer.step()
            if settings.pictures:
                peer.picture()
    yield peers
    peers.clear()
    gc.collect()


def _measure(
    peers: Peers,
    table: Mapping[tuple[Contender, int], Series],
    rounds: int,
    order: random.Random,
    pictures: bool,
) -> None:
    turns = list(peers)
    for number in range(rounds):
        order.shuffle(turns)
        for key in turns:
            series, peer = table[key], peers[key]
            series.name = peer.name
            time.sleep(SETTLE_S)
            began = time.perf_counter()
            peer.step()
            series.steps.append(1e3 * (time.perf_counter() - began))
            if pictures:
                began = time.perf_counter()
                series.image = peer.picture()
                series.pictures.append(1e3 * (time.perf_counter() - began))
        print(f"\rround {number + 1}/{rounds}", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)


def _rows(table: Mapping[tuple[Contender, int], Series], batches: list[int]) -> list[dict[str, Any]]:
    rows = []
    for batch in batches:
        ours = table["ours", batch]
        for (_, found), series in table.items():
            if found != batch:
                continue
            row: dict[str, Any] = {
                "batch": batch,
                "contender": series.name,
                "step ms": statistics.median(series.steps),
                "step min": min(series.steps),
                "step, to ours": statistics.median(series.steps) / statistics.median(ours.steps),
            }
            if series.pictures:
                row |= {
                    "request ms": statistics.median(series.pictures),
                    "request, to ours": statistics.median(series.pictures) / statistics.median(ours.pictures),
                }
            rows.append({**row, "n": len(series.steps)})
    return rows


def _differences(table: Mapping[tuple[Contender, int], Series]) -> dict[str, float]:
    """Mean difference (of 255) of each contender's picture from diffusers' in float32: are they one model?"""
    references = {
        series.batch: series.image for series in table.values() if series.contender == "diffusers-f32"
    }
    found = {}
    for series in table.values():
        reference = references.get(series.batch)
        if reference is not None and series.image is not None:
            error = np.abs(series.image.astype(np.int16) - reference.astype(np.int16)).mean()
            found[f"{series.contender} at {series.batch}"] = round(float(error), 3)
    return found


def _engine(runtime: str, precision: str) -> Load:
    def load(settings: StepsBenchSettings, bundle: Bundle, workloads: list[Workload]) -> list[Peer]:
        options = EngineOptions(
            runtime, precision, settings.threads, max_batch=max(item.batch for item in workloads)
        )
        engine = load_engine(bundle, options)
        info = engine.info
        latent = bundle.manifest.latent

        def peer(workload: Workload) -> Peer:
            rows, sigmas = workload.batch, bundle.manifest.sigmas(workload.steps)
            start = workload.noise(latent.channels, latent.downscale)
            tokens = engine.tokenize(workload.prompt)
            conditioning = engine.encode([tokens]) * rows
            samples = [engine.put(noise) for noise in start]

            def step() -> None:
                engine.denoise(samples, [sigmas[0]] * rows, [sigmas[1]] * rows, conditioning)

            def picture() -> NDArray[np.uint8]:
                text = engine.encode([tokens]) * rows  # once, as a server and the peers do
                x = [engine.put(noise) for noise in start]
                for sigma, sigma_next in pairwise(sigmas):
                    x, _ = engine.denoise(x, [sigma] * rows, [sigma_next] * rows, text)
                return engine.decode(x)

            return Peer(
                f"{'ours: ' if runtime == 'auto' else ''}{info.runtime} {info.precision}", step, picture
            )

        return [peer(workload) for workload in workloads]

    return load


def _diffusers(dtype_name: str, compiled: bool) -> Load:
    def load(settings: StepsBenchSettings, bundle: Bundle, workloads: list[Workload]) -> list[Peer]:
        import torch

        from benchmarks.peers.diffusers_peer import DiffusersModel

        model = DiffusersModel(settings.student, getattr(torch, dtype_name), settings.threads)
        return [model.peer(workload, compiled) for workload in workloads]

    return load


def _genai(settings: StepsBenchSettings, bundle: Bundle, workloads: list[Workload]) -> list[Peer]:
    from benchmarks.peers.genai import genai_model

    model = genai_model(settings.student, settings.converted, settings.steps, settings.threads)
    return [model.peer(workload) for workload in workloads]


_LOADERS: dict[Contender, Load] = {
    "ours": _engine("auto", "auto"),
    "onnxruntime-f32": _engine("onnxruntime", "f32"),
    "onnxruntime-int8": _engine("onnxruntime", "int8"),
    "openvino-f32": _engine("openvino", "f32"),
    "diffusers-f32": _diffusers("float32", compiled=False),
    "diffusers-bf16": _diffusers("bfloat16", compiled=False),
    "compile-bf16": _diffusers("bfloat16", compiled=True),
    "genai": _genai,
}
