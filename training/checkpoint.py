"""A checkpoint is a folder of safetensors files and one readable `meta.json`; the newest complete one is resumed.

    save(run / "checkpoints", 1200, {"model": model.state_dict(), "adamw": optimizer_tensors(opt)}, {"samples": 38400})
    found = latest(run / "checkpoints")          # None, or a Checkpoint
    model.load_state_dict(found.tensors("model"))

Written to a temporary sibling and renamed, so that a killed run never leaves half a checkpoint to resume from.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from training.errors import Diverged, TrainingError


@dataclass(frozen=True)
class Checkpoint:
    """One complete checkpoint on disk."""

    path: Path
    step: int
    meta: dict[str, Any]

    def tensors(self, name: str) -> dict[str, Tensor]:
        """The tensors saved under `name`."""
        return load_file(self.path / f"{name}.safetensors")


def save(
    folder: Path,
    step: int,
    groups: Mapping[str, Mapping[str, Tensor]],
    meta: Mapping[str, Any],
    keep: int = 2,
) -> Path:
    """Write checkpoint `step` under `folder` and delete all but the newest `keep`, and what killed runs left behind.

    Raises:
        Diverged: a tensor holds NaN or infinity; nothing is written.
    """
    for group, tensors in groups.items():
        for key, value in tensors.items():
            if not bool(torch.isfinite(value).all()):
                raise Diverged(
                    f"{group}/{key} is not finite at step {step}; no checkpoint is written; run again with a lower "
                    "learning rate and another --out"
                )
    target = folder / f"step-{step:08d}"
    partial = folder / f".partial-{step:08d}"
    for leftover in folder.glob(".partial-*"):
        shutil.rmtree(leftover)
    partial.mkdir(parents=True)
    for name, tensors in groups.items():
        save_file({key: value.detach().contiguous().clone() for key, value in tensors.items()},
                  partial / f"{name}.safetensors")  # fmt: skip
    (partial / "meta.json").write_text(json.dumps({"step": step, **meta}, indent=2) + "\n", encoding="utf-8")
    for file in partial.iterdir():
        with file.open("rb") as handle:
            os.fsync(handle.fileno())
    shutil.rmtree(target, ignore_errors=True)
    partial.rename(target)
    for old in sorted(folder.glob("step-*"))[:-keep]:
        shutil.rmtree(old)
    return target


def latest(folder: Path) -> Checkpoint | None:
    """The newest complete checkpoint under `folder`, if any."""
    for path in sorted(folder.glob("step-*"), reverse=True):
        if (path / "meta.json").is_file():
            meta = json.loads((path / "meta.json").read_text(encoding="utf-8"))
            return Checkpoint(path, int(meta["step"]), meta)
    return None


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


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """An optimizer's state as flat tensors: `<parameter index>.<state name>`."""
    state = optimizer.state_dict()["state"]
    return {
        f"{index}.{name}": value if isinstance(value, Tensor) else torch.tensor(float(value))
        for index, entry in state.items()
        for name, value in entry.items()
    }


def load_optimizer(optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """Put back what `optimizer_tensors` took; the parameter groups (learning rates …) stay as configured now.

    Raises:
        TrainingError: the tensors belong to another set of parameters.
    """
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        index, name = key.split(".", 1)
        state.setdefault(int(index), {})[name] = value
    groups = optimizer.state_dict()["param_groups"]
    count = sum(len(group["params"]) for group in groups)
    if state and max(state) >= count:
        raise TrainingError(
            f"checkpoint has optimizer state for {max(state) + 1} parameters, this model has {count}"
        )
    optimizer.load_state_dict({"state": state, "param_groups": groups})
