"""Student folder → verified bundle, or nothing at all.

    report = export_bundle(Path("runs/student"), Path("bundles/student"), ExportOptions(default_steps=4))
    report.manifest.components["denoiser"].parity

The order matters. Torch's answers with the original weights come first; then the weights are rounded in place to
what the file will hold, torch answers again, and the graphs, read back from the written files, are held against both.
Everything is written into a sibling folder and renamed at the end.
"""

from __future__ import annotations

import contextlib
import gc
import importlib.metadata
import io
import json
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from engines.bundle import (
    FORMAT_VERSION,
    MANIFEST,
    PROVENANCE,
    Component,
    Latent,
    Manifest,
    Parity,
    Provenance,
    Size,
    Tokenizer,
    file_ref,
    load_bundle,
    write_manifest,
)
from engines.errors import ExportError
from engines.export.graphs import DecoderGraph, DenoiserGraph, TextEncoderGraph, exportable
from engines.export.onnx_file import (
    Axes,
    describe,
    round_to_float16_,
    save_model,
    store_weights_as_float16,
    to_onnx,
)
from engines.export.parity import (
    BATCHES,
    EXAMPLE_BATCH,
    Arrays,
    compare,
    open_session,
    probes,
    run_onnx,
    run_torch,
)
from engines.export.tolerance import Tolerance
from engines.families.base import Family, FamilyError, load_family
from engines.files import replace_folder

TOOLS = ("torch", "diffusers", "transformers", "onnx", "onnxscript", "onnxruntime")


@dataclass(frozen=True)
class ExportOptions:
    """`sizes` in pixels, empty for the model's own; the first is the default. `name` empty: the student folder's."""

    name: str = ""
    default_steps: int = 4
    max_steps: int = 8
    sizes: tuple[Size, ...] = ()
    seed: int = 0
    tolerance: Tolerance = field(default_factory=Tolerance)


@dataclass(frozen=True)
class ExportReport:
    """What was written: the manifest (parity included) and the bundle's size on disk."""

    manifest: Manifest
    bytes: int


@dataclass(frozen=True)
class _Probe:
    """One component's inputs at one batch size, and torch's answers by the weights it ran with."""

    batch: int
    inputs: dict[str, Tensor]
    answers: dict[str, Arrays] = field(default_factory=dict)


def export_bundle(
    student: Path, out: Path, options: ExportOptions, progress: Callable[[str], None] = lambda _: None
) -> ExportReport:
    """Export `student` (a diffusers folder) to `out`, replacing a bundle that is already there.

    Raises:
        ExportError: the student cannot be loaded or exported, is not the same model in ONNX, or `out` is something
            else than a bundle. `out` is then as it was before.
    """
    if not 1 <= options.default_steps <= options.max_steps:
        raise ExportError(
            f"default steps {options.default_steps} must be between 1 and max steps {options.max_steps}"
        )
    if out.exists() and not (out / MANIFEST).is_file():
        raise ExportError(f"{out} exists and is not a bundle; give another --out, or remove it first")
    try:
        family = load_family(student, torch.float32)
    except FamilyError as error:
        raise ExportError(str(error)) from error
    out.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
    try:
        staging.chmod(0o755)  # mkdtemp's 0700 would hide the bundle from a server run by another user
        manifest = _write_bundle(family, student, staging, options, progress)
        load_bundle(staging)
        size = sum(path.stat().st_size for path in staging.rglob("*"))
        replace_folder(staging, out)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return ExportReport(manifest=manifest, bytes=size)


def _write_bundle(
    family: Family, student: Path, root: Path, options: ExportOptions, progress: Callable[[str], None]
) -> Manifest:
    height, width = (side * family.downscale for side in family.latent_size)
    sizes = options.sizes or (Size(width=width, height=height),)
    latents = [_latent(family, size) for size in sizes]
    graphs = _graphs(family)
    progress("torch, original weights")
    table = _make_probes(family, graphs, latents, options.seed)
    _answer(graphs, table, "original")
    round_to_float16_([family.transformer, family.vae, *family.text_modules().values()])
    _answer(graphs, table, "stored")
    family.fuse()  # after torch has answered: parity then vouches for it too
    example = probes(family, EXAMPLE_BATCH, latents[0], options.seed + 1)
    components: dict[Any, Component] = {}
    for name, graph in graphs.items():
        progress(f"{name}: ONNX")
        components[name] = _export_component(
            root, name, graph, example[name], table[name], len(sizes) > 1, options
        )
        gc.collect()
    manifest = Manifest(
        format_version=FORMAT_VERSION,
        name=options.name or student.resolve().name,
        family=family.name,
        precision="float16",
        components=components,
        tokenizers=write_tokenizers(family, root),
        latent=Latent(
            channels=family.latent_channels,
            downscale=family.downscale,
            scaling_factor=family.scaling_factor,
            shift_factor=family.shift_factor,
        ),
        sizes=sizes,
        default_size=sizes[0],
        schedules={steps: family.sigmas(steps) for steps in range(1, options.max_steps + 1)},
        default_steps=options.default_steps,
        provenance=read_provenance(student),
    )
    write_manifest(root, manifest)
    return manifest


