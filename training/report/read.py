"""A run folder as it is found: finished, in progress, damaged or bare. Nothing here draws.

    run = read_run(Path("runs/emoji-cdm"))
    run.log.curves["cdm"].values

What cannot be read is left out and told in `run.notes`: a report of what is there is worth more than an error.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from training.environment import read_starts
from training.errors import TrainingError

REPORT = "report.html"


@dataclass
class Curve:
    """One logged number: `steps` ascending, `values` finite."""

    steps: list[int] = field(default_factory=list)
    values: list[float] = field(default_factory=list)

    def add(self, step: int, value: float) -> None:
        """Append; whatever was logged at `step` or after it was run again, and is forgotten."""
        while self.steps and self.steps[-1] >= step:
            self.steps.pop()
            self.values.pop()
        self.steps.append(step)
        self.values.append(value)


@dataclass(frozen=True)
class Event:
    """Something that happened at an iteration. `kind`: start, resume, checkpoint, warning, stop or note."""

    step: int
    kind: str
    text: str
    time: float | None = None


@dataclass
class Log:
    """`log.jsonl`, by number."""

    curves: dict[str, Curve] = field(default_factory=dict)
    times: Curve = field(default_factory=Curve)
    """Seconds since 1970 at which each logged iteration was done."""
    events: list[Event] = field(default_factory=list)
    damaged: int = 0

    @property
    def done(self) -> int:
        """Iterations behind the log."""
        return self.times.steps[-1] + 1 if self.times.steps else 0


@dataclass(frozen=True)
class Evaluation:
    """One table of measurements."""

    name: str
    result: dict[str, Any]


@dataclass(frozen=True)
class Entry:
    """A file of the run, or the files of one folder in it."""

    name: str
    files: int
    bytes: int


@dataclass
class RunData:
    """Everything that a report shows."""

    folder: Path
    config: dict[str, Any] = field(default_factory=dict)
    log: Log = field(default_factory=Log)
    starts: list[dict[str, Any]] = field(default_factory=list)
    provenance: dict[str, Any] = field(default_factory=dict)
    evaluations: list[Evaluation] = field(default_factory=list)
    checkpoints: list[int] = field(default_factory=list)
    grids: list[tuple[int, Path]] = field(default_factory=list)
    grid_info: dict[str, Any] = field(default_factory=dict)
    files: list[Entry] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def read_run(folder: Path) -> RunData:
    """Everything in `folder`.

    Raises:
        TrainingError: no run was begun there.
    """
    if not (folder / "config.json").is_file() and not (folder / "log.jsonl").is_file():
        state = "holds neither config.json nor log.jsonl" if folder.is_dir() else "is no folder"
        raise TrainingError(
            f"{folder} {state}; a report is of a run folder, the --out of a `cdm-train` recipe"
        )
    run = RunData(folder)
    run.config = _object(folder / "config.json", run.notes)
    run.log = read_log(folder / "log.jsonl")
    if run.log.damaged:
        run.notes.append(f"log.jsonl: {run.log.damaged} line(s) could not be read and are left out")
    try:
        run.starts = read_starts(folder)
    except TrainingError as error:
        run.notes.append(str(error))
    made = [folder / product / "provenance.json" for product in ("student", "model")]
    run.provenance = _object(next((path for path in made if path.is_file()), made[0]), run.notes)
    run.evaluations = _evaluations(folder, run)
    run.checkpoints = sorted(_numbered(folder / "checkpoints", "step-*"))
    grids = _numbered(folder / "samples", "step-*.png")
    run.grids = sorted(grids.items())
    run.grid_info = _object(folder / "samples" / "prompts.json", run.notes)
    run.files = _files(folder)
    return run


def read_log(path: Path) -> Log:
    """Curves and events of a log; lines that are no JSON object with a step are counted and left out.

    A line with an `event` (`warning`, `stop` or any other word) and maybe a `text` is something that happened.
    """
    log = Log()
    if not path.is_file():
        return log
    lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
    # A run in progress may be writing its last line just now: `lines[-1]`, empty if it has ended.
    for line in lines[:-1]:
        try:
            record = json.loads(line)
            step, at = int(record["step"]), record.get("time")
        except (ValueError, KeyError, TypeError):
            log.damaged += bool(line.strip())
            continue
        at = float(at) if _is_number(at) else None
        if "event" in record:
            text = str(record.get("text", record["event"]))
            log.events.append(Event(step, _kind(str(record["event"])), text, at))
            continue
        if at is not None:
            log.times.add(step, at)
        for key, value in record.items():
            if key in ("step", "time") or isinstance(value, bool) or not isinstance(value, (int, float)):
                continue
            if math.isfinite(value):
                log.curves.setdefault(key, Curve()).add(step, float(value))
            else:
                log.events.append(Event(step, "stop", f"{key} = {value}", at))
    return log


def _kind(word: str) -> str:
    return word if word in ("warning", "stop") else "note"


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _object(path: Path, notes: list[str]) -> dict[str, Any]:
    """A JSON object; empty if there is none, with a note if it is damaged."""
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(value, dict):
            raise ValueError("it is no JSON object")
    except (OSError, ValueError) as error:
        notes.append(f"{path.parent.name}/{path.name} could not be read ({error})")
        return {}
    return value


def _numbered(folder: Path, pattern: str) -> dict[int, Path]:
    """`step-00000400…` → path, by step."""
    found = {}
    for path in folder.glob(pattern):
        digits = path.stem.partition("-")[2]
        if digits.isdigit():
            found[int(digits)] = path
    return found


def _evaluations(folder: Path, run: RunData) -> list[Evaluation]:
    """Those kept with the student, then `evaluations/*.json` by name. A file may hold a result or a list of rows."""
    metrics = run.provenance.get("metrics")
    found = []
    for name, value in metrics.items() if isinstance(metrics, dict) else ():
        if (result := _result(value)) is not None:
            found.append(Evaluation("student" if name == "evaluate" else str(name), result))
    for path in sorted((folder / "evaluations").glob("*.json")):
        try:
            result = _result(json.loads(path.read_text(encoding="utf-8")))
            if result is None:
                raise ValueError("no list of rows")
        except (OSError, ValueError) as error:
            run.notes.append(f"evaluations/{path.name} could not be read ({error})")
            continue
        found.append(Evaluation(path.stem, result))
    return found


def _result(value: Any) -> dict[str, Any] | None:
    """What `cdm-train evaluate` writes, or the bare list of its rows; None if it is neither."""
    result = value if isinstance(value, dict) else {"rows": value}
    rows = result.get("rows")
    valid = isinstance(rows, list) and rows and all(isinstance(row, dict) for row in rows)
    return result if valid else None


def _files(folder: Path) -> list[Entry]:
    """Files at the top, and the files of each folder two levels down, together; the report itself left out."""
    sizes: dict[str, tuple[int, int]] = {}
    for path in sorted(folder.rglob("*")):
        inside = path.relative_to(folder)
        if path.is_symlink() or not path.is_file() or inside.as_posix() == REPORT:
            continue
        name = (
            inside.name
            if len(inside.parts) == 1
            else "/".join(inside.parts[: min(2, len(inside.parts) - 1)]) + "/"
        )
        files, total = sizes.get(name, (0, 0))
        sizes[name] = (files + 1, total + path.stat().st_size)
    return [Entry(name, *sizes[name]) for name in sorted(sizes)]
