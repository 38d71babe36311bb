"""`cdm-bench student`: the few-step student beside its teacher on the same engine, end to end and by its parts.

A student's picture is one prompt encoded, N steps, one decoding. A teacher's is two prompts encoded (the picture's and
the empty one), M steps that evaluate the denoiser for both at once (classifier-free guidance), one decoding. Both are
made whole, in turns, the guidance included, and timed from stage to stage.

Without --teacher the student's own weights stand for the teacher's: the same architecture, so the same time.

    cdm-bench student --bundle bundles/emoji --steps 4 --teacher-steps 28 --threads 2
"""

from __future__ import annotations

import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from benchmarks.report import show
from benchmarks.turns import spread, take_turns
from engines.base import Engine, EngineOptions, load_engine
from engines.bundle import Bundle, Manifest, load_bundle
from engines.cli import CommandSettings, UsageError
from engines.noise import noise

PARTS = ("text", "denoiser", "decoder")
WHOLE = "end to end"
Rows = Sequence[NDArray[np.float32]]
"""Pictures' latents, as the runtimes of the host hold them."""


class StudentBenchSettings(CommandSettings, env_prefix="CDM_BENCH_STUDENT_"):
    """Time a student's pictures and its teacher's, guided, on the same engine: end to end, and text, denoiser, decoder.

    The teacher evaluates the denoiser twice per step and picture, in one batch.
    """

    bundle: Path = Field(description="bundle folder of the student")
    teacher: Path | None = Field(
        None, description="bundle folder of the teacher; none: the student's weights stand for the teacher's"
    )
    steps: int = Field(4, ge=1, description="the student's steps")
    teacher_steps: int = Field(28, ge=1, description="the teacher's steps")
    guidance: float = Field(4.0, gt=1, description="the teacher's guidance scale")
    batch: int = Field(1, ge=1, le=32, description="pictures per request")
    engine: Literal["auto", "openvino", "onnxruntime"] = Field("auto", description="runtime of both")
    precision: str = Field("auto", description="precision of both")
    threads: int = Field(0, ge=0, description="threads; 0 lets the runtime choose")
    rounds: int = Field(10, ge=1, description="measured rounds; both make their pictures once in each")
    prompt: str = Field("red apple", description="the request's prompt")
    seed: int = Field(0, ge=0, description="seed of the pictures and of the order")


class Stopwatch:
    """What every part took in every request, in milliseconds."""

    def __init__(self) -> None:
        self.parts: dict[str, list[float]] = defaultdict(list)
        self._last = 0.0

    def start(self) -> None:
        self._last = time.perf_counter()

    def lap(self, part: str) -> None:
        now = time.perf_counter()
        self.parts[part].append(1e3 * (now - self._last))
        self._last = now


def run(settings: StudentBenchSettings) -> int:
    """Measure, print the table and the JSON line.

    Raises:
        UsageError: steps that the student has no schedule for.
        BundleError, RuntimeUnavailable: a bundle cannot be served, or not so.
    """
    bundle = load_bundle(settings.bundle)
    if settings.steps not in bundle.manifest.schedules:
        raise UsageError(
            f"--steps={settings.steps}: the bundle has schedules for {sorted(bundle.manifest.schedules)}"
        )
    engine = _load(settings, bundle)
    teacher_bundle = load_bundle(settings.teacher) if settings.teacher is not None else bundle
    teacher = _load(settings, teacher_bundle) if settings.teacher is not None else engine
    watches = {"student": Stopwatch(), "teacher": Stopwatch()}
    sigmas = bundle.manifest.sigmas(settings.steps)
    calls = {
        "student": drawing(
            engine, settings.prompt, starts(bundle.manifest, settings), sigmas, watches["student"]
        ),
        "teacher": drawing(
            teacher,
            settings.prompt,
            starts(teacher_bundle.manifest, settings),
            teacher_sigmas(teacher_bundle.manifest, settings.teacher_steps),
            watches["teacher"],
            settings.guidance,
        ),
    }
    whole = take_turns(calls, settings.rounds, settings.seed)
    times: dict[str, dict[str, list[float]]] = {}
    for who, watch in watches.items():
        # The first call only warms up.
        times[who] = {**{part: found[1:] for part, found in watch.parts.items()}, WHOLE: whole[who]}
    weights = "its own" if settings.teacher is not None else "the student's (same architecture, same time)"
    stand_in = "" if settings.teacher is not None else ", student's weights"
    labels = {
        "student": f"student, {settings.steps} steps",
        "teacher": f"teacher, {settings.teacher_steps} steps, guided{stand_in}",
    }
    show(
        "student",
        [_row(part, times, labels) for part in (*PARTS, WHOLE)],
        bundle=bundle.manifest.name,
        teacher=teacher_bundle.manifest.name,
        teacher_weights=weights,
        engine=f"{engine.info.runtime} {engine.info.precision}",
        teacher_engine=f"{teacher.info.runtime} {teacher.info.precision}",
        threads=engine.info.threads,
        batch=settings.batch,
        size=bundle.manifest.default_size.model_dump(),
        teacher_size=teacher_bundle.manifest.default_size.model_dump(),
        evaluations={"student": settings.steps, "teacher": 2 * settings.teacher_steps},
        rounds=settings.rounds,
    )
    for loaded in {id(item): item for item in (engine, teacher)}.values():
        loaded.close()
    return 0


