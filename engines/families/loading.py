"""A diffusers folder → its pipeline, whole or in part: what the families share.

pipeline = load_pipeline(StableDiffusion3Pipeline, folder, torch.float32, only=("transformer",), classes=CLASSES)
"""

from __future__ import annotations

import importlib
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from diffusers.utils import logging as diffusers_logging
from torch import nn
from transformers.utils import logging as transformers_logging

from engines.families.base import FamilyError

SCHEDULERS = ("FlowMatchEulerDiscreteScheduler",)
LIBRARIES = ("diffusers", "transformers")
"""Where the classes of modules and schedulers come from."""


@contextmanager
def quiet() -> Iterator[None]:
    """No progress bars and no notes on expected facts (no T5, a tiny autoencoder) while a folder is read or written."""
    libraries = (diffusers_logging, transformers_logging)
    before = [(library, library.get_verbosity(), library.is_progress_bar_enabled()) for library in libraries]
    for library in libraries:
        library.set_verbosity_error()
        library.disable_progress_bar()
    try:
        yield
    finally:
        for library, verbosity, bars in before:
            library.set_verbosity(verbosity)
            if bars:
                library.enable_progress_bar()


def load_pipeline(
    pipeline_class: Any,
    folder: Path,
    dtype: torch.dtype,
    only: Collection[str] | None,
    classes: Mapping[str, tuple[str, ...]],
    optional: Collection[str] = (),
) -> Any:
    """Load a local diffusers folder, or a hub id that diffusers resolves; safetensors only, nothing pickled.

    `classes`: every module of the family, and the classes that it may be of. Those that are `optional` are None where
    the folder's index leaves them out; all others, their tokenizers and a scheduler must be there. Modules left out by
    `only` are None if they are text encoders, else of their configuration without weights (on the meta device). All
    others are in `dtype`, in evaluation mode, and want no gradient.

    Raises:
        FamilyError: a component or one of its weights is missing, unreadable, or of another class.
    """
    source, local = folder.as_posix(), folder.is_dir()
    try:
        index = pipeline_class.load_config(source, local_files_only=local)
        present = [name for name, entry in index.items() if isinstance(entry, list) and entry[0] is not None]
        if missing := [name for name in present if local and not (folder / name).is_dir()]:
            raise FamilyError(f"{folder} lacks {', '.join(missing)}, which its model_index.json names")
        _check_index(folder, index, present, {**classes, "scheduler": SCHEDULERS}, optional)
        given: dict[str, Any] = {
            name: None for name, entry in index.items() if isinstance(entry, list) and entry[0] is None
        }
        for name in classes if only is not None else ():
            if only is not None and name not in only and name in present:
                given[name] = None if name.startswith("text_encoder") else _empty(source, name, index, local)
        modules = [name for name in classes if local and name in present and name not in given]
        whole = {name: _whole(folder, name, index, dtype) for name in modules}
        with quiet():
            pipeline = pipeline_class.from_pretrained(
                source, dtype=dtype, use_safetensors=True, local_files_only=local, **given, **whole
            )
    except (OSError, ValueError, TypeError, KeyError, RuntimeError, AttributeError) as error:
        raise FamilyError(f"{folder} cannot be loaded as {pipeline_class.__name__}: {error}") from error
    for name, module in pipeline.components.items():
        if isinstance(module, nn.Module) and name not in given:
            # Without accelerate, diffusers leaves some parameters in the file's dtype.
            nn.Module.to(module, dtype).eval().requires_grad_(False)
    return pipeline


def _check_index(
    folder: Path,
    index: Mapping[str, Any],
    present: Collection[str],
    classes: Mapping[str, tuple[str, ...]],
    optional: Collection[str],
) -> None:
    wanted = [name for name in classes if name not in optional or {name, _tokenizer(name)} & set(present)]
    wanted += [_tokenizer(name) for name in wanted if name.startswith("text_encoder")]
    if missing := [name for name in wanted if name not in present]:
        raise FamilyError(
            f"{folder} has no {', '.join(missing)} by its model_index.json, and {index['_class_name']} needs that; "
            "save or download the whole pipeline again"
        )
    for name in present:
        library, kind = index[name]
        if kind not in classes.get(name, (kind,)):
            raise FamilyError(f"{folder} has a {kind} as its {name}; {' or '.join(classes[name])} is needed")
        if name in classes and library not in LIBRARIES:
            raise FamilyError(
                f"{folder} has a {library}.{kind} as its {name}; {' or '.join(LIBRARIES)}'s is needed"
            )


def _tokenizer(text_encoder: str) -> str:
    return text_encoder.replace("text_encoder", "tokenizer")


def _whole(folder: Path, name: str, index: Mapping[str, Any], dtype: torch.dtype) -> nn.Module:
    """One module of a local folder. What its weights lack both libraries would fill with random numbers, and go on."""
    library, kind_name = index[name]
    kind = getattr(importlib.import_module(library), kind_name)
    with quiet():
        module, info = kind.from_pretrained(
            str(folder / name),
            dtype=dtype,
            use_safetensors=True,
            local_files_only=True,
            output_loading_info=True,
        )
    if missing := sorted(info["missing_keys"]):
        raise FamilyError(
            f"{folder / name} lacks {missing[0]}, {len(missing)} of the weights that a {kind_name} of its "
            "configuration has; save or download it again"
        )
    loaded: nn.Module = module
    return loaded


def _empty(source: str, name: str, index: dict[str, Any], local: bool) -> nn.Module:
    library, kind_name = index[name]
    kind = getattr(importlib.import_module(library), kind_name)
    config = kind.load_config(source, subfolder=name, local_files_only=local)
    with quiet(), torch.device("meta"):
        module: nn.Module = kind.from_config(config)
    return module.eval().requires_grad_(False)
