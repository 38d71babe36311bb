"""A training run's bookkeeping: its folder, exact resume, progress with ETA, the log. No maths here.

    run = Run(Path("runs/teacher"), config, total=40_000)
    start = run.resume(state)                     # 0, or the step after the newest checkpoint
    for step in run.steps(start, state):          # saves every few minutes, and when told to stop
        run.log(step, loss=train_step(step))

"To resume training, run the same command again." Random numbers come from `(seed, step)` only (`training/draws.py`), so
nothing but tensors and counters has to be saved, and a resumed run draws what an uninterrupted one would have drawn.
"""

from __future__ import annotations

import hashlib
import json
import math
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import FrameType
from typing import Any, Protocol

import numpy as np
from torch import Tensor

from engines.files import write_text_atomically
from training import checkpoint
from training.claims import claim_folder
from training.errors import Collapsed, Diverged, TrainingError
from training.progress import Bar

LOG = "log.jsonl"
CONFIG = "config.json"


class State(Protocol):
    """What a recipe saves and restores."""

    def tensors(self) -> Mapping[str, Mapping[str, Tensor]]:
        """Groups of tensors by file name."""

    def counters(self) -> Mapping[str, Any]:
        """Small JSON values."""

    def restore(self, saved: checkpoint.Checkpoint) -> None:
        """Put both back."""


def config_sha256(config: Mapping[str, Any]) -> str:
    """Hash of a configuration, independent of key order."""
    return hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()


def numpy_generator(seed: int, step: int, stream: int = 0) -> np.random.Generator:
    """Numpy randomness of one step: equal `(seed, step, stream)` draw equal numbers, in whatever process."""
    return np.random.default_rng([seed, step, stream])


