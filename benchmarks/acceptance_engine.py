"""Operations on one engine: load it, have it answer, draw and be timed. Plain data in and out, arrays through files."""

from __future__ import annotations

import hashlib
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.acceptance_copies import Recorder, profiled, recorder_of, spoiled_captures
from benchmarks.acceptance_installed import check_installed
from engines.base import Engine, EngineOptions, GraphEngine, load_engine, runtime_class
from engines.bundle import Bundle, load_bundle
from engines.noise import noise

Job = tuple[str, int, int]
"""Prompt, seed, steps."""

Arrays = Mapping[str, NDArray[Any]]
Open = Callable[[Bundle, EngineOptions, Recorder | None], Engine]

STEPS_A_TURN = 3
"""Denoiser calls timed in one turn."""


def open_engine(bundle: Bundle, options: EngineOptions, recorder: Recorder | None) -> Engine:
    """The engine; with its CUDA calls recorded if there is somebody to record them."""
    if recorder is None:
        return load_engine(bundle, options)
    engine: Engine = runtime_class(options.runtime)(bundle, options, runtime=recorder)
    return engine


class EngineOperations:
    """At most one engine at a time."""

    def __init__(self, open_engine: Open = open_engine) -> None:
        self._open = open_engine
        self._engine: GraphEngine | None = None
        self._recorder: Recorder | None = None
        self._stack = ExitStack()
        self._ready: set[tuple[int, int, int]] = set()
        self._warnings = _Warnings()

    def precisions(self, bundle: str, runtime: str, device: str) -> list[str]:
        """What the runtime has on this machine for this bundle, its default first."""
        check_installed(runtime, device)
        return list(runtime_class(runtime).precisions(load_bundle(Path(bundle))))

    def load(
        self,
        bundle: str,
        options: Mapping[str, Any],
        device: str,
        *,
        spoil_captures: bool = False,
        record: bool = False,
    ) -> dict[str, Any]:
        """Load an engine, in place of the one that is loaded. Seconds are those of the engine alone."""
        self.close()
        folder = options.get("cache_dir")
        chosen = EngineOptions(**{**options, "cache_dir": Path(folder) if folder else None})
        check_installed(chosen.runtime, device, kernels=bool(chosen.fused_kernels))
        loaded = load_bundle(Path(bundle))
        self._recorder = recorder_of(chosen.runtime) if record else None
        self._warnings.attach(self._stack)
        if spoil_captures:
            self._stack.enter_context(spoiled_captures())
        began = time.perf_counter()
        engine = self._open(loaded, chosen, self._recorder)
        seconds = time.perf_counter() - began
        assert isinstance(engine, GraphEngine)
        self._engine = engine
        return {"load s": round(seconds, 3), "info": asdict(engine.info)}

    def fusion(self) -> dict[str, Any] | None:
        """What the compiler fused of the denoiser, and whether that will do; None where nobody says."""
        report_of = getattr(self._engine, "fusion_report", None)
        if report_of is None:
            return None
        report = report_of("denoiser")
        verdict: dict[str, Any] = {"said": str(report), **getattr(report, "__dict__", {})}
        try:
            report.require_attention("denoiser")
        except Exception as error:  # told beside the report, not instead of it
            verdict["fell apart"] = str(error)
        return verdict

    def outputs(self, references: str, out: str, alone: bool = False) -> list[str]:
        """What every component answers to every probe; `alone`: the denoiser, to one row at a time."""
        files = sorted(Path(references).glob("denoiser-*.npz" if alone else "*-*.npz"))
        for file in files:
            component = file.stem.rpartition("-")[0]
            if component == "picture":
                continue
            inputs = read(file, "input.")
            if alone:
                rows = range(len(next(iter(inputs.values()))))
                parts = [self._run(component, {key: a[[row]] for key, a in inputs.items()}) for row in rows]
                answers = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
            else:
                answers = dict(self._run(component, inputs))
            Path(out).mkdir(parents=True, exist_ok=True)
            np.savez(Path(out) / file.name, **answers)  # type: ignore[arg-type]
        return [file.name for file in files]

    def pictures(self, references: str, out: str, steps: int) -> None:
        """The reference's pictures, from its token ids and its noise."""
        engine = self._loaded
        for file in sorted(Path(references).glob("picture-*.npz")):
            ids, start = read(file, "ids."), read(file, "")["noise"]
            columns = [ids[spec.input].tolist() for spec in engine.manifest.tokenizers]
            tokens = [tuple(tuple(row) for row in rows) for rows in zip(*columns, strict=True)]
            image = _denoised(engine, engine.encode(tokens), list(start), [steps] * len(start))
            Path(out).mkdir(parents=True, exist_ok=True)
            np.savez(Path(out) / file.name, image=image)

    def draw(self, jobs: Sequence[Job], size: Sequence[int], out: str) -> list[str]:
        """All `jobs` in one batch, each leaving it when its schedule ends; the pictures' hashes.

        `size` is width and height in pixels; the pictures go to the file `out`.
        """
        engine = self._loaded
        prompts, seeds, steps = zip(*jobs, strict=True)
        conditioning = engine.encode([engine.tokenize(prompt) for prompt in prompts])
        image = _denoised(engine, conditioning, [noise(seed, self._latent(size)) for seed in seeds], steps)
        Path(out).parent.mkdir(parents=True, exist_ok=True)
        np.save(out, image, allow_pickle=False)
        return [hashlib.sha256(picture.tobytes()).hexdigest() for picture in image]

    def turn(self, batch: int, size: Sequence[int], steps: int) -> dict[str, list[float]]:
        """Milliseconds of some denoiser calls, and of one whole picture; the first turn of a shape warms it up."""
        engine, key = self._loaded, (batch, size[0], size[1])
        tokens = [engine.tokenize("a red apple")] * batch
        start = [noise(seed, self._latent(size)) for seed in range(batch)]
        sigmas = engine.manifest.sigmas(steps)

        def picture() -> None:
            _denoised(engine, engine.encode(tokens), start, [steps] * batch)

        if key not in self._ready:
            picture()
            self._ready.add(key)
        conditioning, samples = engine.encode(tokens), [engine.put(row) for row in start]

        def step() -> None:
            engine.denoise(samples, [sigmas[0]] * batch, [sigmas[1]] * batch, conditioning)

        step()  # another contender had the device
        return {"step ms": [_ms(step) for _ in range(STEPS_A_TURN)], "picture ms": [_ms(picture)]}

    def copies(self, batch: int, size: Sequence[int]) -> dict[str, Any]:
        """What one denoiser call copies to and from the host, as torch's profiler and as our own calls tell it."""
        engine = self._loaded
        conditioning = engine.encode([engine.tokenize("a red apple")] * batch)
        samples = [engine.put(noise(seed, self._latent(size))) for seed in range(batch)]

        def step() -> None:
            engine.denoise(samples, [1.0] * batch, [0.5] * batch, conditioning)

        step()
        driver = None
        if self._recorder is not None:
            self._recorder.copies.clear()
            step()
            driver = list(self._recorder.copies)
        return {"profiler": profiled(step), "driver": driver}

    def warnings(self) -> list[str]:
        """What the engine has warned of since it was loaded."""
        return list(self._warnings.said)

    def close(self) -> None:
        """Free the engine."""
        engine, self._engine = self._engine, None
        self._ready.clear()
        self._stack.close()
        if engine is not None:
            engine.close()

    @property
    def _loaded(self) -> GraphEngine:
        assert self._engine is not None, "no engine is loaded"
        return self._engine

    def _run(self, component: str, inputs: Arrays) -> Arrays:
        return self._loaded.run(component, inputs)

    def _latent(self, size: Sequence[int]) -> tuple[int, int, int]:
        latent = self._loaded.manifest.latent
        return latent.channels, size[1] // latent.downscale, size[0] // latent.downscale


