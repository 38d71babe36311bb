"""A checkpoint is a folder of safetensors files and one readable `meta.json`; the newest whole one is resumed.

    save(run / "checkpoints", 1200, {"model": model.state_dict(), "adamw": optimizer_tensors(opt)}, {"samples": 38400})
    found = latest(run / "checkpoints")          # None, or a Checkpoint
    model.load_state_dict(found.tensors("model"))

Written to a temporary sibling and renamed, so that a killed run never leaves half a checkpoint to resume from.
`meta.json` lists every file's size: a truncated or missing file is found without reading gigabytes (a flipped bit is
not). Sharded tensors are written whole, so that a checkpoint moves between world sizes.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor

from engines.files import to_disk
from training.errors import Diverged, TrainingError, disk_is_full
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
    protect: int | None = None,
) -> Path:
    """Write checkpoint `step`; delete all but the newest `keep`, the best, and that of step `protect`.

    What killed runs left behind goes too.

    Every process takes part in gathering sharded tensors; only `main` writes.

    Raises:
        Diverged: a tensor holds NaN or infinity; nothing is written.
        TrainingError: the disk is full, the older checkpoints are untouched; or the score is not finite.
    """
    if score is not None and not math.isfinite(score.value):
        raise TrainingError(f"score {score.value} of step {step} is not finite; give a finite one, or none")
    target, unfinished = _path(folder, step), folder / f".partial-{step:08d}"
    failure: Exception | None = None
    if main:
        failure = _tried(partial(_begin, folder, unfinished))
    need = 0
    for group, tensors in groups.items():
        # One group at a time: all of a large model's masters and moments together would be main memory's end.
        gathered: dict[str, Tensor] = {}
        for key, value in tensors.items():
            try:
                # Whatever failed here, the others wait for this process's shards.
                full = gather(value, main and failure is None)
            except Diverged:
                shutil.rmtree(unfinished, ignore_errors=True)
                raise Diverged(
                    f"{group}/{key} is not finite at step {step}; no checkpoint is written; run again with a lower "
                    "learning rate and another --out"
                ) from None
            need += value.numel() * value.element_size()
            if full is not None:
                gathered[key] = full
        if main and failure is None:
            failure = _tried(partial(save_file, gathered, unfinished / f"{group}.safetensors"))
    if not main:
        return target
    failure = failure or _tried(partial(_finish, unfinished, target, step, meta, score))
    if failure is not None:
        shutil.rmtree(unfinished, ignore_errors=True)
        if not disk_is_full(failure):
            raise failure
        raise TrainingError(
            f"no space for the checkpoint of step {step} in {folder}: it takes {need / 1e6:.1f} MB, and the older ones "
            "are untouched; free that much (or keep fewer checkpoints), then the same command goes on"
        ) from failure
    _rotate(folder, keep, protect)
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


def at(folder: Path, step: int | None) -> Checkpoint | None:
    """The whole checkpoint of a step, if it is there."""
    read = None if step is None else _read(_path(folder, step))
    return read if isinstance(read, Checkpoint) else None


def _path(folder: Path, step: int) -> Path:
    return folder / f"step-{step:08d}"


def best(folder: Path) -> Checkpoint | None:
    """The whole checkpoint with the best score, the older of equals; None if none has one."""
    found = [read for path in sorted(folder.glob("step-*")) if isinstance(read := _read(path), Checkpoint)]
    scored = [(each.score, each) for each in found if each.score is not None]
    if not scored:
        return None
    return min(scored, key=lambda pair: pair[0].value if pair[0].lower_is_better else -pair[0].value)[1]


def _tried(action: Callable[[], object]) -> Exception | None:
    """What went wrong with files, if anything."""
    try:
        action()
    except (OSError, SafetensorError) as error:
        return error
    return None


def _begin(folder: Path, unfinished: Path) -> None:
    for leftover in folder.glob(".partial-*"):
        shutil.rmtree(leftover)
    unfinished.mkdir(parents=True)


def _finish(unfinished: Path, target: Path, step: int, meta: Mapping[str, Any], score: Score | None) -> None:
    sizes = {file.name: file.stat().st_size for file in sorted(unfinished.iterdir())}
    rated = {} if score is None else {"score": vars(score)}
    text = json.dumps({"step": step, "files": sizes, **rated, **meta}, indent=2)
    (unfinished / "meta.json").write_text(text + "\n", encoding="utf-8")
    for path in (*unfinished.iterdir(), unfinished):
        to_disk(path)
    shutil.rmtree(target, ignore_errors=True)
    unfinished.rename(target)
    to_disk(target.parent)  # before older ones are deleted


def _rotate(folder: Path, keep: int, protect: int | None) -> None:
    paths = sorted(folder.glob("step-*"))
    # Damaged ones do not count among those kept: a whole one would go for them.
    whole_ones = [path for path in paths if isinstance(_read(path), Checkpoint)]
    top = best(folder)
    guarded = [] if protect is None else [_path(folder, protect)]
    kept = {*whole_ones[-keep:], *([top.path] if top else []), *guarded}
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