def _load(settings: StudentBenchSettings, bundle: Bundle) -> Engine:
    options = EngineOptions(
        settings.engine, settings.precision, settings.threads, max_batch=max(2 * settings.batch, 2)
    )
    return load_engine(bundle, options)


def starts(manifest: Manifest, settings: StudentBenchSettings) -> list[NDArray[np.float32]]:
    """The pictures' noise, of the manifest's default size."""
    latent, size = manifest.latent, manifest.default_size
    shape = (latent.channels, size.height // latent.downscale, size.width // latent.downscale)
    return [noise(settings.seed + number, shape) for number in range(settings.batch)]


def teacher_sigmas(manifest: Manifest, steps: int) -> tuple[float, ...]:
    """The bundle's own schedule, or even steps where it has none so long: a step takes the same time at any σ."""
    if steps in manifest.schedules:
        return manifest.sigmas(steps)
    return tuple(float(sigma) for sigma in np.linspace(1.0, 0.0, steps + 1))


def drawing(
    engine: Engine,
    prompt: str,
    start: Rows,
    sigmas: tuple[float, ...],
    watch: Stopwatch,
    guidance: float = 1.0,
) -> Callable[[], NDArray[np.uint8]]:
    """What makes the pictures and tells `watch` of every part; guided where `guidance` is not 1."""
    prompts = [""] * (len(start) if guidance != 1 else 0) + [prompt] * len(start)

    def draw() -> NDArray[np.uint8]:
        watch.start()
        # One row per different prompt: a server encodes each once, too.
        different = list(dict.fromkeys(prompts))
        encoded = dict(
            zip(different, engine.encode([engine.tokenize(text) for text in different]), strict=True)
        )
        conditioning = [encoded[text] for text in prompts]
        watch.lap("text")
        x = [engine.put(row) for row in start]
        for sigma, sigma_next in pairwise(sigmas):
            rows = [*x, *x] if guidance != 1 else x
            count = len(rows)
            x, _ = engine.denoise(rows, [sigma] * count, [sigma_next] * count, conditioning)
            if guidance != 1:
                x = guided(x, guidance)
        watch.lap("denoiser")
        picture = engine.decode(x)
        watch.lap("decoder")
        return picture

    return draw


def guided(rows: Rows, guidance: float) -> list[NDArray[np.float32]]:
    """Classifier-free guidance after the Euler step: x' is linear in v, so x'_∅ + g·(x'_c − x'_∅) is the step of
    v_∅ + g·(v_c − v_∅). `rows` are the unconditional ones, then the conditional ones."""
    half = len(rows) // 2
    return [
        uncond + np.float32(guidance) * (cond - uncond)
        for uncond, cond in zip(rows[:half], rows[half:], strict=True)
    ]


def _row(part: str, times: dict[str, dict[str, list[float]]], labels: dict[str, str]) -> dict[str, Any]:
    student, teacher = times["student"][part], times["teacher"][part]
    return {
        "part": part,
        **spread(f"{labels['student']},", student),
        **spread(f"{labels['teacher']},", teacher),
        "teacher / student": statistics.median(teacher) / statistics.median(student),
    }