def read(file: Path, prefix: str) -> dict[str, NDArray[Any]]:
    """The arrays of an `.npz` whose names begin with `prefix`, without it."""
    with np.load(file, allow_pickle=False) as arrays:
        return {name.removeprefix(prefix): arrays[name] for name in arrays.files if name.startswith(prefix)}


class _Warnings(logging.Handler):
    """Keeps what `engines` warns of."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.said: list[str] = []

    def attach(self, stack: ExitStack) -> None:
        self.said.clear()
        logger = logging.getLogger("engines")
        logger.addHandler(self)
        stack.callback(logger.removeHandler, self)

    def emit(self, record: logging.LogRecord) -> None:
        self.said.append(record.getMessage())


def _denoised(
    engine: Engine, conditioning: Sequence[Any], start: Sequence[NDArray[np.float32]], steps: Sequence[int]
) -> NDArray[np.uint8]:
    samples = [engine.put(row) for row in start]
    schedules = [list(pairwise(engine.manifest.sigmas(count))) for count in steps]
    for step in range(max(steps)):
        rows = [row for row, schedule in enumerate(schedules) if step < len(schedule)]
        moved, _ = engine.denoise(
            [samples[row] for row in rows],
            [schedules[row][step][0] for row in rows],
            [schedules[row][step][1] for row in rows],
            [conditioning[row] for row in rows],
        )
        for row, sample in zip(rows, moved, strict=True):
            samples[row] = sample
    return engine.decode(samples)


def _ms(call: Callable[[], object]) -> float:
    began = time.perf_counter()
    call()
    return 1e3 * (time.perf_counter() - began)
