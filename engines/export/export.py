"""Student folder → verified bundle, or nothing at all.

    report = export_bundle(Path("runs/student"), Path("bundles/student"), ExportOptions(default_steps=4))
    report.manifest.components["denoiser"].parity

One component after the other is loaded, answered by torch, written, and read back from the written files
(`engines/export/stages.py`); then every runtime that works here runs the whole bundle (`engines/export/verify.py`), and
TensorRT-RTX compiles it for the GPUs named (`engines/export/fusion.py`).
Everything is written into a sibling folder and renamed at the end.
"""

from __future__ import annotations

import importlib.metadata
import json
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from engines.bundle import (
    FORMAT_VERSION,
    MANIFEST,
    MODEL,
    PROVENANCE,
    Component,
    FileRef,
    Latent,
    Manifest,
    Precision,
    Provenance,
    Size,
    Tokenizer,
    file_ref,
    load_bundle,
    write_manifest,
)
from engines.errors import ExportError
from engines.export.adapter import find_adapter
from engines.export.fusion import check_fusion, fusion_targets
from engines.export.parity import BATCHES
from engines.export.plan import make_plan
from engines.export.source import Source, find_student
from engines.export.stages import run_stage
from engines.export.student import MODEL_FILES, components, prepare_student
from engines.export.tolerance import Tolerance
from engines.export.verify import check_runtimes, verify
from engines.families.base import INDEX, Family, FamilyError, load_family
from engines.files import remove_abandoned_folders, replace_folder, sha256_file

TOOLS = ("torch", "diffusers", "transformers", "onnx", "onnxscript", "onnxruntime")


@dataclass(frozen=True)
class ExportOptions:
    """`sizes` in pixels, empty for the model's own; the first is the default. `name` empty: the student folder's.

    `lora`: an adapter (a safetensors file, or its folder) that is merged into the student before anything else.
    `skip`: names of the family's rewrites (`Family.rewrites`) to leave out. `runtimes`: those that must prove
    themselves on the bundle, in every precision that they have here; empty: those that are installed. `fusion_check`:
    compute capabilities for which TensorRT-RTX must fuse every attention. `batches`: the batch sizes compared.
    """

    name: str = ""
    lora: Path | None = None
    default_steps: int = 4
    max_steps: int = 8
    sizes: tuple[Size, ...] = ()
    precisions: tuple[Precision, ...] = ("float32",)
    skip: tuple[str, ...] = ()
    runtimes: tuple[str, ...] = ()
    fusion_check: tuple[str, ...] = ()
    batches: tuple[int, ...] = BATCHES
    seed: int = 0
    weights: bool = False
    """Put the student's own folder into the bundle, for the runtimes that run torch."""
    tolerance: Tolerance = field(default_factory=Tolerance)


@dataclass(frozen=True)
class ExportReport:
    """What was written: the manifest (parity included) and the bundle's size on disk."""

    manifest: Manifest
    bytes: int


