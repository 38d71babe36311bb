"""A checkpoint is a folder of safetensors files and one readable `meta.json`; the newest whole one is resumed.

    save(run / "checkpoints", 1200, {"model": model.state_dict(), "adamw": optimizer_tensors(opt)}, {"samples": 38400})
    found = latest(run / "checkpoints")          # None, or a Checkpoint
    model.load_state_dict(found.tensors("model"))

Written to a temporary sibling and renamed, so that a killed run never leaves half a checkpoint to resume from.
`meta.json` lists every file's size: a truncated or missing file is found without reading gigabytes (a flipped bit is
not). Sharded tensors are written whole, so that a checkpoint moves between world sizes.
"""

from __future__ import annotations

import errno
import json
import math
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor

from training.errors import Diverged, TrainingError
from training.parallel import local, whole


@dataclass(frozen=True)
class Score:
    """How good a checkpoint is, on a scale that must stay the same within a run."""

    value: float
    lower_is_better: bool = True


@dataclass(frozen=True)
class Checkpoint:
    """One whole checkpoint on disk."""

    path: Path
    step: int
    meta: dict[str, Any]

    def tensors(self, name: str) -> dict[str, Tensor]:
        """The tensors saved under `name`, whole."""
        return load_file(self.path / f"{name}.safetensors")

    @property
    def score(self) -> Score | None:
        """What it was saved with."""
        return Score(**self.meta["score"]) if self.meta.get("score") else None


def gather(tensor: Tensor, keep: bool = True) -> Tensor | None:
    """All of a tensor, or None without `keep`; of a sharded one every process must ask, whether it keeps it or not.

    Raises:
        Diverged: it holds NaN or infinity; in every process alike.
    """
    value = whole(tensor.detach())
    if not bool(torch.isfinite(value).all()):
        raise Diverged("not finite")
    return value.cpu().contiguous() if keep else None


def place(value: Tensor, parameter: Tensor) -> Tensor:
    """This process's part of a whole tensor, laid out as `parameter`; of a plain parameter the tensor itself."""
    if not isinstance(parameter, DTensor):
        return value
    mesh = parameter.device_mesh
    return local(distribute_tensor(value.to(mesh.device_type), mesh, parameter.placements))


def save(
    folder: Path,
    step: int,
    groups: Mapping[str, Mapping[str, Tensor]],
    meta: Mapping[str, Any],
    keep: int = 2,
    score: Score | None = None,
    main: bool = True,
) -> Path:
    """Write checkpoint `step`; delete all but the newest `keep` and the best, and what killed runs left behind.

    Every process takes part in gathering sharded tensors; only `main` writes.

    Raises:
        Diverged: a tensor holds NaN or infinity; nothing is written.
        TrainingError: the disk is full, the older checkpoints are untouched; or the score is not finite.
    """
    if score is not None and not math.isfinite(score.value):
        raise TrainingError(f"score {score.value} of step {step} is not finite; give a finite one, or none")
    gathered: dict[str, dict[str, Tensor]] = {}
    for group, tensors in groups.items():
        kept = gathered.setdefault(group, {})
        for key, value in tensors.items():
            try:
                full = gather(value, main)
            except Diverged:
                raise Diverged(
                    f"{group}/{key} is not finite at step {step}; no checkpoint is written; run again with a lower "
                    "learning rate and another --out"
                ) from None
            if full is not None:
                kept[key] = full
    target = folder / f"step-{step:08d}"
    if not main:
        return target
    partial = folder / f".partial-{step:08d}"
    try:
        for leftover in folder.glob(".partial-*"):
            shutil.rmtree(leftover)
        partial.mkdir(parents=True)
        _write(partial, step, gathered, meta, score)
        shutil.rmtree(target, ignore_errors=True)
        partial.rename(target)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        if not _disk_is_full(error):
            raise
        need = sum(value.nbytes for group in gathered.values() for value in group.values())
        raise TrainingError(
            f"no space for the checkpoint of step {step} in {folder}: it takes {need / 1e6:.1f} MB, and the older ones "
            "are untouched; free that much (or keep fewer checkpoints), then the same command goes on"
        ) from error
    _rotate(folder, keep)
    return target


