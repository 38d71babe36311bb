"""One runtime after the other: loaded cold, held to torch, examined, loaded again from its cache, timed in turns.

Each in two processes of its own, the second of which finds what the first has compiled; beside it, while it is timed,
the baseline in a third. So never more than two models are on the GPU.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.acceptance_claims import JOBS, Claims
from benchmarks.acceptance_contenders import Contender, environment
from benchmarks.acceptance_engine import Job
from benchmarks.acceptance_machine import used_bytes
from benchmarks.acceptance_parity import Examined, component_rows, picture_rows
from benchmarks.acceptance_process import Operator
from benchmarks.acceptance_report import OK, Acceptance, Missed, Row, Skipped
from benchmarks.acceptance_times import alternate, shapes, time_rows
from engines.export.tolerance import Tolerance

Start = Callable[[str, Mapping[str, str]], Operator]
"""Name of the log, environment → a process."""

KERNELS_BLOB = "kernels"
"""Its file is written anew whenever TensorRT-RTX has run another shape; all others must stay."""


@dataclass
class Examination:
    """What is examined, where and how often. `precisions`: those wanted, of those that a runtime has."""

    report: Acceptance
    start: Start
    work: Path
    bundle: Path
    references: Path
    device: str
    sizes: list[list[int]]
    batches: list[int]
    steps: int
    rounds: int
    precisions: list[str]
    tolerance: Tolerance = field(default_factory=Tolerance)
    triton_url: str = ""
    probes: tuple[int, ...] = (1, 2)
    """Batches that torch has answered."""
    _baseline: tuple[str, Operator] | None = None

    @property
    def max_batch(self) -> int:
        """The most pictures that any part asks for at once."""
        return max(*self.batches, *self.probes, 2)

    @property
    def _jobs(self) -> list[Job]:
        return JOBS[: self.max_batch]

    def run(self, contenders: Sequence[Contender]) -> None:
        """Examine all, the baseline first."""
        try:
            for contender in contenders:
                for precision in self._precisions(contender):
                    self._examine(contender, precision)
        finally:
            if self._baseline is not None:
                self._baseline[1].close()

    def _precisions(self, contender: Contender) -> list[str]:
        """Of those wanted, those that it has here; a row where it has none to give."""
        if contender.runtime.startswith("triton") and not self.triton_url:
            self.report.add("runtimes", contender.name, result="skipped: no --triton-url was given")
            return []
        found: list[str] = []

        def ask() -> None:
            with self._process(contender.name, self.work / "none") as process:
                found.extend(
                    process.call(
                        "precisions", bundle=str(self.bundle), runtime=contender.runtime, device=self.device
                    )
                )

        self.report.attempt("runtimes", contender.name, ask)
        return [precision for precision in found if precision in (*self.precisions, "auto")]

    def _examine(self, contender: Contender, precision: str) -> None:
        label = f"{contender.name} {precision}"
        cache = self.work / "cache" / label.replace(" ", "-")
        shutil.rmtree(cache, ignore_errors=True)
        options = contender.options(precision, self.max_batch, cache, self.triton_url)
        who = Examined(label, contender.runtime, precision, contender.own_weights)
        claims = Claims(self.report, who, self.work / "pictures" / label.replace(" ", "-"), self.tolerance)
        before = self._used()
        with self._process(label, cache) as process:
            row = self.report.attempt(
                "runtimes",
                f"{label}, built",
                lambda: self._loaded(process, self._load(options, record=True), "build s"),
            )
            if row["result"] != OK:
                return
            self._fused(process, label)
            self._parity(process, who, claims)
            claims.mixed(process, self._jobs, self.sizes[0])
            if before is not None and (used := self._used()) is not None:
                row["GPU MB"] = round((used - before) / 1e6, 1)
            if self.device == "cuda":
                claims.host_copies(process, contender.runtime, self.max_batch, self.sizes[0])
            if contender.runtime.startswith("tensorrt"):
                claims.graphs_are_used(process)
                claims.graphs_change_nothing(process, self._load(options, spoil_captures=True), self.sizes[0])
        self._again(contender, label, options, cache, claims)
        shutil.rmtree(cache, ignore_errors=True)

    def _again(
        self, contender: Contender, label: str, options: dict[str, Any], cache: Path, claims: Claims
    ) -> None:
        process, kept = self.start(label, environment(cache)), False
        try:
            stored = _hashes(cache)
            row = self.report.attempt(
                "runtimes",
                f"{label}, in a second process",
                lambda: self._loaded(process, self._load(options), "load s"),
            )
            if row["result"] != OK:
                return
            row["cache MB"] = round(_bytes(cache) / 1e6, 3)
            claims.same_pictures(process, self._jobs, self.sizes[0])
            if contender.keeps:
                claims.cache_was_used(stored, _hashes(cache))
            self._times(process, label)
            if self._baseline is None:  # the first that was timed
                self._baseline, kept = (label, process), True
            invariant = {**options, "invariant_batch": 2}
            with self._process(label, cache) as other:
                claims.invariant(other, self._load(invariant), self._jobs, self.sizes[0])
        finally:
            if not kept:
                process.close()

    def _loaded(self, process: Operator, load: dict[str, Any], column: str) -> Row:
        answer = process.call("load", **load)
        info = answer["info"]
        return {
            column: answer["load s"],
            "runtime": f"{info['runtime']} {info['version']}",
            "device": info["device"],
            "precision": info["precision"],
        }

    def _load(self, options: dict[str, Any], **how: bool) -> dict[str, Any]:
        """Arguments of `load`; `record` has copies written down, where nothing is timed."""
        return {"bundle": str(self.bundle), "options": options, "device": self.device, **how}

    def _fused(self, process: Operator, label: str) -> None:
        def fused() -> Row | None:
            found = process.call("fusion")
            if found is None:
                return None
            row: Row = {"fusion": found["said"], "report": found}
            if "scratch_bytes" in found:
                row["scratch MB"] = round(found["scratch_bytes"] / 1e6, 1)
            if "fell apart" in found and not label.endswith(" f32"):  # in float32 it always does
                row["result"] = f"failed: {found['fell apart']}"
            return row

        self.report.attempt("runtimes", f"{label}, fusion", fused)

    def _parity(self, process: Operator, who: Examined, claims: Claims) -> None:
        out = self.work / "answers" / who.label.replace(" ", "-")
        shutil.rmtree(out, ignore_errors=True)
        where = {"references": str(self.references), "out": str(out)}

        def rows(operation: str, found: Callable[[], Iterator[Row]], **arguments: Any) -> None:
            try:
                process.call(operation, **where, **arguments)
                for row in found():
                    self.report.add("parity", **row)
            except (Missed, Skipped) as error:
                self.report.add("parity", f"{who.label}: {operation}", result=f"failed: {error}")

        rows("outputs", lambda: component_rows(self.references, out, who, self.tolerance))
        rows(
            "pictures",
            lambda: picture_rows(self.references, out, who, self.steps, self.tolerance),
            steps=self.steps,
        )
        claims.rows_are_their_own(process, self.references, out)
        shutil.rmtree(out, ignore_errors=True)

    def _times(self, process: Operator, label: str) -> None:
        wanted = shapes(self.batches, self.sizes)
        contenders = {label: process}
        baseline = label
        if self._baseline is not None:
            baseline, other = self._baseline
            contenders[baseline] = other
        found = alternate(contenders, wanted, self.steps, self.rounds)
        for row in time_rows(label, found[label], baseline, found[baseline]):
            self.report.add("times", **row)

    def _used(self) -> int | None:
        return used_bytes() if self.device == "cuda" else None

    @contextmanager
    def _process(self, label: str, cache: Path) -> Iterator[Operator]:
        process = self.start(label, environment(cache))
        try:
            yield process
        finally:
            process.close()


def _hashes(cache: Path) -> dict[str, str]:
    """File → hash, of the compiled models that an engine keeps."""
    return {
        str(path.relative_to(cache)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(cache.rglob("*.blob"))
        if path.stem != KERNELS_BLOB
    }


def _bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
