"""Every runtime that works here runs the written bundle, in each of its precisions, at every shape: is it the model?

What is measured goes into the manifest; above tolerance there is no bundle.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

import numpy as np
import torch
from numpy.typing import NDArray

from engines import processor
from engines.base import RUNTIMES, Engine, EngineOptions, GraphEngine, load_engine, runtime_class
from engines.bundle import Bundle, Fusion, Manifest, Parity, PictureParity, Size
from engines.errors import ExportError, RuntimeUnavailable
from engines.export.fusion import ReportsFusion, judge, with_fusions
from engines.export.parity import Probe, compare
from engines.export.plan import Pictures, Plan
from engines.export.tolerance import Tolerance

DEFAULT = ("onnxruntime", "openvino")
"""Runtimes that prove themselves unless others are named: those of every CPU."""

PRECISIONS = ("f32", "bf16", "int8")

NEEDS_WEIGHTS = ("torch", "aotinductor")
NEEDS_GPU = ("tensorrt-rtx", "tensorrt")
RUNS_NO_GRAPH = {
    "fake": "it runs no model",
    "triton": "it runs what a Triton server has, not what is written here",
    "triton-cuda": "it runs what a Triton server has, not what is written here",
}

SERVED_BATCHES = (1, 2, 4, 8)
"""Compared whatever `batches` says: runtimes compile graphs of their own for these."""

EQUAL_DB = 99.0
"""PSNR of pictures that are equal: infinity is no JSON number."""


def check_runtimes(asked: Sequence[str], weights: bool) -> None:
    """Refuse, before anything is exported, runtimes that could not prove themselves on it.

    Raises:
        ExportError: no such runtime or precision, it runs no graph of a bundle, its packages or its GPU are missing
            here, or it needs the student's weights in the bundle.
    """
    for text in asked:
        name, _, precision = text.partition(":")
        if name not in RUNTIMES or name in RUNS_NO_GRAPH:
            why = RUNS_NO_GRAPH.get(name, "there is no such runtime")
            allowed = ", ".join(runtime for runtime in RUNTIMES if runtime not in RUNS_NO_GRAPH)
            raise ExportError(f"--verify {text}: {why}; allowed: {allowed}")
        if precision and precision not in PRECISIONS:
            raise ExportError(f"--verify {text}: {precision!r} is none of {', '.join(PRECISIONS)}")
        if name in NEEDS_WEIGHTS and not weights:
            raise ExportError(f"--verify {text}: {name} runs the student's own folder; add --weights")
        if name in NEEDS_GPU and not processor.gpus():
            raise ExportError(
                f"--verify {text}: there is no NVIDIA GPU here; leave it out, or use --fusion-check, which needs none"
            )
        try:
            runtime_class(name)
        except RuntimeUnavailable as error:
            raise ExportError(f"--verify {text}: {error}") from error


def verify(
    bundle: Bundle,
    plan: Plan,
    runtimes: tuple[str, ...],
    tolerance: Tolerance,
    progress: Callable[[str], None],
) -> Manifest:
    """The bundle's manifest with parity and fusions of `runtimes` (empty: those of `DEFAULT` that are installed) added.

    A runtime may be named with a precision (`onnxruntime:int8`); else it is held to each of its own.

    Raises:
        ExportError: a runtime that was named is not there, one is off by more than `tolerance`, or its compiler leaves
            an attention in parts.
    """
    parities: dict[str, list[Parity]] = {name: [] for name in bundle.manifest.components}
    fusions: dict[str, list[Fusion]] = {name: [] for name in parities}
    pictures: list[PictureParity] = []
    for asked in runtimes or DEFAULT:
        name, _, precision = asked.partition(":")
        try:
            precisions = (precision,) if precision else runtime_class(name).precisions(bundle)
        except RuntimeUnavailable as error:
            if runtimes:
                raise ExportError(str(error)) from error
            progress(f"{name} is left out: {error}")
            continue
        for precision in precisions:
            progress(f"parity: {name} {precision}")
            options = EngineOptions(name, precision, max_batch=max(*plan.batches, *SERVED_BATCHES))
            engine = load_engine(bundle, options)
            assert isinstance(engine, GraphEngine)
            try:
                if (name, precision) != ("onnxruntime", "f32"):  # which every graph has been held to already
                    for component, found in parities.items():
                        found += _components(engine, component, plan, tolerance)
                if isinstance(engine, ReportsFusion):
                    for component, judged in fusions.items():
                        report = engine.fusion_report(component)
                        judged += judge(report, component, (name, precision, ""), tolerance, progress)
                pictures += [_pictures(engine, reference, plan, tolerance) for reference in plan.pictures]
            finally:
                engine.close()
    components = {
        name: component.model_copy(update={"parity": (*component.parity, *parities[name])})
        for name, component in bundle.manifest.components.items()
    }
    proved = bundle.manifest.model_copy(update={"components": components, "pictures": tuple(pictures)})
    return with_fusions(proved, fusions)


def _components(engine: GraphEngine, component: str, plan: Plan, tolerance: Tolerance) -> list[Parity]:
    found = []
    whole = [probe for probe in plan.probes[component] if not probe.short]  # as serving fills the text
    for probe in (*whole, *(served(whole, plan.sizes[0]) if component == "denoiser" else ())):
        inputs = {name: tensor.numpy() for name, tensor in probe.inputs.items()}
        actual = dict(engine.run(component, inputs))
        found.append(compare(probe, "original", actual, engine.info.runtime, engine.info.precision))
        tolerance.check(component, found[-1])
    return found


def served(probes: Sequence[Probe], size: Size) -> list[Probe]:
    """Probes of the `SERVED_BATCHES` that `probes` lack, of their rows at `size`: no row depends on another."""
    rows = [probe for probe in probes if probe.size == size]
    inputs = {name: torch.cat([probe.inputs[name] for probe in rows]) for name in rows[0].inputs}
    answers = {
        name: np.concatenate([probe.answers["original"][name] for probe in rows])
        for name in rows[0].answers["original"]
    }
    there, known = sum(probe.batch for probe in rows), {probe.batch for probe in rows}
    return [
        Probe(
            batch,
            size,
            {name: tensor[:batch] for name, tensor in inputs.items()},
            answers={"original": {name: array[:batch] for name, array in answers.items()}},
        )
        for batch in SERVED_BATCHES
        if batch not in known and batch <= there
    ]


def _pictures(engine: Engine, reference: Pictures, plan: Plan, tolerance: Tolerance) -> PictureParity:
    assert reference.image is not None
    sigmas = plan.sigmas(plan.steps)
    found = _draw(engine, reference, sigmas).astype(np.float64)
    error = found - reference.image.numpy().astype(np.float64)
    mean_square = float(np.mean(error**2))
    parity = PictureParity(
        runtime=engine.info.runtime,
        precision=engine.info.precision,
        size=reference.size,
        steps=plan.steps,
        batch=len(found),
        psnr=round(min(EQUAL_DB, 10 * np.log10(255**2 / mean_square)), 2) if mean_square else EQUAL_DB,
        max_abs=int(np.abs(error).max()),
    )
    tolerance.check_picture(parity)
    return parity


def _draw(engine: Engine, reference: Pictures, sigmas: tuple[float, ...]) -> NDArray[np.uint8]:
    columns = [reference.ids[spec.input].tolist() for spec in engine.manifest.tokenizers]
    conditioning = engine.encode([tuple(tuple(ids) for ids in row) for row in zip(*columns, strict=True)])
    samples = [engine.put(noise) for noise in reference.noise.numpy()]
    for sigma, sigma_next in pairwise(sigmas):
        rows = len(samples)
        samples, _ = engine.denoise(samples, [sigma] * rows, [sigma_next] * rows, conditioning)
    return engine.decode(samples)
