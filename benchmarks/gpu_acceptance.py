"""`cdm-bench gpu-acceptance`: everything that can only be known on a GPU, in one command and one report.

It says what machine this is, exports a student, holds the Triton kernels and every runtime that is installed to torch
in float32, proves what a CPU cannot (CUDA graphs, copies, caches), and times all of them in turns. `docs/gpu.md` says
what each row means. Whatever fails is a row; the rest goes on, and what was found is on disk after every row.

    cdm-bench gpu-acceptance --out runs/gpu-acceptance
    cdm-bench gpu-acceptance --device cpu --size tiny       # the same path, on a CPU: a rehearsal
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_validator

from benchmarks.acceptance_contenders import CONTENDERS, Contender
from benchmarks.acceptance_machine import describe
from benchmarks.acceptance_parts import Task, examine_kernels, examine_runtimes
from benchmarks.acceptance_process import Process
from benchmarks.acceptance_report import REHEARSAL, Acceptance
from benchmarks.acceptance_runtimes import Start
from benchmarks.report import show
from engines.cli import CommandSettings, UsageError, hint
from engines.export.tolerance import Tolerance

KERNELS, EXPORT = "kernels", "export"


class GpuAcceptanceSettings(CommandSettings, env_prefix="CDM_BENCH_GPU_ACCEPTANCE_"):
    """Check and time everything on this machine's GPU, and write a report.

    Exit code 1 where anything failed or is above a tolerance; what is not installed is skipped and says so.
    """

    out: Path = Field(
        Path("runs/gpu-acceptance"), description="folder for report.json, report.md, logs and models"
    )
    device: Literal["cuda", "cpu"] = Field("cuda", description="cpu rehearses; it says nothing about a GPU")
    only: list[str] = Field(
        [], description=f"parts and runtimes, of {KERNELS}, {EXPORT}, {', '.join(CONTENDERS)}; empty: all"
    )
    student: Path | None = Field(None, description="diffusers folder; none builds a model of random weights")
    size: Literal["tiny", "75m", "medium", "longcat"] = Field(
        "75m", description="scale of that model: an SD3, or a LongCat-Image of 8 blocks"
    )
    sizes: list[str] = Field(
        [], description="picture sizes WxH, default first; empty: the model's own and half of it"
    )
    precisions: list[Literal["bf16", "f32"]] = Field(["bf16", "f32"], min_length=1, description="precisions")
    batches: list[int] = Field([1, 2, 4, 8], min_length=1, description="pictures per call, timed")
    steps: int = Field(4, ge=1, le=100, description="steps of a whole picture")
    rounds: int = Field(10, ge=1, description="measured rounds; every contender has one turn in each")
    triton_url: str = Field("", description="host:port of a Triton server that has this run's bundle")

    @field_validator("only")
    @classmethod
    def _are_known(cls, value: list[str]) -> list[str]:
        known = [KERNELS, EXPORT, *CONTENDERS]
        if wrong := [name for name in value if name not in known]:
            raise ValueError(f"{wrong[0]!r} is none of {', '.join(known)}{hint(wrong[0], known)}")
        return value

    @field_validator("sizes")
    @classmethod
    def _are_sizes(cls, value: list[str]) -> list[str]:
        for text in value:
            _pixels(text)
        return value

    @field_validator("batches")
    @classmethod
    def _are_batches(cls, value: list[int]) -> list[int]:
        if wrong := [batch for batch in value if not 1 <= batch <= 64]:
            raise ValueError(f"{wrong[0]} is not a batch size; 1 to 64 are allowed")
        return value


def run(settings: GpuAcceptanceSettings) -> int:
    """Everything, then the table and the JSON line; 1 if a row failed.

    Raises:
        UsageError: there is no GPU, and no rehearsal was asked for.
    """

    def start(name: str, environment: Mapping[str, str]) -> Process:
        print(f"… {name}", file=sys.stderr, flush=True)
        return Process(settings.out / "logs" / f"{name.replace(' ', '-')}.log", environment)

    return accept(settings, describe(), start)


def accept(settings: GpuAcceptanceSettings, machine: Mapping[str, Any], start: Start) -> int:
    """`run` on a `machine` as `describe` gives it, with processes from `start`."""
    if settings.device == "cuda" and not machine["gpus"]:
        raise UsageError(
            "there is no NVIDIA GPU here, or no driver for it (nvidia-smi lists none); run this on a machine with one, "
            "or rehearse it with --device cpu"
        )
    report = Acceptance(
        settings.out,
        rehearsal=settings.device == "cpu",
        device=machine["gpus"][0]["name"] if settings.device == "cuda" else "CPU",
        commit=machine["commit"],
        settings=settings.model_dump(mode="json", exclude={"out"}),
        tolerance=vars(Tolerance()),
    )
    add_machine(report, machine)
    chosen = contenders(settings)
    if not settings.only or KERNELS in settings.only:
        examine_kernels(report, start, settings.out, settings.device, settings.precisions, settings.rounds)
    if chosen or EXPORT in settings.only:
        task = Task(
            out=settings.out.absolute(),
            device=settings.device,
            student=settings.student,
            scale=settings.size,
            sizes=[_pixels(text) for text in settings.sizes],
            precisions=list(settings.precisions),
            batches=settings.batches,
            steps=settings.steps,
            rounds=settings.rounds,
            triton_url=settings.triton_url,
        )
        examine_runtimes(report, start, task, chosen)
    report.finished = True
    report.save()
    show(
        "gpu-acceptance",
        report.summary(),
        rehearsal=REHEARSAL if report.rehearsal else None,
        failed=len(report.failed),
        device=report.facts["device"],
        commit=machine["commit"],
        report=str(settings.out / "report.json"),
    )
    return 1 if report.failed else 0


def contenders(settings: GpuAcceptanceSettings) -> list[Contender]:
    """Those named; where nothing is named, all of the device's."""
    if settings.only:
        return [item for name, item in CONTENDERS.items() if name in settings.only]
    return [item for item in CONTENDERS.values() if settings.device in item.devices]


def add_machine(report: Acceptance, machine: Mapping[str, Any]) -> None:
    """Rows of GPUs and packages."""
    for number, gpu in enumerate(machine["gpus"]):
        report.add(
            "machine", f"GPU {number}", **gpu, **({"CUDA": machine["cuda"]} if machine["cuda"] else {})
        )
    for name, version in machine["packages"].items():
        report.add("machine", name, result=version)


def _pixels(text: str) -> list[int]:
    width, _, height = text.partition("x")
    if not (width.isdecimal() and height.isdecimal() and int(width) and int(height)):
        raise ValueError(f"{text!r} is not a size; write WIDTHxHEIGHT in pixels, as 512x512")
    return [int(width), int(height)]
