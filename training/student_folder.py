"""The student on disk: a diffusers folder like its teacher's, and `provenance.json` beside `model_index.json`."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from engines.families.base import load_family
from training.errors import TrainingError

PROVENANCE = "provenance.json"


@dataclass(frozen=True)
class StudentProvenance:
    """What is known about a student: `cdm-export` writes it into the bundle."""

    teacher: str
    recipe: str
    config_sha256: str
    steps_trained: int
    metrics: Mapping[str, Any] = field(default_factory=dict)
    licences: Sequence[str] = ()


def teacher_sha256(folder: Path) -> str:
    """Hash of the transformer's weights.

    Raises:
        TrainingError: the folder has no safetensors transformer.
    """
    files = sorted((folder / "transformer").glob("*.safetensors"))
    if not files:
        raise TrainingError(
            f"{folder} has no transformer/*.safetensors; --teacher takes a local diffusers folder"
        )
    digest = hashlib.sha256()
    for file in files:
        with file.open("rb") as handle:
            digest.update(hashlib.file_digest(handle, "sha256").digest())
    return digest.hexdigest()


def teacher_licences(folder: Path) -> tuple[str, ...]:
    """The licences that the teacher's own `provenance.json` names; none without one.

    Raises:
        TrainingError: the file is there and is not JSON with a list of licences.
    """
    path = folder / PROVENANCE
    if not path.is_file():
        return ()
    try:
        return tuple(
            str(licence) for licence in json.loads(path.read_text(encoding="utf-8")).get("licences", ())
        )
    except (ValueError, TypeError, AttributeError) as error:
        raise TrainingError(f"{path} is not a JSON object with a list of licences: {error}") from error


def write_student(
    teacher: Path, folder: Path, weights: Mapping[str, Tensor], provenance: StudentProvenance
) -> None:
    """Write `folder` as the teacher's folder with `weights` (float32, by parameter name) in its transformer.

    A student that was there stays whole until the new one is.
    """
    family = load_family(teacher, torch.float32)
    parameters = dict(family.transformer.named_parameters())
    assert parameters.keys() == weights.keys(), parameters.keys() ^ weights.keys()
    with torch.no_grad():
        for name, value in weights.items():
            parameters[name].copy_(value)
    partial, old = folder.with_name(f".{folder.name}.partial"), folder.with_name(f".{folder.name}.old")
    for leftover in (partial, old):
        shutil.rmtree(leftover, ignore_errors=True)
    family.save(partial, family.transformer)
    (partial / PROVENANCE).write_text(json.dumps(asdict(provenance), indent=2) + "\n", encoding="utf-8")
    if folder.exists():
        folder.rename(old)
    partial.rename(folder)
    shutil.rmtree(old, ignore_errors=True)