def latest(folder: Path, tell: Callable[[str], None] = lambda sentence: None) -> Checkpoint | None:
    """The newest whole checkpoint under `folder`, if any; `tell` hears one sentence for each damaged newer one.

    Raises:
        TrainingError: there are checkpoints, and all are damaged.
    """
    found = sorted(folder.glob("step-*"), reverse=True)
    for path in found:
        read = _read(path)
        if isinstance(read, Checkpoint):
            return read
        tell(f"checkpoint {path} is damaged ({read})")
    if found:
        raise TrainingError(
            f"every checkpoint in {folder} is damaged ({found[0].name}: {_read(found[0])}); put a whole one back, or "
            "begin anew with another --out"
        )
    return None


def best(folder: Path) -> Checkpoint | None:
    """The whole checkpoint with the best score, the older of equals; None if none has one."""
    found = [read for path in sorted(folder.glob("step-*")) if isinstance(read := _read(path), Checkpoint)]
    scored = [(each.score, each) for each in found if each.score is not None]
    if not scored:
        return None
    return min(scored, key=lambda pair: pair[0].value if pair[0].lower_is_better else -pair[0].value)[1]


def _write(
    partial: Path, step: int, groups: Mapping[str, dict[str, Tensor]], meta: Mapping[str, Any], score: Score | None
) -> None:  # fmt: skip
    for name, tensors in groups.items():
        save_file(tensors, partial / f"{name}.safetensors")
    sizes = {file.name: file.stat().st_size for file in sorted(partial.iterdir())}
    rated = {} if score is None else {"score": vars(score)}
    text = json.dumps({"step": step, "files": sizes, **rated, **meta}, indent=2)
    (partial / "meta.json").write_text(text + "\n", encoding="utf-8")
    for path in (*partial.iterdir(), partial):
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _rotate(folder: Path, keep: int) -> None:
    paths = sorted(folder.glob("step-*"))
    # Damaged ones do not count among those kept: a whole one would go for them.
    whole_ones = [path for path in paths if isinstance(_read(path), Checkpoint)]
    top = best(folder)
    kept = {*whole_ones[-keep:], *([top.path] if top else [])}
    for path in paths:
        if path not in kept:
            shutil.rmtree(path)


def _read(path: Path) -> Checkpoint | str:
    """The checkpoint, or what is wrong with it."""
    try:
        meta = json.loads((path / "meta.json").read_text(encoding="utf-8"))
        found = Checkpoint(path, int(meta["step"]), meta)
        sizes: dict[str, int] = meta.get("files", {})
        for name in sizes or [file.name for file in path.glob("*.safetensors")]:
            present = (path / name).stat().st_size
            if present != sizes.get(name, present):
                return f"{name} has {present} bytes of {sizes[name]}"
            with safe_open(path / name, framework="pt"):
                pass
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing" if error.filename else str(error)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        return f"meta.json is unreadable: {type(error).__name__}"
    except SafetensorError as error:
        return f"{name} is unreadable: {error}"
    return found


def _disk_is_full(error: Exception) -> bool:
    if isinstance(error, OSError):
        return error.errno in (errno.ENOSPC, errno.EDQUOT)
    return any(f"os error {number}" in str(error) for number in (errno.ENOSPC, errno.EDQUOT))


def require_same_tensors(saved: Mapping[str, Tensor], present: Mapping[str, Tensor], what: str) -> None:
    """Refuse to put back tensors of another model.

    Raises:
        TrainingError: names or shapes differ.
    """
    if saved.keys() != present.keys():
        named = sorted(saved.keys() ^ present.keys())
        raise TrainingError(
            f"the checkpoint's {what} have {len(saved)} tensors, this model has {len(present)}, and {len(named)} are "
            f"in one of them only ({', '.join(named[:3])} …); use the settings and the version it was written with, "
            "or another --out"
        )
    for name, tensor in saved.items():
        if tensor.shape != present[name].shape:
            raise TrainingError(
                f"the checkpoint's {name} is {tuple(tensor.shape)}, this model's is {tuple(present[name].shape)}; "
                "use the settings it was written with, or another --out"
            )
