"""`cdm-bench training`: student steps per second of our iteration against the authors' schedule of passes.

Same teacher, batch, draws, precision and kernels, in one run, the two taking turns iteration pair by iteration pair.
The authors' pair (arXiv 2605.06376, code of bacc57f): text encoders every iteration, all N rollout steps, one student
forward with gradient for each of CA, DM and CDM, and one call for each teacher and fake-teacher query. Ours: prompts
encoded once, rollouts that stop at their anchors, one forward for CA and DM, one batch for each network. Theirs is run
with our CPU kernels (`training/cpu_kernels.py`), which tells what the passes cost, and with torch's own.

    cdm-bench training --teacher training/assets/teacher --n-max 28 --batch 16 --rounds 8
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field
from torch import nn

from benchmarks.report import show
from engines.cli import CommandSettings
from engines.families.base import load_family
from training.config import CDMConfig
from training.cpu_kernels import cpu_kernels, keep_freed_memory
from training.distill import Distillation
from training.embeddings import embed_in_memory
from training.prompts import read_prompts
from training.roles import Roles

Way = tuple[Distillation, Callable[[], object], Callable[[], AbstractContextManager[None]]]

SHARED = "ours, shared rollout"
PASSES, TORCH = "authors' passes", "authors' passes, torch's kernels"
GOAL = 1.7
"""What the authors' schedule must take at least, to ours."""

PROMPTS = Path(__file__).parents[1] / "training" / "assets" / "sample_prompts.txt"


class TrainingBenchSettings(CommandSettings, env_prefix="CDM_BENCH_TRAINING_"):
    """Time pairs of iterations (one student step) in both ways, alternating."""

    teacher: Path = Field(Path("training/assets/teacher"), description="diffusers folder of the teacher")
    prompts: Path | None = Field(None, description="prompt list; none: the one that ships")
    batch: int = Field(16, ge=1, description="prompts per step")
    n_max: int = Field(28, ge=1, description="longest schedule; 28 as published")
    rounds: int = Field(8, ge=2, description="pairs of iterations in each way, after one to warm up")
    dtype: Literal["float32", "bfloat16"] = Field("bfloat16", description="compute copies of the networks")
    threads: int = Field(1, ge=1, description="CPU threads")


def run(settings: TrainingBenchSettings) -> int:
    """Measure, print a table and one JSON line."""
    torch.set_num_threads(settings.threads)
    keep_freed_memory()
    theirs: dict[str, Any] = {"shared_forward": False, "truncated_rollout": False}
    ways: dict[str, Way] = {
        "ours": (*_work(settings, {}, settings.batch * 6), cpu_kernels),
        SHARED: (*_work(settings, {"shared_rollout": True}, settings.batch * 6), cpu_kernels),
        PASSES: (*_work(settings, theirs, settings.batch, encode=True), cpu_kernels),
        TORCH: (*_work(settings, theirs, settings.batch, encode=True), nullcontext),
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    spent: dict[str, int] = dict.fromkeys(ways, 0)
    counters = {name: _count_samples(work) for name, (work, _, _) in ways.items()}
    order = list(ways)
    for turn in range(settings.rounds + 1):
        order.append(order.pop(0))  # another goes first; all draw the same schedules, anchors and noise
        for name in order:
            work, before, kernels = ways[name]
            at, start = counters[name](), time.perf_counter()
            with kernels():
                for step in (2 * turn, 2 * turn + 1):
                    before()
                    work.iterate(step)
            if turn:
                seconds[name].append(time.perf_counter() - start)
                spent[name] += counters[name]() - at
        print(f"\rround {turn}/{settings.rounds}", end="", file=sys.stderr, flush=True)
    rows = [_row(name, seconds, spent, settings) for name in ways]
    show(
        "training", rows, seconds=seconds, teacher=settings.teacher.name, batch=settings.batch,
        n_max=settings.n_max, threads=settings.threads, dtype=settings.dtype, goal=GOAL,
    )  # fmt: skip
    return 0


def _work(
    settings: TrainingBenchSettings, changes: dict[str, Any], pass_batch: int, encode: bool = False
) -> tuple[Distillation, Callable[[], object]]:
    """The loop in one way, and what runs before each of its iterations."""
    config = CDMConfig(
        batch=settings.batch, n_max=settings.n_max, dtype=settings.dtype, lr_student=1e-7, lr_fake=1e-7, **changes
    )  # fmt: skip
    family = load_family(settings.teacher)
    prompts = read_prompts(settings.prompts or PROMPTS)
    table = embed_in_memory(family, prompts.texts, getattr(torch, config.dtype))
    work = Distillation(family, config, Roles(family.transformer, config), prompts, table, pass_batch)
    for module in family.text_modules().values():
        nn.Module.to(module, getattr(torch, config.dtype))
    texts = [prompts.texts[i % len(prompts.texts)] for i in range(settings.batch)]
    return work, (lambda: family.encode([*texts, ""])) if encode else (lambda: None)


def _count_samples(work: Distillation) -> Callable[[], int]:
    """How many samples went through the transformers so far; a pass with gradient counts three."""
    spent = 0

    def hook(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        nonlocal spent
        spent += len(kwargs["hidden_states"]) * (3 if torch.is_grad_enabled() else 1)

    for network in (work.roles.student, work.roles.fake, work.roles.teacher):
        network.net.register_forward_pre_hook(hook, with_kwargs=True)
    return lambda: spent


def _row(
    name: str, seconds: dict[str, list[float]], spent: dict[str, int], settings: TrainingBenchSettings
) -> dict[str, Any]:
    ours = seconds["ours"]
    return {
        "way": name,
        "s per student step": statistics.median(seconds[name]),
        "student steps/s": 1 / statistics.median(seconds[name]),
        "total time, to ours": sum(seconds[name]) / sum(ours),
        "median of pairs, to ours": statistics.median(
            a / b for a, b in zip(seconds[name], ours, strict=True)
        ),
        "passes per sample and student step": spent[name] / len(ours) / settings.batch,
    }
