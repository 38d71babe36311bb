"""`cdm-bench engine`: one request through the bundle, beside the same student and its teacher through diffusers.

A request is tokenize, encode, N steps, decode: nothing cached. All contenders take turns in every round, in a new
order each time, so that whatever else the machine does falls on all alike; only ratios within one run mean much.

    cdm-bench engine --bundle bundles/emoji --student runs/student --teacher runs/teacher
"""

from __future__ import annotations

import random
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field

from benchmarks.pictures import difference
from benchmarks.report import percentiles, show
from engines.base import Engine, EngineOptions, load_engine
from engines.bundle import Bundle, load_bundle
from engines.cli import CommandSettings, UsageError
from engines.families.base import FamilyError, load_family
from engines.families.sd3 import SD3Family
from engines.noise import noise

TEACHER_STEPS = 50
"""With classifier-free guidance every step evaluates the model twice: 100 evaluations (NFE)."""

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class EngineBenchSettings(CommandSettings, env_prefix="CDM_BENCH_ENGINE_"):
    """Time one request through a bundle, and through diffusers in eager float32 and bfloat16, in alternating rounds."""

    bundle: Path = Field(description="bundle folder")
    student: Path = Field(description="the diffusers folder that the bundle was exported from")
    teacher: Path | None = Field(
        None, description="the teacher's diffusers folder; none leaves the teacher out"
    )
    steps: list[int] = Field([1, 2, 4], min_length=1, description="step counts")
    rounds: int = Field(20, ge=1, description="measured rounds; every contender runs once in each")
    teacher_rounds: int = Field(10, ge=1, description="rounds in which the teacher takes part")
    guidance: float = Field(4.0, gt=1, description="the teacher's guidance scale")
    threads: int = Field(0, ge=0, description="threads of every contender; 0 lets each choose")
    engine: Literal["auto", "openvino", "onnxruntime"] = Field("auto", description="the bundle's runtime")
    precision: str = Field("auto", description="the bundle's precision")
    prompt: str = Field("red apple", description="the request's prompt")
    seed: int = Field(0, ge=0, description="seed of the request and of the contenders' order")


@dataclass(frozen=True)
class Contender:
    """Something that makes a picture, and the wall times (ms) it took."""

    name: str
    steps: int
    nfe: int
    draw: Callable[[], NDArray[np.uint8]]
    rounds: int
    times: list[float] = field(default_factory=list)


def run(settings: EngineBenchSettings) -> int:
    """Measure, print the table and the JSON line."""
    if settings.threads:
        torch.set_num_threads(settings.threads)
    bundle = load_bundle(settings.bundle)
    if unknown := [steps for steps in settings.steps if steps not in bundle.manifest.schedules]:
        raise UsageError(
            f"--steps={unknown[0]}: the bundle has schedules for {sorted(bundle.manifest.schedules)}"
        )
    options = EngineOptions(settings.engine, settings.precision, settings.threads)
    started = time.perf_counter()
    engine = load_engine(bundle, options)
    load_s = time.perf_counter() - started
    contenders = _contenders(settings, bundle, engine)
    pictures = {(item.name, item.steps): item.draw() for item in contenders}  # and warm up
    _measure(contenders, settings.seed)
    rows = _rows(contenders)
    engine_name = contenders[0].name
    show(
        "engine",
        rows,
        engine=engine_name,
        engine_version=engine.info.version,
        engine_load_s=round(load_s, 3),
        threads={"engine": engine.info.threads, "torch": torch.get_num_threads()},
        torch=torch.__version__,
        bundle=bundle.manifest.name,
        max_difference={
            steps: difference(pictures[engine_name, steps], pictures["diffusers float32", steps])
            for steps in settings.steps
        },
    )
    engine.close()
    return 0


