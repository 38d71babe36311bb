"""A `cdm-train` that kills itself with SIGKILL at an exact point: the target of `test_kill.py`'s processes."""

from __future__ import annotations

import importlib
import os
import signal
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from training.main import main

PRELOAD = ["training.session", "tests.training.kill_worker"]


@dataclass(frozen=True)
class Moment:
    """Call number `call` (from 1) of `owner`.`name`: killed before it, or after it with the file it wrote cut in half.

    `owner`: `module` or `module:Class`.
    """

    owner: str
    name: str
    call: int = 1
    torn: bool = False


def command(arguments: list[str], moment: Moment | None) -> None:
    """Run `cdm-train ARGUMENTS` until it ends, or the moment comes."""
    torch.set_num_threads(1)
    if moment is not None:
        arm(moment)
    raise SystemExit(main(arguments))


def arm(moment: Moment) -> None:
    """Replace the function by one that dies."""
    module, _, kind = moment.owner.partition(":")
    owner: Any = importlib.import_module(module)
    owner = getattr(owner, kind) if kind else owner
    original, calls = getattr(owner, moment.name), 0

    def dying(*args: Any, **keywords: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == moment.call:
            if moment.torn:
                original(*args, **keywords)
                path = next(Path(value) for value in args if isinstance(value, str | Path))
                os.truncate(path, path.stat().st_size // 2)
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*args, **keywords)

    setattr(owner, moment.name, dying)
