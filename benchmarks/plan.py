"""`cdm-bench plan`: what `cdm-train plan` predicts beside real runs of the loop on this CPU.

SD3 folders of the real classes with random weights are distilled for a few iterations, each row in a process of its own
and there twice: once for time (CPU seconds, one thread), once for memory. The schedule is fixed and its rollout whole,
so that every iteration is the same work. Only the CPU's speed is calibrated, one row for each dtype; its time is no
evidence. `--blocks` compares what a forward leaves in memory of blocks at full width (`plan_saved`).
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from pydantic import Field

from benchmarks import plan_saved
from benchmarks.plan_worker import PHASES
from benchmarks.random_sd3 import Scale, build_random_sd3
from benchmarks.report import show
from engines.cli import CommandSettings, UsageError
from training.config import CDMConfig, MachineConfig
from training.plan_memory import Memory
from training.plan_model import describe
from training.plan_setup import Setup
from training.plan_time import Speed, iteration

OF_PHASE = {
    "rollout": ("rollout",),
    "fake step": ("fake step: backward", "fake update"),
    "student step": ("student step: teachers asked", "student step: backward", "student update"),
}
"""A method of the loop → phases of a plan."""


def _scale(layers: int, heads: int, latent: int) -> Scale:
    return Scale(layers, heads, 64, 128, (64, 64), latent, (8, 8, 16, 16), 4)


SCALES = {
    "10m": _scale(4, 4, 16),
    "21m": _scale(4, 6, 16),
    "42m": _scale(8, 6, 16),
    "10m-32": _scale(4, 4, 32),
}


@dataclass(frozen=True)
class Row:
    """One distillation."""

    scale: str
    config: Mapping[str, Any] = field(default_factory=dict)
    machine: Mapping[str, Any] = field(default_factory=dict)


F32: Mapping[str, Any] = {"dtype": "float32"}
ROWS = {
    "10m": Row("10m"),
    "10m-micro-2": Row("10m", machine={"micro_batch": 2}),
    "10m-checkpointing": Row("10m", machine={"gradient_checkpointing": True}),
    "10m-three-forwards": Row("10m", {"shared_forward": False}),
    "10m-latents-32": Row("10m-32"),
    "42m": Row("42m", {"batch": 2}),
    "10m-float32": Row("10m", F32),
    "21m-float32": Row("21m", F32),
    "21m-float32-checkpointing": Row("21m", F32, {"gradient_checkpointing": True}),
}
"""Size of the model and what is changed. The first row of each dtype calibrates the CPU's speed."""

BASE: Mapping[str, Any] = {
    "batch": 4, "student_every": 1, "schedule": "fixed", "fixed_steps": 2, "truncated_rollout": False,
}  # fmt: skip


class PlanBenchSettings(CommandSettings, env_prefix="CDM_BENCH_PLAN_"):
    """Compare predicted with measured memory and time of small distillations."""

    only: list[str] = Field([], description=f"rows; empty: all of {', '.join(ROWS)}")
    blocks: bool = Field(False, description="instead: what autograd keeps of blocks at full width")
    iterations: int = Field(4, ge=2, description="iterations of each run; the first is not timed")


def run(settings: PlanBenchSettings) -> int:
    """Measure, print the table and one JSON line."""
    for name in settings.only:
        if name not in ROWS:
            raise UsageError(f"there is no row {name!r}; rows: {', '.join(ROWS)}")
    torch.set_num_threads(1)
    bandwidth, speeds = _bandwidth(), dict[str, Speed]()
    if settings.blocks:
        show("plan", plan_saved.rows())
        return 0
    rows: list[dict[str, Any]] = []
    cache: dict[Any, Any] = {}
    with tempfile.TemporaryDirectory() as scratch:
        for name in settings.only or ROWS:
            row = ROWS[name]
            folder = Path(scratch) / row.scale
            if not folder.is_dir():
                build_random_sd3(folder, SCALES[row.scale], dtype=torch.float32)
            config, machine = CDMConfig(**{**BASE, **row.config}), MachineConfig(**row.machine)
            memory = Memory(
                Setup(describe(str(folder)), config, machine, kernels="cpu", sample_grids=False), cache
            )
            measured = _worker(folder, config, machine, settings.iterations)
            if config.dtype not in speeds:
                speeds[config.dtype] = _calibrated(memory, sum(measured["seconds"].values()), bandwidth)
            rows.append(_row(name, memory, measured, speeds[config.dtype]))
            print(
                f"{name}: memory {rows[-1]['ratio']}, time {rows[-1]['time ratio']}",
                file=sys.stderr,
                flush=True,
            )
    show(
        "plan", rows, bandwidth_gb_s=bandwidth, tflops={name: speed.tflops for name, speed in speeds.items()}
    )
    return 0


def _row(name: str, memory: Memory, found: Mapping[str, Any], speed: Speed) -> dict[str, Any]:
    spent, peaks = found["seconds"], found["peaks"]
    stays = sum(memory.persistent.values())
    phases = {phase: sum(parts.values()) for phase, parts in memory.phases.items()}
    predicted = {phase: stays + max(phases[part] for part in parts) for phase, parts in OF_PHASE.items()}
    most, measured = max(predicted.values()), max(peaks.values())
    row: dict[str, Any] = {
        "run": name, "dtype": memory.setup.config.dtype, "M parameters": round(memory.student.count / 1e6, 1),
        "peak, MB": round(measured / 1e6, 1), "predicted, MB": round(most / 1e6, 1), "ratio": round(most / measured, 3),
    }  # fmt: skip
    for phase in PHASES:
        row[f"{phase}, memory"] = round(predicted[phase] / peaks[phase], 3)
    row["of resident"] = round(most / found["resident"], 3)
    expected = {work.name: work.seconds(speed) for work in iteration(memory)}
    row |= {"iteration, s": round(sum(spent.values()), 3), "predicted, s": round(sum(expected.values()), 3)}
    row["time ratio"] = round(sum(expected.values()) / sum(spent.values()), 3)
    for phase in PHASES:
        row[f"{phase}, time"] = round(expected[phase] / spent[phase], 3)
    return row


def _calibrated(memory: Memory, seconds: float, bandwidth: float) -> Speed:
    """The CPU's FLOP/s, from one run."""
    work = iteration(memory)
    moving = sum(part.moved for part in work) / (bandwidth * 1e9)
    return Speed(sum(part.flops for part in work) / 1e12 / (seconds - moving), bandwidth, 1.0)


def _bandwidth() -> float:
    """GB/s of reading and writing main memory."""
    source, best = torch.ones(1 << 26), 0.0
    target = torch.empty_like(source)
    for _ in range(5):
        start = time.process_time()
        target.copy_(source)
        best = max(best, 2 * source.nbytes / 1e9 / (time.process_time() - start))
    return round(best, 1)


def _worker(folder: Path, config: CDMConfig, machine: MachineConfig, iterations: int) -> dict[str, Any]:
    asked = {
        "folder": str(folder), "config": config.model_dump(), "machine": machine.model_dump(), "iterations": iterations,
    }  # fmt: skip
    command = [sys.executable, "-m", "benchmarks.plan_worker", json.dumps(asked)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise UsageError(
            f"a run of {folder.name} ended with {done.returncode}: {done.stderr.strip()[-2000:]}"
        )
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return found
