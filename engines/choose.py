"""`--engine auto`: whichever runtime makes this bundle's picture fastest on this machine, measured.

    engine = choose(bundle, EngineOptions("auto", cache_dir=cache))
    engine.info.why       # "openvino bf16 makes a picture of 4 steps in 21 ms, onnxruntime f32 in 61 ms"

Where there is an NVIDIA GPU, its runtimes are measured, too: their first start compiles, which takes minutes. Where the
number of threads is left to a CPU's runtime, that is measured with half the processors as well: two hardware threads
of one core often get in each other's way. (Streams are no choice: a server's calls come one after another, and one
stream has all threads.) The verdict is kept in the cache folder, for exactly this model, machine, thread count, code
and versions.
"""

from __future__ import annotations

import importlib.metadata
import json
import logging
import statistics
import time
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

from engines import processor
from engines.base import AUTO, AUTO_GPU, Engine, EngineOptions, load_runtime
from engines.bundle import Bundle
from engines.cache import CompiledCache, code_hash, graph_hashes
from engines.errors import EngineError, RuntimeUnavailable
from engines.noise import noise

log = logging.getLogger("engines.choose")

ROUNDS = 5
BUDGET_S = 3.0
"""A candidate is measured until either is used up, after one picture that does not count."""

HOPELESS = 2.0
"""A candidate whose first picture that counts takes so many times the fastest one's is measured no longer."""

GAIN = 0.95
"""Fewer threads are taken where a picture then takes less than this share of the time: noise is no reason."""

VERDICT = "fastest"

PACKAGES = ("openvino", "onnxruntime", "onnxruntime-gpu", "tensorrt-rtx", "tensorrt", "torch")
"""Distributions whose versions make a verdict another."""


@dataclass(frozen=True)
class Measured:
    """One candidate and the median time of its picture (ms)."""

    runtime: str
    precision: str
    picture_ms: float
    threads: int = 0

    def __str__(self) -> str:
        threads = f" with {self.threads} thread{'s' * (self.threads > 1)}" if self.threads else ""
        return f"{self.runtime} {self.precision}{threads} in {self.picture_ms:.3g} ms"


def choose(bundle: Bundle, options: EngineOptions) -> Engine:
    """Load `bundle` on the fastest runtime of `AUTO` that works here, with a GPU: and of `AUTO_GPU`.

    Raises:
        RuntimeUnavailable: none works, with each one's reason.
    """
    cache = CompiledCache.open(options.cache_dir, "auto", **_key(bundle, options))
    if (kept := cache.load(VERDICT)) is not None:
        verdict = json.loads(kept)
        try:
            engine = load_runtime(
                verdict["runtime"], bundle, _with_threads(options, verdict["runtime"], verdict["threads"])
            )
        except RuntimeUnavailable as error:
            log.warning(
                "%s was the fastest and does not load any more, all are measured anew: %s", kept, error
            )
        else:
            return _because(engine, f"{verdict['why']} (measured at an earlier start)")
    best, threads, why = _measure_all(bundle, options)
    verdict = {"runtime": best.info.runtime, "threads": threads, "why": why}
    cache.store(VERDICT, json.dumps(verdict).encode())
    return _because(best, why)


def _with_threads(options: EngineOptions, name: str, threads: int = 0) -> EngineOptions:
    """`threads`, or else what was asked for, which means the CPU's: runtimes of GPUs refuse a number."""
    return replace(options, threads=0 if name in AUTO_GPU else threads or options.threads)


def _because(engine: Engine, why: str) -> Engine:
    engine.info = replace(engine.info, why=why)
    log.info("auto: %s", why)
    return engine


def _measure_all(bundle: Bundle, options: EngineOptions) -> tuple[Engine, int, str]:
    """The fastest engine, loaded, its number of threads (0: its own choice), and the words for it.

    No two are in memory together: the fastest is loaded again at the end, from the cache if there is one.
    """
    measured: list[Measured] = []
    reasons: list[str] = []

    def measure(name: str, threads: int = 0) -> None:
        fastest = min((item.picture_ms for item in measured), default=float("inf"))
        try:
            engine = load_runtime(name, bundle, _with_threads(options, name, threads))
        except RuntimeUnavailable as error:
            reasons.append(str(error))
            return
        try:
            found = Measured(name, engine.info.precision, _picture_ms(engine, bundle, fastest), threads)
        except EngineError as error:
            reasons.append(f"{name} fails: {error}")
            return
        finally:
            engine.close()
        first = found.picture_ms < fastest * (GAIN if threads else 1)
        measured.insert(0 if first else len(measured), found)

    for name in (*(AUTO_GPU if processor.gpus() else ()), *AUTO):
        measure(name)
    if not measured:
        raise RuntimeUnavailable("no runtime works here: " + "; ".join(reasons))
    works = len(measured)
    if options.threads == 0 and measured[0].runtime in AUTO and (half := processor.available() // 2):
        measure(measured[0].runtime, half)
    best, *rest = measured
    others = sorted(rest, key=lambda item: item.picture_ms)
    steps = bundle.manifest.default_steps
    why = ", ".join(
        [f"{best}".replace(" in ", f" makes a picture of {steps} steps in ", 1), *map(str, others)]
    )
    if works == 1:
        why = f"{best.runtime} is the only runtime that works here: {'; '.join(reasons)}; {why}"
    engine = load_runtime(best.runtime, bundle, _with_threads(options, best.runtime, best.threads))
    return engine, best.threads, why


def _picture_ms(engine: Engine, bundle: Bundle, fastest: float) -> float:
    """Median time of a whole picture of the default size and steps, prompt included; of one if that is hopeless.

    `fastest`: what the fastest until now takes.
    """
    latent, size = bundle.manifest.latent, bundle.manifest.default_size
    start = noise(0, (latent.channels, size.height // latent.downscale, size.width // latent.downscale))
    tokens = engine.tokenize("a photo")
    times: list[float] = []
    began = time.perf_counter()
    while len(times) <= ROUNDS and (len(times) < 2 or time.perf_counter() - began < BUDGET_S):
        before = time.perf_counter()
        conditioning, x = engine.encode([tokens]), [engine.put(start)]
        for sigma, sigma_next in pairwise(bundle.manifest.sigmas(bundle.manifest.default_steps)):
            x, _ = engine.denoise(x, [sigma], [sigma_next], conditioning)
        engine.decode(x)
        times.append(time.perf_counter() - before)
        if len(times) == 2 and times[1] * 1000 > HOPELESS * fastest:
            break
    return statistics.median(times[1:]) * 1000


def _key(bundle: Bundle, options: EngineOptions) -> dict[str, str | int | list[str]]:
    return {
        "model": graph_hashes(bundle.manifest),
        "sizes": [f"{size.width}x{size.height}" for size in bundle.manifest.sizes],
        "versions": [f"{name} {_version(name)}" for name in PACKAGES],
        "code": code_hash(*(str(path) for path in Path(__file__).parent.glob("*.py"))),
        "machine": [processor.name(), *processor.gpus()],
        "processors": processor.available(),
        "precision": options.precision,
        "threads": options.threads,
        "invariant_batch": options.invariant_batch,
    }


def _version(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return "none"
