"""The parts of an acceptance that come before any runtime: kernels, student, bundle, torch's own answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.acceptance_contenders import Contender
from benchmarks.acceptance_process import Operator
from benchmarks.acceptance_report import OK, Acceptance, Missed, Row, Skipped
from benchmarks.acceptance_runtimes import Examination, Start
from engines.export.tolerance import Tolerance

CASES = tuple(
    f"{kernel}, batch {batch}"
    for batch in (1, 4)
    for kernel in (
        "layer_norm_modulate, SD3-Medium",
        "layer_norm_modulate, LongCat",
        "gate_residual_norm, SD3-Medium",
        "gate_residual_norm, LongCat",
        "qk_norm_rope, SD3.5-Medium",
        "qk_norm_rope, LongCat",
        "qk_norm_rope, LongCat interleaved",
    )
)
"""Keys of `acceptance_kernels.CASES`, which wants torch and Triton."""

PROBES = (1, 2)
"""Batches compared with torch, on the CPU: larger ones take long there, and the claims cover them."""


@dataclass(frozen=True)
class Task:
    """What is wanted of `examine_runtimes`. `sizes` in pixels, width first; `scale` where there is no student."""

    out: Path
    device: str
    student: Path | None
    scale: str
    sizes: list[list[int]]
    precisions: list[str]
    batches: list[int]
    steps: int
    rounds: int
    triton_url: str = ""
    tolerance: Tolerance = field(default_factory=Tolerance)


def examine_kernels(
    report: Acceptance, start: Start, out: Path, device: str, precisions: Sequence[str], rounds: int
) -> None:
    """Every kernel in every precision; in a process of their own, which is replaced where one fails."""
    rehearsal = device == "cpu"
    environment = {
        "TRITON_CACHE_DIR": str(out.absolute() / "work" / "kernels"),
        **({"TRITON_INTERPRET": "1"} if rehearsal else {}),
    }
    process: Operator | None = None
    for precision in precisions:
        if rehearsal and precision == "bf16":
            why = "skipped: Triton's interpreter truncates bfloat16, f32 alone is rehearsed"
            report.add("kernels", precision, result=why)
            continue
        for case in CASES:
            process = process or start("kernels", environment)
            call = partial(
                process.call, "kernel", case=case, precision=precision, device=device, rounds=rounds
            )
            row = report.attempt("kernels", f"{case}, {precision}", call)
            if row["result"] != OK:  # what poisons a GPU's context poisons it for good
                process.close()
                process = None
    if process is not None:
        process.close()


def examine_runtimes(report: Acceptance, start: Start, task: Task, chosen: Sequence[Contender]) -> None:
    """Student, bundle, references, then every contender; none of them where there is no bundle."""
    work = task.out / "work"
    student, bundle, references = _student(task), work / "bundle", work / "references"

    def once(operation: str, **arguments: Any) -> Row:
        process = start(operation, {})
        try:
            row: Row = process.call(operation, **arguments)
            return row
        finally:
            process.close()

    def row(what: str, operation: str, **arguments: Any) -> Row:
        found = report.attempt("export", what, partial(once, operation, **arguments))
        if found["result"] != OK:
            raise (Skipped if found["result"].startswith("skipped") else Missed)(what)
        return found

    compared = {"batches": PROBES, "steps": task.steps}
    try:
        if task.student is None:
            what = f"student: random weights, {task.scale}"
            row(what, "student", folder=str(student), scale=task.scale)
        else:
            report.add("export", f"student: {task.student}")
        where = {"student": str(student), "out": str(bundle), "sizes": task.sizes}
        written = row("bundle in float32 and bfloat16, with the weights", "export", **where, **compared)
        if not chosen:
            return
        where = {"student": str(student), "bundle": str(bundle), "folder": str(references)}
        row("torch's answers in float32, on the CPU", "references", **where, **compared)
    except (Skipped, Missed) as error:
        kind = "skipped" if isinstance(error, Skipped) else "failed"
        for contender in chosen:
            report.add("runtimes", contender.name, result=f"{kind}: there is nothing to run: {error}")
        return
    Examination(
        report=report,
        start=start,
        work=work,
        bundle=bundle,
        references=references,
        device=task.device,
        sizes=written["sizes"],
        batches=task.batches,
        steps=task.steps,
        rounds=task.rounds,
        precisions=task.precisions,
        tolerance=task.tolerance,
        triton_url=task.triton_url,
        probes=PROBES,
    ).run(chosen)


def _student(task: Task) -> Path:
    return (task.student or task.out / "work" / "student").absolute()
