"""Where and how a run was started: machine, packages, command. One entry per start in `RUN/environment.json`.

record_start(Path("runs/student"), step=run.resume(state), device=torch.device("cuda"))
starts = read_starts(Path("runs/student"))      # [{"time": …, "step": 0, …}, {"time": …, "step": 400, …}]
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from engines.files import write_text_atomically
from training.errors import TrainingError

ENVIRONMENT = "environment.json"
PACKAGES = (
    "cdm-serve", "torch", "diffusers", "transformers", "accelerate", "peft", "safetensors", "numpy", "bitsandbytes",
)  # fmt: skip


def record_start(
    folder: Path,
    step: int,
    device: torch.device | None = None,
    recipe: str = "",
    argv: Sequence[str] | None = None,
) -> None:
    """Append this start to the run's `environment.json`: call it once the step to go on with is known.

    Only the main process of several should.

    Raises:
        TrainingError: the file is there and is not a list of starts.
    """
    starts = read_starts(folder)
    starts.append({"time": round(time.time(), 1), "step": step, "recipe": recipe, **describe(device, argv)})
    write_text_atomically(folder / ENVIRONMENT, json.dumps(starts, indent=2, ensure_ascii=False) + "\n")


def read_starts(folder: Path) -> list[dict[str, Any]]:
    """Every start that was recorded, oldest first; none if the file is not there.

    Raises:
        TrainingError: the file is there and is not a list of starts.
    """
    path = folder / ENVIRONMENT
    if not path.is_file():
        return []
    try:
        starts = json.loads(path.read_text(encoding="utf-8"))
        valid = isinstance(starts, list) and all(
            isinstance(start, dict)
            and isinstance(start.get("step"), int)
            and isinstance(start.get("time"), (int, float))
            for start in starts
        )
    except ValueError:
        valid = False
    if not valid:
        raise TrainingError(
            f"{path} is not a list of starts, each with its step and time; delete it: it is written anew at every start"
        )
    return list(starts)


def describe(device: torch.device | None = None, argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Machine, packages and command line, as JSON values. `argv` defaults to this process's."""
    words = list(sys.argv if argv is None else argv)
    return {
        "command": shlex.join([Path(words[0]).name, *words[1:]]) if words else "",
        "device": str(device) if device is not None else "cpu",
        "processes": int(os.environ.get("WORLD_SIZE", "1")),
        "threads": torch.get_num_threads(),
        "cpu": cpu_name(),
        "cores": _cores(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "gpus": _gpus(),
        "system": platform.platform(),
        "python": platform.python_version(),
        "cuda": torch.version.cuda or "",
        "packages": package_versions(),
        "commit": git_commit(),
    }


def package_versions() -> dict[str, str]:
    """Version of each of `PACKAGES` that is installed."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def cpu_name() -> str:
    """What the processor calls itself."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, "") or platform.processor() or platform.machine()


def git_commit(file: Path = Path(__file__)) -> str:
    """Commit of the repository that `file` is tracked in, `+changes` if tracked files differ; empty outside git."""

    def git(*words: str) -> str | None:
        command = ["git", "--no-optional-locks", "-C", str(file.parent), *words]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    # An installed copy may lie inside somebody's repository without being of it.
    if git("ls-files", "--error-unmatch", file.name) is None:
        return ""
    commit = git("rev-parse", "HEAD") or ""
    return commit + ("+changes" if commit and git("status", "--porcelain", "--untracked-files=no") else "")


def _cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _gpus() -> list[dict[str, Any]]:
    if not torch.cuda.is_available():
        return []
    found = (torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count()))
    return [{"name": gpu.name, "memory_gib": round(gpu.total_memory / 2**30, 1)} for gpu in found]
