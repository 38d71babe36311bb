"""A student as people have it → a diffusers folder that can be exported: an adapter merged, every dtype known.

    folder = prepare_student(Path("runs/base"), Path("runs/adapter"), into)     # base + LoRA → `into`

Merging holds one component in memory at a time, in float32; what no adapter changes is hard-linked.
"""

from __future__ import annotations

import gc
import importlib
import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from engines.bundle import PROVENANCE, TEXT_ENCODERS
from engines.errors import ExportError
from engines.export.adapter import Adapter, merge_, read_adapter
from engines.families.base import INDEX
from engines.families.loading import quiet
from engines.files import link

FLOATS = ("F64", "F32", "F16", "BF16")
"""Dtypes of weights that are loaded as they are; all else is a quantized checkpoint, which wants its own code."""

INTEGERS = ("I64", "I32")
BUFFERS = ("position_ids", "num_batches_tracked")
"""Last parts of the names of tensors that are integers in an ordinary checkpoint too."""

WEIGHTS = ("diffusion_pytorch_model", "model")
"""What diffusers and transformers call a component's weights."""

MODEL_FILES = (".json", ".safetensors", ".txt", ".model")
"""What a diffusers folder is loaded from: configurations, weights, vocabularies."""

CONFIG = "config.json"
"""A model's configuration."""

WEIGHTED = ("transformer", "vae", *TEXT_ENCODERS)
"""Components that have weights."""

LIBRARIES = ("diffusers", "transformers")
"""Where a component's class may come from."""


def prepare_student(student: Path, lora: Path | None, into: Path) -> Path:
    """The folder to export: `student` itself, or, with an adapter, `into`, which must not be there yet.

    `student` is a diffusers folder. All that can be told without reading weights is told first.

    Raises:
        ExportError: no such base or adapter, one that does not fit the other, or weights that are not floating-point.
            `into` is then not there.
        OSError: `into` cannot be written, and is not there.
    """
    check_dtypes(student)
    if lora is None:
        return student
    adapter = read_adapter(lora)
    index = components(student)
    if missing := [name for name in adapter.components() if name not in index]:
        raise ExportError(f"{lora} is an adapter for {missing[0]}, which {student} does not have")
    into.mkdir(parents=True)
    try:
        _write(student, index, adapter, into)
    except BaseException:
        shutil.rmtree(into, ignore_errors=True)
        raise
    return into


def _write(base: Path, index: dict[str, tuple[str, str]], adapter: Adapter, into: Path) -> None:
    for name, (library, kind) in index.items():
        if name in adapter.components():
            _write_merged(base, name, library, kind, adapter, into)
        else:
            for path in sorted((base / name).rglob("*")):
                if path.is_file() and path.suffix in MODEL_FILES:
                    link(path, into / path.relative_to(base))
    for name in (INDEX, PROVENANCE):
        if (base / name).is_file():
            link(base / name, into / name)


def _write_merged(base: Path, name: str, library: str, kind: str, adapter: Adapter, into: Path) -> None:
    if library not in LIBRARIES:
        raise ExportError(
            f"{base} has a {library}.{kind} as its {name}; only {' and '.join(LIBRARIES)} are loaded"
        )
    try:
        with quiet():
            module: Any = getattr(importlib.import_module(library), kind).from_pretrained(
                str(base / name), dtype=torch.float32, use_safetensors=True, local_files_only=True
            )
    except (OSError, ValueError, TypeError, RuntimeError, AttributeError) as error:
        raise ExportError(f"{base / name} cannot be loaded as {kind}: {error}") from error
    module = merge_(adapter, name, module.eval().requires_grad_(False))
    try:
        with quiet():
            module.save_pretrained(str(into / name), safe_serialization=True)
    except SafetensorError as error:  # which is no OSError, whatever the disk said
        raise OSError(f"{name}: {error}") from error
    # The model is what it was, and what is written into a configuration tells of this machine.
    (into / name / CONFIG).unlink()
    link(base / name / CONFIG, into / name / CONFIG)
    del module
    gc.collect()


def components(folder: Path) -> dict[str, tuple[str, str]]:
    """Library and class of every component that the folder's index names.

    Raises:
        ExportError: there is no index, or not a diffusers pipeline's.
    """
    try:
        index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
        named = {
            name: (str(entry[0]), str(entry[1]))
            for name, entry in index.items()
            if isinstance(entry, list) and entry[0] is not None
        }
    except (OSError, ValueError, AttributeError, IndexError) as error:
        raise ExportError(f"{folder} is not a diffusers folder: {INDEX} is missing or unreadable") from error
    if wrong := [name for name in named if not name.isidentifier()]:
        raise ExportError(f"{folder / INDEX} names a component {wrong[0]!r}, which is no folder's name")
    return named


def check_dtypes(student: Path) -> None:
    """Refuse weights that are incomplete or not floating-point before hours are spent on them; only headers are read.

    Raises:
        ExportError: naming the file and, if it is about one, the tensor.
    """
    weighted = [name for name in components(student) if name in WEIGHTED]
    if missing := [name for name in weighted if not (student / name).is_dir()]:
        raise ExportError(f"{student} lacks {', '.join(missing)}, which its {INDEX} names")
    for name in weighted:
        for file in _weight_files(student / name):
            _check_header(file)


def _weight_files(folder: Path) -> list[Path]:
    """What `from_pretrained` would load, in safetensors: one file, or what an index names."""
    files = [folder / f"{stem}.safetensors" for stem in WEIGHTS]
    files = [file for file in files if file.is_file()]
    for index in (folder / f"{stem}.safetensors.index.json" for stem in WEIGHTS):
        if index.is_file():
            files += _shards(index)
    if not files:
        found = ", ".join(sorted(path.name for path in folder.iterdir())) or "nothing"
        raise ExportError(
            f"{folder} has no {' or '.join(f'{stem}.safetensors' for stem in WEIGHTS)} (there is {found}); pickles and "
            "variants such as .fp16 are not loaded, so save the model again as plain safetensors"
        )
    return files


def _shards(index: Path) -> list[Path]:
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        shards = sorted({index.parent / str(name) for name in weight_map.values()})
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ExportError(f"{index} is not an index of shards; save or download the model again") from error
    if missing := [shard.name for shard in shards if not shard.is_file()]:
        raise ExportError(
            f"{index.parent} lacks {missing[0]}, {len(missing)} of the {len(shards)} files that {index.name} names; "
            "copy or download the rest"
        )
    return shards


def _check_header(file: Path) -> None:
    try:
        with safe_open(file, framework="pt") as opened:
            dtypes = {name: opened.get_slice(name).get_dtype() for name in opened.keys()}  # noqa: SIM118  (no mapping)
    except (OSError, SafetensorError) as error:
        pointer = file.stat().st_size < 1000 and file.read_bytes().startswith(b"version https://git-lfs")
        reason = (
            "it is a Git LFS pointer; run git lfs pull" if pointer else f"{error}; copy or download it again"
        )
        raise ExportError(f"{file} is no whole safetensors file: {reason}") from error
    for name, dtype in dtypes.items():
        if dtype in FLOATS or (dtype in INTEGERS and name.rpartition(".")[2] in BUFFERS):
            continue
        raise ExportError(
            f"{file}: {name} is {dtype}; weights in {', '.join(FLOATS)} are needed, so export the checkpoint from "
            "before it was quantized"
        )
