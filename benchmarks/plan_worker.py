"""One real distillation of a folder, measured from inside; a process of its own for every row of `cdm-bench plan`.

    python -m benchmarks.plan_worker '{"folder": "…", "config": {…}, "machine": {…}, "iterations": 3}'

Memory is what torch's CPU allocator was asked for, allocation by allocation, as its profiler reports it: exact, with
kernels' temporary buffers, and independent of how a plan counts. Resident memory (`VmHWM`, of a run without a profiler)
is given beside it: it also holds what glibc did not give back and libraries' own buffers.
"""

from __future__ import annotations

import copy
import json
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from engines.families.base import load_family
from training.config import CDMConfig, MachineConfig
from training.cpu_kernels import cpu_kernels
from training.distill import Distillation
from training.embeddings import embed_in_memory
from training.prompts import Prompts
from training.roles import Computing, Roles

PHASES = {"rollout": "rollout", "fake step": "fake_step", "student step": "student_step"}
"""What a row calls a phase → the method of `Distillation` that is one."""


def main(argument: str) -> int:
    """Measure what the JSON asks for, and print one JSON line."""
    asked = json.loads(argument)
    config, machine = CDMConfig(**asked["config"]), MachineConfig(**asked["machine"])
    torch.set_num_threads(1)
    family = load_family(Path(asked["folder"]), torch.float32)
    prompts = Prompts.of([(f"prompt {number}", 1.0) for number in range(8)], "benchmark")
    table = embed_in_memory(family, prompts.texts, getattr(torch, config.dtype))
    for module in family.text_modules().values():
        module.to("meta")

    loaded = family.transformer

    def build() -> Distillation:
        family.transformer = copy.deepcopy(loaded)  # within the measurement
        computing = Computing(gradient_checkpointing=machine.gradient_checkpointing)
        roles = Roles(family.transformer, config, computing=computing)
        return Distillation(family, config, roles, prompts, table, machine.pass_batch, machine.micro_batch)

    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark begins here
    before = _status("VmRSS")
    seconds = _times(build, asked["iterations"])
    resident = _status("VmHWM") - before
    print(json.dumps({"seconds": seconds, "resident": resident, "peaks": _peaks(build, 2)}))
    return 0


def _peaks(build: Any, iterations: int) -> dict[str, int]:
    """Bytes by phase; after one iteration every moment is there."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        work = build()
        for phase, method in PHASES.items():
            setattr(work, method, _recorded(phase, getattr(work, method)))
        with cpu_kernels():
            for step in range(iterations):
                work.iterate(step)
    results: Any = profiler.profiler
    events = sorted(results.kineto_results.events(), key=lambda event: event.start_ns())
    spans = {(e.start_ns(), e.end_ns()): e.name() for e in events if e.name() in PHASES}
    live, peaks = 0, dict.fromkeys(PHASES, 0)
    for event in events:
        if event.name() == "[memory]":
            live += event.nbytes()
            for (start, end), phase in spans.items():
                if start <= event.start_ns() <= end:
                    peaks[phase] = max(peaks[phase], live)
    return peaks


def _recorded(phase: str, method: Any) -> Any:
    def called(*arguments: Any) -> Any:
        with record_function(phase):
            return method(*arguments)

    return called


def _times(build: Any, iterations: int) -> dict[str, float]:
    """CPU seconds by phase, the least of all iterations."""
    work = build()
    spent: dict[str, list[float]] = {phase: [] for phase in PHASES}

    @contextmanager
    def clocked(phase: str) -> Iterator[None]:
        start = time.process_time()  # of this process alone: others share the machine
        yield
        spent[phase].append(time.process_time() - start)

    def timed(phase: str, method: Any) -> Any:
        def called(*arguments: Any) -> Any:
            with clocked(phase):
                return method(*arguments)

        return called

    for phase, method in PHASES.items():
        setattr(work, method, timed(phase, getattr(work, method)))
    parts = 1
    with cpu_kernels():
        for step in range(iterations):
            work.iterate(step)
            parts = max(1, len(spent["rollout"]) // (step + 1))
    # The first iteration creates the moments. Others on the machine only ever make a phase slower.
    return {
        phase: min(values[parts if phase == "rollout" else 1 :]) * (parts if phase == "rollout" else 1)
        for phase, values in spent.items()
    }


def _status(name: str) -> int:
    """Bytes, from /proc/self/status."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1]))