def export_bundle(
    student: str | Path,
    out: Path,
    options: ExportOptions,
    progress: Callable[[str], None] = lambda _: None,
) -> ExportReport:
    """Export `student` (a diffusers folder, or a hub id) to `out`, replacing a bundle that is already there.

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
    fusion_targets(options.fusion_check, options.precisions)
    check_runtimes(options.runtimes, options.weights)
    source = find_student(student, progress)
    family = _load(source.folder, ())
    if unknown := [name for name in options.skip if name not in family.rewrites]:
        known = ", ".join(family.rewrites) or "none"
        raise ExportError(f"{family.name} has no rewrite {unknown[0]!r} to skip; there are: {known}")
    provenance = describe(source, options.lora)
    work: Path | None = None
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        remove_abandoned_folders(out)
        # Beside `out`: a merged student is as large as a bundle, which is what there is room for there.
        work = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
        if options.lora is not None:
            progress(f"merging {options.lora}")
        folder = prepare_student(source.folder, options.lora, work / "student")
        staging = work / "bundle"
        staging.mkdir()
        staging.chmod(0o755)  # whatever the umask: a server may be run by another user
        manifest = _write_bundle(
            family, folder, staging, options, options.name or source.name, provenance, progress
        )
        load_bundle(staging)
        size = sum(path.stat().st_size for path in staging.rglob("*"))
        replace_folder(staging, out)
    except OSError as error:
        path = Path(error.filename) if isinstance(error.filename, str) else out
        ours = path.is_relative_to(work or out.parent) or path.is_relative_to(out.parent)
        what = f"{out} cannot be written" if ours else f"{path} cannot be read or written"
        raise ExportError(f"{what}: {error.strerror or error}") from error
    finally:
        if work is not None:
            shutil.rmtree(work, ignore_errors=True)
    return ExportReport(manifest=manifest, bytes=size)


def _load(student: Path, only: tuple[str, ...]) -> Family:
    try:
        return load_family(student, torch.float32, only)
    except FamilyError as error:
        raise ExportError(" ".join(str(error).split())) from error


def _write_bundle(
    family: Family,
    student: Path,
    root: Path,
    options: ExportOptions,
    name: str,
    provenance: Provenance,
    progress: Callable[[str], None],
) -> Manifest:
    height, width = (side * family.downscale for side in family.latent_size)
    sizes = options.sizes or (Size(width=width, height=height),)
    plan = make_plan(family, sizes, options.batches, options.default_steps, options.seed)
    components: dict[str, Component] = {}
    for stage in plan.stages(lambda loaded: loaded.fuse(options.skip)):
        progress(f"{stage.name}: {', '.join(options.precisions)}")
        components[stage.name] = run_stage(
            stage, lambda part: _load(student, (part,)), root, options.precisions, options.tolerance
        )
    manifest = Manifest(
        format_version=FORMAT_VERSION,
        name=name,
        family=family.name,
        components=components,
        tokenizers=write_tokenizers(family, root),
        latent=Latent(
            channels=family.latent_channels,
            downscale=family.downscale,
            scaling_factor=family.scaling_factor,
            shift_factor=family.shift_factor,
        ),
        text_lengths=plan.text_lengths,
        sizes=sizes,
        default_size=sizes[0],
        schedules={steps: plan.sigmas(steps) for steps in range(1, options.max_steps + 1)},
        default_steps=options.default_steps,
        model=copy_model(student, root) if options.weights else (),
        provenance=provenance,
    )
    for size in sizes[1:]:
        if plan.sigmas(options.default_steps, size) != plan.sigmas(options.default_steps):
            progress(
                f"pictures of {size.width}x{size.height} get the schedules of {sizes[0].width}x{sizes[0].height}: a "
                "bundle has one for each number of steps, and this model's shift depends on the size"
            )
    write_manifest(root, manifest)
    bundle = load_bundle(root)
    manifest = verify(bundle, plan, options.runtimes, options.tolerance, progress)
    if options.fusion_check:
        proved = replace(bundle, manifest=manifest)
        manifest = check_fusion(proved, options.fusion_check, options.tolerance, progress)
    write_manifest(root, manifest)
    return manifest


def copy_model(student: Path, root: Path) -> tuple[FileRef, ...]:
    """Copy what the student's `model_index.json` names, and no pickle, into the bundle at `root`."""
    folders = [student / name for name in components(student)]
    files = [student / INDEX, *(path for folder in folders for path in sorted(folder.rglob("*")))]
    refs = []
    for path in files:
        if path.is_file() and path.suffix in MODEL_FILES:
            target = root / MODEL / path.relative_to(student)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target)
            refs.append(file_ref(root, target))
    return tuple(refs)


def write_tokenizers(family: Family, root: Path) -> tuple[Tokenizer, ...]:
    """Write one JSON file per *different* tokenizer (SD3's two are often the same); an entry per text-encoder input."""
    written: dict[str, Path] = {}
    tokenizers = []
    for spec in family.tokenizer_specs():
        name = f"tokenizer_{len(written) + 1}.json" if written else "tokenizer.json"
        path = written.setdefault(spec["json"], root / name)
        path.write_text(spec["json"], encoding="utf-8")
        fields = {key: value for key, value in spec.items() if key != "json"}
        tokenizers.append(Tokenizer(file=file_ref(root, path), **fields))
    return tuple(tokenizers)


def describe(source: Source, lora: Path | None) -> Provenance:
    """Where the exported weights are from: the student's own provenance, the hub's commit, the adapter by its hash.

    With an adapter it is another model: metrics of the base are none of its.

    Raises:
        ExportError: the student's `provenance.json` is not what it should be, or there is no adapter.
    """
    found = read_provenance(source.folder)
    if source.origin and found.teacher == found.recipe == "unknown":
        found = found.model_copy(update={"recipe": source.origin})
    if lora is None:
        return found
    file = find_adapter(lora)
    recipe = f"{found.recipe} + LoRA {file.name} (sha256 {sha256_file(file)})"
    return found.model_copy(update={"recipe": recipe, "metrics": {}})


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
