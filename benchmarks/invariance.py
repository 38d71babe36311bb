"""`cdm-bench invariance`: what it costs that the same seed gives the same bytes whatever shares its batch.

    cdm-bench invariance --groups 1,4,8 --rounds 30

The same pictures are made with batches as they come (`free`) and in groups of exactly n (`--invariant-batch n`, padded
where fewer are there), one engine after the other in every round. Beside the time: whether every picture, drawn alone
and again at its place in every batch size, came out with the same bytes.
"""

from __future__ import annotations

import random
import time
from itertools import pairwise
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from benchmarks.pictures import difference
from benchmarks.report import percentiles, show
from cdm_serve.settings import default_bundle
from engines.base import Engine, EngineOptions, load_engine
from engines.bundle import load_bundle
from engines.cli import CommandSettings, UsageError
from engines.noise import noise


class InvarianceSettings(CommandSettings, env_prefix="CDM_BENCH_INVARIANCE_"):
    """Time of whole pictures in batches as they come and in groups of fixed size, and whether bytes are equal."""

    bundle: Path | None = Field(None, description="exported model; none: the bundled model")
    engine: Literal["auto", "openvino", "onnxruntime"] = Field("auto", description="runtime of the bundle")
    precision: str = Field("auto", description="arithmetic of the runtime; auto: the runtime's best here")
    threads: int = Field(0, ge=0, le=1024, description="threads of the runtime; 0: the runtime chooses")
    groups: tuple[int, ...] = Field((1, 4, 8), min_length=1, description="sizes of groups to compare")
    batches: tuple[int, ...] = Field(
        (1, 2, 3, 4, 6, 8), min_length=1, description="pictures that come at once"
    )
    steps: int = Field(4, ge=1, description="denoising steps")
    rounds: int = Field(20, ge=1, le=10_000, description="measurements of each")
    prompt: str = Field("red apple", min_length=1, description="what is drawn")
    seed: int = Field(0, ge=0, description="seed of the first picture")


def run(settings: InvarianceSettings) -> int:
    """Measure, print the table and the JSON line."""
    bundle = load_bundle(settings.bundle or default_bundle())
    if settings.steps not in bundle.manifest.schedules:
        raise UsageError(
            f"--steps={settings.steps}: the bundle has schedules for {sorted(bundle.manifest.schedules)}"
        )
    most = max(*settings.batches, *settings.groups)
    engines = {
        group: load_engine(
            bundle,
            EngineOptions(settings.engine, settings.precision, settings.threads, most, invariant_batch=group),
        )
        for group in (0, *settings.groups)
    }
    alone = {
        group: [draw(engine, settings, 1, place)[0] for place in range(max(settings.batches))]
        for group, engine in engines.items()
    }
    worst = dict.fromkeys(engines, 0)
    times: dict[tuple[int, int], list[float]] = {(g, n): [] for g in engines for n in settings.batches}
    order = random.Random(settings.seed)
    for _ in range(settings.rounds):
        for batch in settings.batches:
            turn = list(engines)
            order.shuffle(turn)
            for group in turn:
                time.sleep(0.02)  # the last engine's idle worker threads spin for a moment
                started = time.perf_counter()
                pictures = draw(engines[group], settings, batch)
                times[group, batch].append(1e3 * (time.perf_counter() - started))
                worst[group] = max(worst[group], *map(difference, pictures, alone[group]))
    rows = [
        {
            "batches": f"groups of {group}" if group else "free",
            **{f"{batch}, p50 ms": percentiles(times[group, batch])["p50"] for batch in settings.batches},
            **{
                f"{batch}, ratio": round(
                    float(np.median(times[group, batch]) / np.median(times[0, batch])), 2
                )
                for batch in settings.batches
                if group
            },
            "largest difference of 255": worst[group],
        }
        for group in engines
    ]
    info = engines[0].info
    show(
        "invariance",
        rows,
        engine={"runtime": info.runtime, "version": info.version, "precision": info.precision},
        bundle=bundle.manifest.name,
        steps=settings.steps,
        rounds=settings.rounds,
        threads=info.threads,
    )
    for engine in engines.values():
        engine.close()
    return 0


def draw(engine: Engine, settings: InvarianceSettings, batch: int, first: int = 0) -> NDArray[np.uint8]:
    """`batch` pictures of consecutive seeds from `first` on, through every stage, uint8 `(batch, height, width, 3)`."""
    manifest = engine.manifest
    down, size = manifest.latent.downscale, manifest.default_size
    shape = (manifest.latent.channels, size.height // down, size.width // down)
    conditioning = engine.encode([engine.tokenize(settings.prompt)] * batch)
    x = [engine.put(noise(settings.seed + first + number, shape)) for number in range(batch)]
    for sigma, sigma_next in pairwise(manifest.sigmas(settings.steps)):
        x, _ = engine.denoise(x, [sigma] * batch, [sigma_next] * batch, conditioning)
    return engine.decode(x)