def _graphs(family: Family) -> dict[str, Any]:
    ids = family.tokenize([""])
    with torch.no_grad():
        conditioning = tuple(family.embed(ids))
    graphs: dict[str, Any] = {
        "text_encoder": TextEncoderGraph(family, tuple(ids), conditioning),
        "denoiser": DenoiserGraph(family, conditioning),
        "decoder": DecoderGraph(family),
    }
    for graph in graphs.values():
        graph.eval()
    return graphs


def _latent(family: Family, size: Size) -> tuple[int, int]:
    if size.width % family.downscale or size.height % family.downscale:
        raise ExportError(
            f"size {size.width}x{size.height}: both sides must be multiples of {family.downscale}, "
            "the autoencoder's factor"
        )
    return size.height // family.downscale, size.width // family.downscale


def _make_probes(
    family: Family, graphs: dict[str, Any], latents: list[tuple[int, int]], seed: int
) -> dict[str, list[_Probe]]:
    """Per component, every batch size at every size; seeds apart from the tracing example's."""
    table: dict[str, list[_Probe]] = {name: [] for name in graphs}
    for index, latent in enumerate(latents):
        for batch in BATCHES:
            probe = probes(family, batch, latent, seed=seed + 1000 + 100 * index + batch)
            for name, inputs in probe.items():
                table[name].append(_Probe(batch, inputs))
    return table


def _answer(graphs: dict[str, Any], table: dict[str, list[_Probe]], weights: str) -> None:
    for name, graph in graphs.items():
        for probe in table[name]:
            try:
                probe.answers[weights] = run_torch(graph, graph.inputs, graph.outputs, probe.inputs)
            except (RuntimeError, ValueError) as error:  # a size the model's position table or patches refuse
                shape = tuple(next(iter(probe.inputs.values())).shape)
                raise ExportError(f"{name} cannot run on inputs of shape {shape}: {error}") from error


def _export_component(
    root: Path,
    name: str,
    graph: nn.Module,
    example: dict[str, Tensor],
    table: list[_Probe],
    spatial: bool,
    options: ExportOptions,
) -> Component:
    with exportable(), contextlib.redirect_stdout(io.StringIO()):  # the exporter prints its progress
        model = to_onnx(graph, graph, example, Axes(spatial))  # type: ignore[arg-type]
    store_weights_as_float16(model)
    files = save_model(root, name, model)
    session = open_session(files[0])
    parity: list[Parity] = []
    for probe in table:
        actual = run_onnx(session, probe.inputs)
        for weights in ("stored", "original"):
            parity.append(compare(probe.batch, weights, actual, probe.answers[weights]))
            options.tolerance.check(name, parity[-1])
    return describe(root, files, model, parity)


def write_tokenizers(family: Family, root: Path) -> tuple[Tokenizer, ...]:
    """Write one JSON file per *different* tokenizer (SD3's two are often the same); an entry per text-encoder input."""
    written: dict[str, Path] = {}
    tokenizers = []
    for spec in family.tokenizer_specs():
        name = f"tokenizer_{len(written) + 1}.json" if written else "tokenizer.json"
        path = written.setdefault(spec["json"], root / name)
        path.write_text(spec["json"], encoding="utf-8")
        tokenizers.append(
            Tokenizer(
                file=file_ref(root, path), input=spec["input"], length=spec["length"], pad_id=spec["pad_id"]
            )
        )
    return tuple(tokenizers)


def read_provenance(student: Path) -> Provenance:
    """The student's `provenance.json` with this machine's tool versions; every field "unknown" if there is none.

    Raises:
        ExportError: the file is there and is not what it should be.
    """
    tools = {name: importlib.metadata.version(name) for name in TOOLS}
    path = student / PROVENANCE
    if not path.is_file():
        return Provenance(
            teacher="unknown", recipe="unknown", config_sha256="unknown", steps_trained=0, tools=tools
        )
    try:
        return Provenance.model_validate({**json.loads(path.read_text(encoding="utf-8")), "tools": tools})
    except (ValueError, TypeError) as error:
        first = str(error).splitlines()
        raise ExportError(f"{path} is invalid: {' '.join(line.strip() for line in first[:3])}") from error
