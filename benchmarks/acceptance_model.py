"""The model of an acceptance: a student, its bundle, and torch's own answers in float32 on the CPU to compare with.

Each of these runs in a process of its own, so that its peak of memory is its own.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from engines.bundle import Size, load_bundle
from engines.export.export import ExportOptions, export_bundle
from engines.export.onnx_file import round_to_float16_
from engines.export.parity import Probe, answer
from engines.export.plan import make_plan
from engines.families.base import load_family

SEED = 1
"""Of what is compared; the export compares with seed 0."""

REFERENCE_RUNTIME = "onnxruntime:f32"
"""What the export itself holds to torch; every other runtime is examined afterwards, by itself."""

LONGCAT = "longcat"
"""The scale that is another family's; all others are SD3's."""

LONGCAT_LAYERS = 8
"""Of LongCat-Image's 30 blocks, as wide as `benchmarks/random_longcat.py` makes them."""

STATUS = Path("/proc/self/status")


def build_student(folder: str, scale: str) -> dict[str, Any]:
    """A model of random weights: an SD3 of `scale`, or a LongCat-Image."""
    from benchmarks.random_longcat import build_random_longcat
    from benchmarks.random_sd3 import build_random_sd3

    began = time.perf_counter()
    shutil.rmtree(folder, ignore_errors=True)
    if scale == LONGCAT:
        build_random_longcat(Path(folder), LONGCAT_LAYERS)
    else:
        build_random_sd3(Path(folder), scale)
    return {"s": round(time.perf_counter() - began, 1), "MB": _megabytes(Path(folder)), "peak MB": peak_mb()}


def export(
    student: str, out: str, sizes: Sequence[Sequence[int]], batches: Sequence[int], steps: int
) -> dict[str, Any]:
    """The bundle in float32 and bfloat16, weights included. `sizes`: width and height; none are the model's own and
    half of each side."""
    began = time.perf_counter()
    options = ExportOptions(
        default_steps=steps,
        max_steps=max(8, steps),
        sizes=tuple(Size(width=width, height=height) for width, height in sizes or own_sizes(Path(student))),
        precisions=("float32", "bfloat16"),
        weights=True,
        batches=tuple(batches),
        runtimes=(REFERENCE_RUNTIME,),
    )
    report = export_bundle(Path(student), Path(out), options, progress=lambda text: print(text, flush=True))
    return {
        "s": round(time.perf_counter() - began, 1),
        "MB": round(report.bytes / 1e6, 1),
        "peak MB": peak_mb(),
        "sizes": [[size.width, size.height] for size in report.manifest.sizes],
        "family": report.manifest.family,
    }


def own_sizes(student: Path) -> list[tuple[int, int]]:
    """The model's own size, and half of each side where its patches allow that."""
    family = load_family(student, torch.float32, ())
    height, width = (side * family.downscale for side in family.latent_size)
    unit = family.downscale * family.patch_size
    halves = [(width // 2, height // 2)] if not (width // 2 % unit or height // 2 % unit) else []
    return [(width, height), *halves]


def write_references(
    student: str, bundle: str, folder: str, batches: Sequence[int], steps: int
) -> dict[str, Any]:
    """Torch's answers, a file a probe: `input.…`, and outputs with the `original.…` weights and the `stored.…` ones."""
    began = time.perf_counter()
    root = Path(folder)
    shutil.rmtree(root, ignore_errors=True)
    root.mkdir(parents=True)
    family = load_family(Path(student), torch.float32, ())
    plan = make_plan(family, load_bundle(Path(bundle)).manifest.sizes, tuple(batches), steps, SEED)
    for stage in plan.stages(lambda loaded: None):
        loaded = load_family(Path(student), torch.float32, (stage.part,))
        module = stage.module(loaded)
        for probe in stage.probes:
            answer(stage.name, module, probe, "original")
        stage.meanwhile(loaded)
        round_to_float16_(module)
        whole = [probe for probe in stage.probes if not probe.short]
        for number, probe in enumerate(whole):
            answer(stage.name, module, probe, "stored")
            _save(root / f"{stage.name}-{number:02}.npz", probe)
        del module, loaded
    for number, pictures in enumerate(plan.pictures):
        assert pictures.image is not None
        ids = {f"ids.{name}": tensor.numpy() for name, tensor in pictures.ids.items()}
        np.savez(
            root / f"picture-{number:02}.npz",
            noise=pictures.noise.numpy(),
            image=pictures.image.numpy(),
            **ids,  # type: ignore[arg-type]
        )
    return {"s": round(time.perf_counter() - began, 1), "MB": _megabytes(root), "peak MB": peak_mb()}


def _save(path: Path, probe: Probe) -> None:
    arrays = {f"input.{name}": tensor.numpy() for name, tensor in probe.inputs.items()}
    for weights, answers in probe.answers.items():
        arrays |= {f"{weights}.{name}": array for name, array in answers.items()}
    np.savez(path, **arrays)  # type: ignore[arg-type]


def peak_mb() -> float:
    """The most memory that this process has had, in 10⁶ bytes; 0 where the system does not say."""
    try:
        lines = STATUS.read_text(encoding="utf-8").splitlines()
    except OSError:
        return 0.0
    kibibytes = [int(line.split()[1]) for line in lines if line.startswith("VmHWM:")]
    return round(kibibytes[0] * 1024 / 1e6, 1) if kibibytes else 0.0


def _megabytes(folder: Path) -> float:
    return round(sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) / 1e6, 1)