def _contenders(settings: EngineBenchSettings, bundle: Bundle, engine: Engine) -> list[Contender]:
    """The engine first; every other one is compared with it."""
    info = engine.info
    latent, size = bundle.manifest.latent, bundle.manifest.default_size
    start = noise(
        settings.seed, (latent.channels, size.height // latent.downscale, size.width // latent.downscale)
    )
    prompt, rounds = settings.prompt, settings.rounds
    own = f"bundle {info.runtime} {info.precision}"
    contenders = [
        Contender(own, steps, steps, _through(engine, prompt, start, steps), rounds)
        for steps in settings.steps
    ]
    for name, dtype in DTYPES.items():
        student = _load(settings.student, dtype)
        for steps in settings.steps:
            draw = _diffusers(student, prompt, start, steps, 1.0)
            contenders.append(Contender(f"diffusers {name}", steps, steps, draw, rounds))
        if settings.teacher:
            steps = TEACHER_STEPS
            draw = _diffusers(_load(settings.teacher, dtype), prompt, start, steps, settings.guidance)
            contenders.append(Contender(f"teacher {name}", steps, 2 * steps, draw, settings.teacher_rounds))
    return contenders


def _load(folder: Path, dtype: torch.dtype) -> SD3Family:
    try:
        family = load_family(folder, dtype)
    except FamilyError as error:
        raise UsageError(str(error)) from error
    assert isinstance(family, SD3Family), "the pipeline call below is SD3's"
    family.pipeline.set_progress_bar_config(disable=True)
    return family


def _through(
    engine: Engine, prompt: str, start: NDArray[np.float32], steps: int
) -> Callable[[], NDArray[np.uint8]]:
    def draw() -> NDArray[np.uint8]:
        conditioning = engine.encode([engine.tokenize(prompt)])
        x = [engine.put(start)]
        for sigma, sigma_next in pairwise(engine.manifest.sigmas(steps)):
            x, _ = engine.denoise(x, [sigma], [sigma_next], conditioning)
        picture: NDArray[np.uint8] = engine.decode(x)[0]
        return picture

    return draw


def _diffusers(
    family: SD3Family, prompt: str, start: NDArray[np.float32], steps: int, guidance: float
) -> Callable[[], NDArray[np.uint8]]:
    latents = torch.from_numpy(start[None]).to(next(family.transformer.parameters()).dtype)
    arguments: dict[str, Any] = {
        "num_inference_steps": steps,
        "sigmas": np.linspace(1.0, 1.0 / steps, steps).tolist(),
        "guidance_scale": guidance,
        "height": start.shape[1] * family.downscale,
        "width": start.shape[2] * family.downscale,
        "max_sequence_length": family.t5_length,
    }

    def draw() -> NDArray[np.uint8]:
        return np.asarray(family.pipeline(prompt, latents=latents.clone(), **arguments).images[0])

    return draw


def _measure(contenders: list[Contender], seed: int) -> None:
    order = random.Random(seed)
    rounds = max(item.rounds for item in contenders)
    for number in range(rounds):
        # Contenders with fewer rounds are spread over the whole run.
        turn = [item for item in contenders if len(item.times) * rounds <= number * item.rounds]
        order.shuffle(turn)
        for item in turn:
            time.sleep(0.02)  # the last contender's idle worker threads spin for a moment
            started = time.perf_counter()
            item.draw()
            item.times.append(1e3 * (time.perf_counter() - started))
        print(f"\rround {number + 1}/{rounds}", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)


def _rows(contenders: list[Contender]) -> list[Mapping[str, Any]]:
    """Per contender its percentiles and `ratio`: its p50 over the engine's at as many steps (the teacher's: at 4)."""
    engine = contenders[0].name
    base = {item.steps: float(np.median(item.times)) for item in contenders if item.name == engine}
    rows: list[Mapping[str, Any]] = []
    for item in contenders:
        reference = item.steps if item.steps in base else 4 if 4 in base else max(base)
        stats = percentiles(item.times)
        rows.append(
            {
                "contender": item.name,
                "steps": item.steps,
                "NFE": item.nfe,
                "p50 ms": stats["p50"],
                "p95 ms": stats["p95"],
                "n": stats["n"],
                "ratio": round(float(np.median(item.times)) / base[reference], 2),
                "to engine at": f"{reference} steps",
            }
        )
    return rows
