"""`--engine auto`: whichever runtime makes this bundle's picture fastest on this machine, measured.

    engine = choose(bundle, EngineOptions("auto", cache_dir=cache))
    engine.info.why       # "openvino bf16 makes a 4-step picture in 21 ms, onnxruntime f32 in 61 ms"

The verdict is kept in the cache folder, for exactly this model, machine, thread count and these versions.
"""

from __future__ import annotations

import importlib.metadata
import json
import logging
import platform
import statistics
import time
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

from engines.base import AUTO, Engine, EngineOptions, load_runtime
from engines.bundle import Bundle
from engines.cache import CompiledCache, graph_hashes
from engines.errors import EngineError, RuntimeUnavailable
from engines.noise import noise

log = logging.getLogger("engines.choose")

ROUNDS = 5
BUDGET_S = 3.0
"""A candidate is measured until either is used up, after one picture that does not count."""

VERDICT = "fastest"


@dataclass(frozen=True)
class Measured:
    """One candidate and the median time of its picture (ms)."""

    runtime: str
    precision: str
    picture_ms: float

    def __str__(self) -> str:
        return f"{self.runtime} {self.precision} in {self.picture_ms:.3g} ms"


def choose(bundle: Bundle, options: EngineOptions) -> Engine:
    """Load `bundle` on the fastest runtime of `AUTO` that works here. Where only one does, nothing is measured.

    Raises:
        RuntimeUnavailable: none works, with each one's reason.
    """
    cache = CompiledCache.open(options.cache_dir, "auto", **_key(bundle, options))
    if (kept := cache.load(VERDICT)) is not None:
        verdict = json.loads(kept)
        try:
            engine = load_runtime(verdict["runtime"], bundle, options)
        except RuntimeUnavailable as error:
            log.warning(
                "%s was the fastest and does not load any more, all are measured anew: %s", kept, error
            )
        else:
            return _because(engine, f"{verdict['why']} (measured at an earlier start)")
    best, why = _measure_all(bundle, options)
    verdict = {"runtime": best.info.runtime, "why": why}
    cache.store(VERDICT, json.dumps(verdict).encode())
    return _because(best, why)


def _because(engine: Engine, why: str) -> Engine:
    engine.info = replace(engine.info, why=why)
    log.info("auto: %s", why)
    return engine


def _measure_all(bundle: Bundle, options: EngineOptions) -> tuple[Engine, str]:
    """The fastest engine, loaded, and the words for it; never more than two are loaded at once."""
    best: Engine | None = None
    measured: list[Measured] = []
    reasons: list[str] = []
    for name in AUTO:
        try:
            engine = load_runtime(name, bundle, options)
        except RuntimeUnavailable as error:
            reasons.append(str(error))
            continue
        try:
            found = Measured(name, engine.info.precision, _picture_ms(engine, bundle))
        except EngineError as error:
            reasons.append(f"{name} fails: {error}")
            engine.close()
            continue
        measured.append(found)
        if best is None or found.picture_ms == min(item.picture_ms for item in measured):
            if best is not None:
                best.close()
            best = engine
        else:
            engine.close()
    if best is None:
        raise RuntimeUnavailable("no runtime works here: " + "; ".join(reasons))
    measured.sort(key=lambda item: item.picture_ms)
    steps = bundle.manifest.default_steps
    if len(measured) == 1:
        return best, f"{measured[0].runtime} is the only runtime that works here: " + "; ".join(reasons)
    first, *rest = [str(item) for item in measured]
    return best, f"{first.replace(' in ', f' makes a picture of {steps} steps in ')}, {', '.join(rest)}"


def _picture_ms(engine: Engine, bundle: Bundle) -> float:
    """Median time of one whole picture of the default size and steps, prompt included."""
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
    return statistics.median(times[1:]) * 1000


def _key(bundle: Bundle, options: EngineOptions) -> dict[str, str | int | list[str]]:
    return {
        "model": graph_hashes(bundle.manifest),
        "sizes": [f"{size.width}x{size.height}" for size in bundle.manifest.sizes],
        "versions": [f"{name} {_version(name)}" for name in AUTO],
        "machine": _processor(),
        "precision": options.precision,
        "threads": options.threads,
        "invariant_batch": options.invariant_batch,
    }


def _version(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return "none"


def _processor(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """What tells machines apart as far as speed goes."""
    try:
        lines = cpuinfo.read_text(encoding="utf-8").splitlines()
    except OSError:  # not Linux
        return f"{platform.machine()} {platform.processor()}"
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"{platform.machine()} {len(names)} x {names[0] if names else 'unknown'}"