class Run:
    """One run's folder: `config.json`, `log.jsonl`, `checkpoints/`."""

    def __init__(
        self,
        folder: Path,
        config: Mapping[str, Any],
        total: int,
        save_minutes: float = 5.0,
        free: tuple[str, ...] = (),
        keep: int = 2,
        main: bool = True,
        agree: Callable[[bool], bool] = lambda decision: decision,
        barrier: Callable[[], None] = lambda: None,
    ) -> None:
        """`free` names settings that a resumed run may change (how long to train, how often to save).

        `keep`: checkpoints beside the best. With several processes only `main` writes, `agree` tells all whether any
        of them says so, and `barrier` waits for all.

        A hash (`…_sha256`) that `config.json` lacks was not recorded then, and binds from now on.

        Raises:
            TrainingError: the folder holds a checkpoint made with other settings, or another process is at it.
        """
        self.folder = folder
        self.total = total
        self.save_seconds = save_minutes * 60
        self.keep, self.main, self.agree, self.barrier = keep, main, agree, barrier
        self.saved_step = -1
        self._stopped_by: int | None = None
        self._running: dict[str, float] = {}
        self.protected: int | None = None
        """Step of a checkpoint that is kept whatever comes after it: the last one before the watchdog warned."""
        folder.mkdir(parents=True, exist_ok=True)
        # Held as long as this process lives.
        self._claim = claim_folder(folder) if main else None
        path = folder / CONFIG
        bound = {key: value for key, value in config.items() if key not in free}
        self.started = checkpoint.latest(folder / "checkpoints") is not None
        """Whether there is something to resume; before that a folder is bound to nothing."""
        if self.started and path.is_file():
            before = json.loads(path.read_text(encoding="utf-8"))
            changed = [
                key
                for key, value in bound.items()
                if before.get(key) != json.loads(json.dumps(value))
                and (key in before or not key.endswith("_sha256"))
            ]
            if changed:
                raise TrainingError(
                    f"{folder} holds a run with other settings: "
                    + ", ".join(f"{key}={config[key]!r} (there: {before.get(key)!r})" for key in changed)
                    + "; use these again, or another --out"
                )
        barrier()  # all have read the old file
        if main:
            write_text_atomically(path, json.dumps(config, indent=2) + "\n")
        barrier()

    def resume(self, state: State) -> int:
        """Restore the newest checkpoint into `state`; the step to go on with."""
        saved = checkpoint.latest(self.folder / "checkpoints", self._tell)
        step = 0
        if saved is not None:
            state.restore(saved)
            step = saved.step
        self.saved_step = step
        if self.main:
            self._cut_log(step)
        self.barrier()
        return step

    def save(self, step: int, state: State, score: checkpoint.Score | None = None) -> None:
        """Write a checkpoint that resumes at `step`; the one with the best score is never rotated away.

        Raises:
            Diverged: a tensor is not finite.
            TrainingError: the disk is full; in every process, if in one.
        """
        failure: Exception | None = None
        try:
            checkpoint.save(
                self.folder / "checkpoints",
                step,
                state.tensors(),
                state.counters(),
                self.keep,
                score,
                self.main,
                self.protected,
            )
        except (TrainingError, OSError) as error:
            failure = error
        failed = self.agree(failure is not None)
        if failure is not None:
            raise failure
        if failed:
            raise TrainingError(f"another process could not save the checkpoint of step {step}; it says why")
        self.saved_step = step

    def steps(
        self, start: int, state: State, score: Callable[[int], checkpoint.Score | None] = lambda done: None
    ) -> Iterator[int]:
        """Yield `start … total − 1`; save every `save_minutes`, at the end, and on SIGTERM or Ctrl-C, then stop.

        Where `score` of the number of steps done gives one, a checkpoint is saved with it (in all processes alike).

        Raises:
            SystemExit: stopped by a signal: 128 + its number, as shells count (130 for Ctrl-C, 143 for SIGTERM).
        """
        previous = {sig: signal.signal(sig, self._on_signal) for sig in (signal.SIGTERM, signal.SIGINT)}
        saved_at, took = time.monotonic(), 0.0
        try:
            with Bar(self.folder.name, self.total, start, self.main) as bar:
                for step in range(start, self.total):
                    yield step
                    bar.update(step + 1, self._running)
                    rated = score(step + 1)
                    # The first process's clock decides, and a signal to any stops all.
                    # Saving tens of GB to a slow disk must not become most of the run.
                    pause = max(self.save_seconds, 10 * took if took > 1 else 0.0)
                    due = self.main and time.monotonic() - saved_at > pause
                    stop = self.agree(self._stopped_by is not None)
                    if rated is not None or ((self.agree(due) or stop) and self.saved_step != step + 1):
                        began = time.monotonic()
                        self.save(step + 1, state, rated)
                        saved_at = time.monotonic()
                        took = saved_at - began
                    if stop:
                        bar.say(f"stopped at step {step + 1}; the same command goes on from there")
                        raise SystemExit(128 + (self._stopped_by or signal.SIGTERM))
            if start < self.total and self.saved_step != self.total:
                self.save(self.total, state)
        finally:
            for sig, handler in previous.items():
                signal.signal(sig, handler)

    def log(self, step: int, every: int = 20, **values: float) -> None:
        """Smooth `values` into the progress note and append every `every`th step to the log.

        Raises:
            Diverged: a value is NaN or infinite.
        """
        for key, value in values.items():
            if not math.isfinite(value):
                raise Diverged(
                    f"{key}={value} at step {step}; run again with a lower learning rate and another --out, since "
                    f"{self.folder} goes on only with the settings it was begun with"
                )
            self._running[key] = 0.98 * self._running.get(key, value) + 0.02 * value
        if step % every == 0:
            self.record(step, **values)

    def record(self, step: int, **values: Any) -> None:
        """Append one line to `log.jsonl`."""
        if not self.main:
            return
        with (self.folder / LOG).open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, "time": round(time.time(), 1), **values}) + "\n")

    def tell(self, step: int, level: str, diagnosis: str) -> None:
        """Say what the watchdog found, and log it as an event of `step`."""
        self.record(step, event="stop" if level == "stop" else "warning", text=diagnosis)
        self._tell(diagnosis)

    def healthy(self) -> checkpoint.Checkpoint | None:
        """What is left of a run that failed: the checkpoint with the best score, or the one before it began to fail."""
        folder = self.folder / "checkpoints"
        if not folder.is_dir():
            return None
        return checkpoint.best(folder) or checkpoint.at(folder, self.protected)

    def collapsed(self, diagnosis: str) -> Collapsed:
        """What ends a run that the watchdog stops: the diagnosis, and which checkpoint is left to go on from."""
        folder = self.folder / "checkpoints"
        left = self.healthy()
        if left is None and folder.is_dir():
            left = checkpoint.latest(folder)
        kept = f"checkpoint {left.path.name} is kept" if left else "there is no checkpoint yet"
        return Collapsed(
            f"{diagnosis}; the run is stopped and {kept}; begin anew with other settings and another --out, or let it "
            "go on with --watchdog warn"
        )

    def _tell(self, sentence: str) -> None:
        if self.main:
            print(sentence, file=sys.stderr)

    def _cut_log(self, step: int) -> None:
        """Forget log lines of steps that will be run again, and a line that a killed run left half written."""
        path = self.folder / LOG
        if not path.is_file():
            return
        kept = []
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                if json.loads(line)["step"] < step:
                    kept.append(line + "\n")
            except ValueError:
                continue
        write_text_atomically(path, "".join(kept))

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self._stopped_by = number
