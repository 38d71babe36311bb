"""What a student is called → a diffusers folder on this machine: the one of that name, or a model of the hub.

    source = find_student("stabilityai/stable-diffusion-3.5-medium@main")
    source.folder, source.name, source.origin    # …/snapshots/COMMIT, "stable-diffusion-3.5-medium", "…-medium@COMMIT"

A folder that is there never asks the network. Of the hub's files come those that the pipeline is loaded from: no
pickles, no code, no single-file checkpoints, no weights in a second precision.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import hf_hub_download, snapshot_download

from engines.bundle import MANIFEST, PROVENANCE
from engines.errors import ExportError
from engines.export.student import MODEL_FILES, components
from engines.families.base import HUB_ID, INDEX

HUB_NAME = re.compile(rf"({HUB_ID.pattern})(?:@([\w][\w./-]*))?", re.ASCII)
"""A model on the hub, and perhaps a branch, tag or commit of it."""

VARIANTS = ("*/model.*.safetensors", "*/diffusion_pytorch_model.*.safetensors")
"""Weights that only a named variant is loaded from (`model.fp16.safetensors`)."""


@dataclass(frozen=True)
class Source:
    """A diffusers folder, what its model is called, and where on the hub it is from (ID@COMMIT; empty: local)."""

    folder: Path
    name: str
    origin: str = ""


def find_student(student: str | Path, progress: Callable[[str], None] = lambda _: None) -> Source:
    """The folder of `student`: a local path if something is there, else a hub id, downloaded or found in its cache.

    Raises:
        ExportError: it is a bundle, or neither a folder nor a hub id, or the hub cannot be had, or it has no index.
    """
    text, folder = str(student), Path(student)
    if (folder / MANIFEST).is_file():
        raise ExportError(
            f"{text} is a bundle already; name the student it was exported from, or add --to triton to write a "
            "repository of it"
        )
    if folder.exists():
        components(folder)
        return Source(folder, folder.resolve().name)
    named = HUB_NAME.fullmatch(text)
    if named is None:
        raise ExportError(
            f"{text} is not a diffusers folder (nothing is there) and not a hub id (org/name or org/name@revision); "
            "name one of them"
        )
    hub_id, revision = named.groups()
    progress(f"{text}: from the hub")
    try:
        index = Path(hf_hub_download(hub_id, INDEX, revision=revision))
        commit = index.parent.name
        wanted = [f"{name}/*{suffix}" for name in components(index.parent) for suffix in MODEL_FILES]
        snapshot = snapshot_download(
            hub_id,
            revision=commit,  # what the index is of, whatever is pushed meanwhile
            allow_patterns=[INDEX, PROVENANCE, *wanted],
            ignore_patterns=list(VARIANTS),
        )
    except ExportError:
        raise
    except Exception as error:  # the hub's, its HTTP client's and the cache's errors share no base
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
        raise ExportError(
            f"there is no folder {text}, and the hub's model {text!r} cannot be had ({reason}); name a local diffusers "
            "folder, or download the model once with a connection (and `hf auth login` where it asks for one)"
        ) from error
    return Source(Path(snapshot), hub_id.rpartition("/")[2], f"{hub_id}@{commit}")
