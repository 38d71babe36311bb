"""The student on disk: a diffusers folder like its teacher's, and `provenance.json` beside `model_index.json`."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from engines.bundle import PROVENANCE
from engines.families.base import load_family
from engines.files import link, replace_folder, sha256_file, sha256_files, write_text_atomically
from training.errors import Diverged, TrainingError, told_if_full


@dataclass(frozen=True)
class StudentProvenance:
    """What is known about a student: `cdm-export` writes it into the bundle."""

    teacher: str
    recipe: str
    config_sha256: str
    steps_trained: int
    metrics: Mapping[str, Any] = field(default_factory=dict)
    licences: Sequence[str] = ()


@dataclass(frozen=True)
class TeacherHashes:
    """What tells teachers apart."""

    transformer: str
    """Of the transformer's weights alone."""
    components: str
    """Of every file that `keep_teacher` copies."""

    @classmethod
    def of(cls, folder: Path, flag: str = "--teacher") -> Self:
        """Read them all; `flag` named the folder.

        Raises:
            TrainingError: the folder has no safetensors transformer, or lacks a component.
        """
        files = sorted((folder / "transformer").glob("*.safetensors"))
        if not files:
            raise TrainingError(
                f"{folder} has no transformer/*.safetensors; {flag} takes a local diffusers folder"
            )
        digest = hashlib.sha256()
        for file in files:
            digest.update(bytes.fromhex(sha256_file(file)))
        return cls(digest.hexdigest(), sha256_files(folder, _component_files(folder)))


def _component_files(folder: Path) -> list[Path]:
    """The index, and all files of the components that it names: weights, configurations, tokenizers, scheduler."""
    index = folder / "model_index.json"
    try:
        entries = json.loads(index.read_text(encoding="utf-8")).items()
    except (OSError, ValueError, AttributeError) as error:
        raise TrainingError(
            f"{index} cannot be read ({error}); --teacher takes a local diffusers folder"
        ) from error
    names = [name for name, entry in entries if isinstance(entry, list) and entry[0] is not None]
    return [index, *(path for name in names for path in sorted((folder / name).rglob("*")) if path.is_file())]


def teacher_bytes(folder: Path) -> int:
    """Of what `keep_teacher` copies."""
    return sum(file.stat().st_size for file in _component_files(folder))


def keep_teacher(teacher: Path, hashes: TeacherHashes, kept: Path) -> None:
    """Copy the model in `teacher` to `kept`, unless it is there: a student is written around its teacher's text
    encoders and autoencoder, which must be those it was trained with, whatever becomes of `teacher` meanwhile.

    Raises:
        TrainingError: `teacher` is not what `hashes` says: it was replaced while it was copied.
    """
    if kept.is_dir() and TeacherHashes.of(kept) == hashes:
        return
    partial = kept.with_name(f".{kept.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    with told_if_full("a copy of the teacher", kept.parent):
        for file in _component_files(teacher):
            copy = partial / file.relative_to(teacher)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, copy)
    if TeacherHashes.of(partial) != hashes:
        shutil.rmtree(partial)
        raise TrainingError(f"--teacher={teacher} changed while it was copied; run the same command again")
    replace_folder(partial, kept)


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

    What is not trained is hard-linked, or copied where that cannot be: text encoders may be ten times the rest.
    A student that was there stays whole until the new one is; its recorded metrics stay if it is the same student.

    Raises:
        TrainingError: the disk is full; what was there is untouched.
        Diverged: a weight is NaN or infinite; what was there is untouched.
    """
    for name, value in weights.items():
        if not bool(torch.isfinite(value).all()):
            raise Diverged(f"{name} is not finite; no student is written; export an earlier checkpoint")
    family = load_family(teacher, torch.float32, only=("transformer",))
    parameters = dict(family.transformer.named_parameters())
    assert parameters.keys() == weights.keys(), parameters.keys() ^ weights.keys()
    with torch.no_grad():
        for name, value in weights.items():
            parameters[name].copy_(value)
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    with told_if_full("the student", folder.parent):
        transformer: Any = family.transformer
        transformer.save_pretrained(partial / "transformer", safe_serialization=True)
        for file in _component_files(teacher):
            if (inside := file.relative_to(teacher)).parts[0] != "transformer":
                link(file, partial / inside)
    document = json.loads(json.dumps(asdict(provenance)))
    if (folder / PROVENANCE).is_file():
        before = read_recorded(folder)
        if {**before, "metrics": {}} == {**document, "metrics": {}}:
            document["metrics"] = before["metrics"] | document["metrics"]
    (partial / PROVENANCE).write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    replace_folder(partial, folder)


def record_metrics(folder: Path, name: str, value: Any) -> None:
    """Put a measurement into the `metrics` of the folder's `provenance.json`, in place of one of the same name.

    Raises:
        TrainingError: there is no such file, or another thing in it.
    """
    path = folder / PROVENANCE
    document = read_recorded(folder)
    document["metrics"][name] = value
    write_text_atomically(path, json.dumps(document, indent=2, ensure_ascii=False) + "\n")


def read_recorded(folder: Path) -> dict[str, Any]:
    """`provenance.json` of a trained model, with its `metrics`.

    Raises:
        TrainingError: there is no such file, or another thing in it.
    """
    path = folder / PROVENANCE
    try:
        document: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(document.setdefault("metrics", {}), dict):
            raise TypeError("its metrics are no object")
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise TrainingError(
            f"{path} cannot take a measurement ({error}); record one of a folder that cdm-train wrote, or leave "
            "--record out"
        ) from error
    return document
