"""The two forms that `cdm-bench rewrites` compares: a bundle with all rewrites, and one whose denoiser lacks one.

    root = work / exports_folder(model, "512x512")
    every = with_all(model, root, "512x512", "openvino:bf16")
    name, bundle = without(model, every, "rotate_half", root)      # its other files are those of `every`

What is there already, whole and of the same model, size and code, is taken as it is.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import sys
from functools import partial
from pathlib import Path

import torch

from benchmarks.roofline import denoiser_inputs
from engines.bundle import MANIFEST, Bundle, Size, load_bundle, write_manifest
from engines.errors import BundleError
from engines.export.export import ExportOptions, export_bundle
from engines.export.graphs import DenoiserGraph
from engines.export.onnx_file import GraphModule
from engines.export.parity import EXAMPLE_BATCH, Probe
from engines.export.settings import read_size
from engines.export.stages import Stage, run_stage
from engines.export.tolerance import Tolerance
from engines.families.base import Family, load_family
from engines.files import replace_folder, sha256_files

ROOT = Path(__file__).resolve().parent.parent
EXPORTER = ("engines/export", "engines/families")
"""Code that shapes a bundle: a kept one is of no use once it has changed."""

TOLERANCE = Tolerance(unfused=True)
"""An attention that falls apart without a rewrite is what is measured here, and no mistake."""


def exports_folder(model: Path, size: str) -> str:
    """Named by what shapes an export: the model's files by name, size and time, the picture size, and the code here."""
    files = [path for path in sorted(model.rglob("*")) if path.is_file()]
    stats = [(path.relative_to(model).as_posix(), path.stat()) for path in files]
    code = [path for folder in EXPORTER for path in (ROOT / folder).rglob("*.py")]
    parts = [f"{name} {stat.st_size} {stat.st_mtime_ns}" for name, stat in stats]
    text = "\n".join([*parts, model.resolve().name, size, sha256_files(ROOT, code)])
    return f"exports-{hashlib.sha256(text.encode()).hexdigest()[:16]}"


def with_all(model: Path, root: Path, size: str, runtime: str) -> Bundle:
    """The whole bundle, with all rewrites. `size` as WxH, or empty; it is verified on `runtime`."""
    out = root / "all"
    if (kept := _kept(out)) is not None:
        return kept
    print("exporting with all rewrites", file=sys.stderr, flush=True)
    options = ExportOptions(
        default_steps=1,
        max_steps=1,
        sizes=(read_size(size),) if size else (),
        runtimes=(runtime,),
        batches=(1,),
        tolerance=TOLERANCE,
    )
    export_bundle(model, out, options)
    return load_bundle(out)


def without(model: Path, every: Bundle, name: str, root: Path) -> tuple[str, Bundle]:
    """`every` with a denoiser that was exported without rewrite `name`; its other files are the same ones."""
    out = root / f"without-{name}"
    if (kept := _kept(out)) is not None:
        return name, kept
    print(f"exporting without {name}", file=sys.stderr, flush=True)
    partial_folder = root / f".without-{name}.partial"
    shutil.rmtree(partial_folder, ignore_errors=True)
    own = [ref.file for graph in every.manifest.components["denoiser"].graphs.values()
           for ref in (graph.file, *graph.data)]  # fmt: skip
    shutil.copytree(
        every.root, partial_folder, copy_function=_link, ignore=lambda _, names: {*own, MANIFEST} & {*names}
    )
    size = every.manifest.default_size
    stage = _denoiser_stage(every, size, name)
    denoiser = run_stage(stage, partial(_load, model), partial_folder, ("float32",), TOLERANCE)
    components = {**every.manifest.components, "denoiser": denoiser}
    write_manifest(partial_folder, every.manifest.model_copy(update={"components": components}))
    replace_folder(partial_folder, out)
    return name, load_bundle(out)


def _kept(folder: Path) -> Bundle | None:
    try:
        return load_bundle(folder)
    except BundleError:
        return None


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:  # a file system without links
        shutil.copyfile(source, target)


def _denoiser_stage(every: Bundle, size: Size, skipped: str) -> Stage:
    """The denoiser alone, its text made up: what a text encoder would say changes neither graph nor time."""
    specs = every.manifest.components["denoiser"].inputs
    axes = {
        name: {index: dim for index, dim in enumerate(specs[name].shape) if isinstance(dim, str)}
        for name in every.manifest.conditioning
    }

    def probe(batch: int) -> Probe:
        inputs = denoiser_inputs(every.manifest, batch)
        return Probe(batch, size, {name: torch.from_numpy(array) for name, array in inputs.items()})

    def lower(module: GraphModule) -> None:
        raise AssertionError("the float32 graph alone is exported")

    return Stage(
        "denoiser",
        "transformer",
        lambda family: DenoiserGraph(family, axes),
        [probe(1)],
        probe(EXAMPLE_BATCH),
        lower,
        lambda family: family.fuse((skipped,)),
    )


def _load(model: Path, part: str) -> Family:
    return load_family(model, torch.float32, (part,))
