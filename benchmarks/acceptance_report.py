"""What an acceptance has found so far: rows by part, on disk after every row, so that a crash loses one row at most.

A row is a dict of plain values; `result` says `ok`, `failed: …` or `skipped: …`, and only those that failed count.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from benchmarks.report import machine, table
from engines.errors import EngineError
from engines.files import write_text_atomically

Row = dict[str, Any]

OK = "ok"
REHEARSAL = "rehearsal on the CPU: says nothing about a GPU"

PARTS = {
    "machine": "The machine",
    "export": "Student and bundle",
    "kernels": "Triton kernels against float64 and against torch",
    "runtimes": "Runtimes: loading, memory, fusion",
    "parity": "Parity with torch in float32",
    "claims": "Batches, copies, CUDA graphs, caches",
    "times": "Times",
}
"""Part → its heading, in the report's order."""


class Skipped(Exception):
    """Something is not installed here, or its maker has none for this GPU; the message says what."""


class Missed(Exception):
    """A call failed, or something is not what it should be; the message is a sentence."""


def sentence(error: BaseException) -> str:
    """The first line of what an error says; of one that is not ours, with its type."""
    said = (str(error).strip().splitlines() or [""])[0]
    ours = isinstance(error, (EngineError, Missed, Skipped))
    return said if ours and said else f"{type(error).__name__}: {said}".removesuffix(": ")


def is_missing(error: BaseException) -> bool:
    """Whether it came of a package that is not installed."""
    cause = error if isinstance(error, ImportError) else error.__cause__
    ours = ("benchmarks", "engines", "training", "cdm_serve")
    return isinstance(cause, ModuleNotFoundError) and (cause.name or "").split(".")[0] not in ours


class Acceptance:
    """The report in `out`: `report.json` and `report.md`, each whole whenever this is killed."""

    def __init__(self, out: Path, *, rehearsal: bool, **facts: Any) -> None:
        out.mkdir(parents=True, exist_ok=True)
        self._out = out
        self.rehearsal = rehearsal
        self.facts: dict[str, Any] = facts
        self.parts: dict[str, list[Row]] = {part: [] for part in PARTS}
        self.finished = False
        self.save()

    def add(self, part: str, what: str, **values: Any) -> Row:
        """A row; `result` is `ok` unless it is given."""
        row = {"what": what, "result": OK, **values}
        self.parts[part].append(row)
        self.save()
        return row

    def attempt(self, part: str, what: str, call: Callable[[], Row | None]) -> Row:
        """A row of what `call` gives, none if it gives None; whatever it raises is the row's result, and no more."""
        try:
            values = call()
        except Skipped as error:
            values = {"result": f"skipped: {sentence(error)}"}
        except Exception as error:  # of any library: the next part must run all the same
            kind = "skipped" if is_missing(error) else "failed"
            values = {"result": f"{kind}: {sentence(error)}"}
        return {"what": what, "result": OK} if values is None else self.add(part, what, **values)

    @property
    def failed(self) -> list[Row]:
        """The rows that failed."""
        return [row for row in self.rows() if str(row["result"]).startswith("failed")]

    def rows(self) -> Iterable[Row]:
        """All rows, with their part."""
        return ({"part": part, **row} for part, rows in self.parts.items() for row in rows)

    def summary(self) -> list[Row]:
        """A row for each, its figures in one cell: for the terminal."""
        said = [
            {**{key: row[key] for key in ("part", "what", "result")}, "figures": _figures(row)}
            for row in self.rows()
        ]
        return [{"part": "", "what": REHEARSAL}, *said] if self.rehearsal else said

    def document(self) -> dict[str, Any]:
        """`report.json`."""
        return {
            "benchmark": "gpu-acceptance",
            "rehearsal": REHEARSAL if self.rehearsal else None,
            "finished": self.finished,
            "failed": len(self.failed),
            **self.facts,
            "machine": machine(),
            "parts": self.parts,
        }

    def save(self) -> None:
        """Write both files."""
        document = json.dumps(self.document(), indent=1, ensure_ascii=False)
        write_text_atomically(self._out / "report.json", document + "\n")
        write_text_atomically(self._out / "report.md", self._markdown())

    def _markdown(self) -> str:
        lines = ["# cdm-serve on a GPU: acceptance", ""]
        if self.rehearsal:
            lines += [f"**{REHEARSAL}.**", ""]
        state = "Finished" if self.finished else "Not finished"
        lines += [f"{state}; {len(self.failed)} rows failed. All figures are in report.json.", ""]
        lines += [f"- {name}: {value}" for name, value in self.facts.items()]
        for part, title in PARTS.items():
            if rows := self.parts[part]:
                lines += ["", f"## {title}", "", table([_flat(row) for row in rows])]
        return "\n".join(lines) + "\n"


def _figures(row: Row) -> str:
    numbers = {
        key: value for key, value in row.items() if isinstance(value, (int, float)) and value is not True
    }
    said = [f"{key} {value:.4g}" for key, value in numbers.items()]
    return ", ".join([row["size"], *said] if "size" in row else said)


def _flat(row: Row) -> Row:
    """What fits into a table: no lists, no dicts; a bar would end a cell."""
    return {
        key: value.replace("|", "\\|") if isinstance(value, str) else value
        for key, value in row.items()
        if not isinstance(value, (dict, list, tuple))
    }
