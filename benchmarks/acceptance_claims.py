"""What only a GPU can prove, asked of one runtime: a row a claim, and what was seen instead where it does not hold."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.acceptance_copies import RECORDABLE, Copy, crossing, judge
from benchmarks.acceptance_engine import Job
from benchmarks.acceptance_installed import TORCH
from benchmarks.acceptance_parity import Examined, alone_row, psnr
from benchmarks.acceptance_process import Operator
from benchmarks.acceptance_report import Acceptance, Missed, Row
from engines.export.tolerance import Tolerance

JOBS: list[Job] = [("a red apple", 1, 4), ("a lighthouse at night", 2, 2), ("", 3, 3), ("two cats", 4, 1)]
"""One batch of mixed prompts and schedules: after its first step, its rows are never all there again."""

Picture = NDArray[np.uint8]

NO_GRAPH = "runs without a CUDA graph"
"""What the log says of a shape that could not be captured."""


class Claims:
    """Claims about `who`; what it draws is kept in `folder` until they are settled."""

    def __init__(self, report: Acceptance, who: Examined, folder: Path, tolerance: Tolerance) -> None:
        self._report = report
        self._who = who
        self._folder = folder
        self._tolerance = tolerance

    def mixed(self, process: Operator, jobs: Sequence[Job], size: Sequence[int]) -> None:
        """Pictures of one batch, which they leave at different steps, are those that are drawn alone."""

        def same() -> Row:
            self._draw(process, jobs, size, "first")
            for number, job in enumerate(jobs):
                self._draw(process, [job], size, f"alone{number}")
            alone = [self._image(f"alone{number}")[0] for number in range(len(jobs))]
            return self._same(self._image("first"), alone, "itself alone")

        self._claim("a batch of mixed schedules draws each picture's own", same)

    def same_pictures(self, process: Operator, jobs: Sequence[Job], size: Sequence[int]) -> None:
        """A second process draws what the first has drawn."""

        def same() -> Row:
            self._draw(process, jobs, size, "second")
            return self._same(self._image("second"), self._image("first"), "the first process's")

        self._claim("a second process draws the same pictures", same)

    def _same(self, found: Iterable[Picture], wanted: Iterable[Picture], what: str) -> Row:
        """Each of `found` must be nearest to its like in `wanted`, and in float32 nearly equal to it."""
        found, wanted, own = list(found), list(wanted), []
        for number, picture in enumerate(found):
            near = [psnr(picture, other) for other in wanted]
            own.append(near[number])
            if max(near) > near[number]:
                raise Missed(f"picture {number} is nearer to picture {near.index(max(near))} than to {what}")
            if self._who.precision == "f32" and near[number] < self._tolerance.psnr:
                raise Missed(
                    f"picture {number} is {near[number]:.1f} dB from {what}, of {self._tolerance.psnr:g} dB needed"
                )
        equal = sum(np.array_equal(a, b) for a, b in zip(found, wanted, strict=True))
        return {"pictures": len(own), "equal bytes": equal, "least PSNR dB": min(own)}

    def rows_are_their_own(self, process: Operator, references: Path, outputs: Path) -> None:
        """The denoiser answers a row in a batch as it answers the row alone."""

        def alone() -> Row:
            process.call("outputs", references=str(references), out=str(outputs / "alone"), alone=True)
            return alone_row(outputs, outputs / "alone", self._who, self._tolerance)

        self._claim("a row in a batch is what it is alone", alone)

    def invariant(
        self, process: Operator, load: Mapping[str, Any], jobs: Sequence[Job], size: Sequence[int]
    ) -> None:
        """With `invariant_batch`, bytes do not depend on what shares the batch."""

        def same() -> Row:
            process.call("load", **load)
            together = self._draw(process, jobs, size, "together")
            alone = [self._draw(process, [job], size, "one")[0] for job in jobs]
            backwards = self._draw(process, jobs[::-1], size, "backwards")[::-1]
            if not together == alone == backwards:
                wrong = [
                    n
                    for n, three in enumerate(zip(together, alone, backwards, strict=True))
                    if len(set(three)) > 1
                ]
                raise Missed(f"pictures {wrong} differ in their bytes with what shares their batch")
            return {"pictures": len(jobs)}

        self._claim("invariant batches give the same bytes in any company", same)

    def host_copies(self, process: Operator, runtime: str, batch: int, size: Sequence[int]) -> None:
        """Between steps only σ and σ′ go up, nothing comes down; asked only of runtimes that promise it."""
        if runtime not in (*RECORDABLE, *TORCH):
            return
        found: dict[str, list[Copy] | None] = {}

        def copies() -> Row:
            found.update(process.call("copies", batch=batch, size=size))
            seen = found["profiler"]
            if seen is None:
                return {"result": "skipped: torch for CUDA, whose profiler tells, is not installed"}
            return {"result": judge(seen, batch), "bytes": crossing(seen), "copies": seen}

        self._claim("no step copies a latent to or from the host (profiler)", copies)
        if (asked := found.get("driver")) is not None:
            self._claim(
                "no step copies a latent to or from the host (our calls)",
                lambda: {"result": judge(asked, batch), "bytes": crossing(asked), "copies": asked},
            )

    def graphs_are_used(self, process: Operator) -> None:
        """No shape that has run went without a CUDA graph."""

        def used() -> Row:
            if without := [line for line in process.call("warnings") if NO_GRAPH in line]:
                raise Missed(f"{len(without)} shapes could not be captured: {without[0]}")
            return {}

        self._claim("every shape runs as a CUDA graph", used)

    def graphs_change_nothing(self, process: Operator, load: Mapping[str, Any], size: Sequence[int]) -> None:
        """With captures that fail halfway, the engine falls back to plain calls and draws the same bytes."""

        def same() -> Row:
            jobs = JOBS[: len(self._image("first"))]
            process.call("load", **load)
            self._draw(process, jobs, size, "plain")
            without = [line for line in process.call("warnings") if NO_GRAPH in line]
            if not without:
                raise Missed("captures were meant to fail and did not, so graphs were compared with graphs")
            if not np.array_equal(self._image("first"), self._image("plain")):
                raise Missed("pictures differ in their bytes with CUDA graphs and without")
            return {"shapes without a graph": len(without)}

        self._claim("CUDA graphs on and off give the same bytes, and a failed capture is survived", same)

    def cache_was_used(self, before: Mapping[str, str], after: Mapping[str, str]) -> None:
        """The second process has compiled nothing that the first had kept."""

        def used() -> Row:
            if not before:
                raise Missed("the first process has kept nothing")
            if changed := sorted(name for name in after if before.get(name) != after[name]):
                raise Missed(f"the second process compiled anew: {', '.join(changed)}")
            return {"files": len(before)}

        self._claim("a second process compiles nothing anew", used)

    def _claim(self, what: str, call: Any) -> Row:
        return self._report.attempt("claims", f"{self._who.label}: {what}", call)

    def _draw(self, process: Operator, jobs: Sequence[Job], size: Sequence[int], name: str) -> list[str]:
        hashes: list[str] = process.call("draw", jobs=jobs, size=size, out=str(self._folder / f"{name}.npy"))
        return hashes

    def _image(self, name: str) -> Picture:
        try:
            image: Picture = np.load(self._folder / f"{name}.npy", allow_pickle=False)
        except OSError as error:
            raise Missed("there are no pictures to compare with") from error
        return image
