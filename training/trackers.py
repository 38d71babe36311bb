"""Curves and pictures for others to watch: TensorBoard or Weights & Biases, through `accelerate.tracking`.

    trackers = Trackers.start("tensorboard", Path("runs/student"), config, step=run.resume(state))
    trackers.log(step, {"ca": 2.1, "student_norm": 0.9})
    trackers.image(step, "samples", sheet_HWC)
    trackers.close()

A run resumed at `step` repeats what a killed process had done after its last checkpoint. TensorBoard is told to forget
that part (`purge_step`). W&B cannot forget, so what it already has is not sent twice: an exact resume repeats the
same numbers. A server says what it has; offline, W&B's file is some 15 seconds behind, and a kill may leave its curve
without them. `log.jsonl` has every step.
"""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
from numpy.typing import NDArray

from engines.files import write_text_atomically
from training.errors import TrainingError
from training.keys import key_info

Kind = Literal["tensorboard", "wandb", "none"]

TENSORBOARD = "tensorboard"
"""Folder of the event files within the run's."""
WANDB_STATE = "wandb.json"
EXTRAS = {"tensorboard": "train", "wandb": "wandb"}


def require_tracker(kind: Kind) -> None:
    """The tracker's package is installed, and W&B, unless it is offline, lets one in.

    Raises:
        TrainingError: it is not, or it does not.
    """
    if kind != "none" and find_spec(kind) is None:
        raise TrainingError(_missing(kind, kind))
    if kind != "wandb":
        return
    import wandb

    if wandb.setup().settings.mode != "online":
        return
    try:
        known = wandb.login(prompt=False)
    except wandb.errors.Error as error:
        raise _no_wandb(error) from error
    if not known:
        raise _no_wandb("there is no API key")


def _no_wandb(why: object) -> TrainingError:
    return TrainingError(
        f"--tracker=wandb: W&B does not start ({why}); run `wandb login`, or set WANDB_MODE=offline and "
        "upload later with `wandb sync`, or use another --tracker"
    )


def _missing(kind: Kind, package: str) -> str:
    return (
        f"--tracker={kind} needs the package {package!r}, which is not installed; "
        f"pip install 'cdm-serve[{EXTRAS[kind]}]', or use --tracker none"
    )


class Trackers:
    """One tracker, or none; only the main process has one."""

    def __init__(self, tracker: Any, kind: Kind, progress: _Progress | None = None) -> None:
        self._tracker, self._kind, self._progress = tracker, kind, progress

    @classmethod
    def start(cls, kind: Kind, folder: Path, config: Mapping[str, Any], step: int = 0) -> Self:
        """Begin, or go on at iteration `step`, in the run folder `folder`. `config` is shown beside the curves.

        W&B takes its project from WANDB_PROJECT, else `cdm-train`, and its mode (`offline`) from WANDB_MODE.

        Raises:
            TrainingError: the tracker's package is missing, or W&B refuses to start.
        """
        from accelerate import PartialState

        if kind == "none" or not PartialState().is_main_process:
            return cls(None, "none")
        try:
            return (
                cls._tensorboard(folder, config, step)
                if kind == "tensorboard"
                else cls._wandb(folder, config)
            )
        except ModuleNotFoundError as error:
            raise TrainingError(_missing(kind, str(error.name))) from error

    @classmethod
    def _tensorboard(cls, folder: Path, config: Mapping[str, Any], step: int) -> Self:
        import tensorboard  # noqa: F401  # accelerate would fall back on tensorboardX, and name that as missing
        from accelerate.tracking import TensorBoardTracker

        tracker = TensorBoardTracker(TENSORBOARD, folder, purge_step=step)
        tracker.start()
        # Not store_init_configuration: at every start it adds another run, without curves, to TensorBoard's list.
        lines = json.dumps(dict(config), indent=2, ensure_ascii=False, default=str).splitlines()
        tracker.writer.add_text("config", "\n".join("    " + line for line in lines), step)
        return cls(tracker, "tensorboard")

    @classmethod
    def _wandb(cls, folder: Path, config: Mapping[str, Any]) -> Self:
        import wandb
        from accelerate.tracking import WandBTracker

        progress = _Progress.of(folder / WANDB_STATE)
        tracker = WandBTracker(
            os.environ.get("WANDB_PROJECT", "cdm-train"), dir=folder, id=progress.id, resume="allow",
            name=folder.name, config=json.loads(json.dumps(dict(config), default=str)),
        )  # fmt: skip
        try:
            tracker.start()
        except wandb.errors.Error as error:
            raise _no_wandb(error) from error
        if not tracker.run.offline:
            progress.server_has(tracker.run.starting_step)
        return cls(tracker, "wandb", progress)

    def log(self, step: int, values: Mapping[str, float], stream: str = "numbers") -> None:
        """Numbers of iteration `step`, by name; shown in the groups of `training.keys`. Once a step and `stream`."""
        if self._tracker is None or (self._progress and not self._progress.is_new(stream, step)):
            return
        grouped = {f"{key_info(name).group.name}/{name}": float(value) for name, value in values.items()}
        self._tracker.log(grouped, step=step)
        if self._progress:
            self._progress.done(stream, step)

    def image(self, step: int, name: str, picture_HWC: NDArray[np.uint8]) -> None:
        """A picture `(H, W, 3)` uint8 that belongs to iteration `step`."""
        if self._tracker is None or (self._progress and not self._progress.is_new(name, step)):
            return
        how = {"dataformats": "NHWC"} if self._kind == "tensorboard" else {}
        self._tracker.log_images({name: picture_HWC[None]}, step=step, **how)
        if self._progress:
            self._progress.done(name, step)

    def close(self) -> None:
        """Flush and end; a second call does nothing."""
        if self._tracker is not None:
            self._tracker.finish()
        self._tracker = None


class _Progress:
    """W&B's id of the run and the last step that it was sent of each thing, kept in the run folder."""

    def __init__(self, path: Path, run: str, sent: dict[str, int]) -> None:
        self._path, self.id, self._sent = path, run, sent
        self._before = 0

    def server_has(self, before: int) -> None:
        """The server's word, everything of steps below `before`, counts for more than what was sent."""
        self._sent, self._before = {}, before

    @classmethod
    def of(cls, path: Path) -> Self:
        """What is known; a new id where nothing is.

        Raises:
            TrainingError: the file holds something else.
        """
        if not path.is_file():
            return cls(path, secrets.token_hex(4), {})
        try:
            saved = json.loads(path.read_text(encoding="utf-8"))
            return cls(path, str(saved["id"]), {str(key): int(step) for key, step in saved["sent"].items()})
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise TrainingError(
                f"{path} does not hold a W&B run's id and progress ({error!r}); delete it to begin a new W&B run"
            ) from error

    def is_new(self, what: str, step: int) -> bool:
        """Whether W&B has not been sent `what` of `step`."""
        return step >= self._before and step > self._sent.get(what, -1)

    def done(self, what: str, step: int) -> None:
        """Remember it, for a process that resumes this run."""
        self._sent[what] = step
        write_text_atomically(self._path, json.dumps({"id": self.id, "sent": self._sent}) + "\n")
