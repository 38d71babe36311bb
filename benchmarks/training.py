"""`cdm-bench training`: student steps per second of our iteration against the authors' schedule of passes.

Same teacher, batch, draws, precision and kernels, in one run, the two taking turns iteration pair by iteration pair.
The authors' pair (arXiv 2605.06376, code of bacc57f): text encoders every iteration, all N rollout steps, one student
forward with gradient for each of CA, DM and CDM, and one call for each teacher and fake-teacher query. Ours: prompts
encoded once, rollouts that stop at their anchors, one forward for CA and DM, one batch for each network. Theirs is run
with our CPU kernels (`training/cpu_kernels.py`), which tells what the passes cost, and with torch's own. `--savings`
takes each of our savings back alone instead, and has LoRA roles on one base.

    cdm-bench training --teacher training/assets/teacher --n-max 28 --batch 16 --rounds 8
    cdm-bench training --teacher training/assets/teacher --n-max 28 --batch 16 --rounds 8 --savings
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
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
from training.roles import Computing, Network, Roles

GOAL = 1.7
"""What the authors' schedule must take at least, to ours."""


@dataclass(frozen=True)
class Way:
    """How an iteration is computed."""

    changes: Mapping[str, Any] = field(default_factory=dict)
    """To the published settings."""
    encode: bool = False
    """Text encoders run in every iteration."""
    pass_batch: int = 6
    """Largest call of teacher and fake teacher, in batches; 1: a call for each query."""
    kernels: Callable[[], AbstractContextManager[None]] = cpu_kernels


OURS = "ours"
AUTHORS = {"shared_forward": False, "truncated_rollout": False}
LORA = {"student_rank": 16, "fake_rank": 16, "student_alpha": 16.0, "fake_alpha": 16.0}
WAYS = {
    OURS: Way(),
    "ours, shared rollout": Way({"shared_rollout": True}),
    "authors' passes": Way(AUTHORS, encode=True, pass_batch=1),
    "authors' passes, torch's kernels": Way(AUTHORS, encode=True, pass_batch=1, kernels=nullcontext),
}
SAVINGS = {
    OURS: Way(),
    "a student forward for each term": Way({"shared_forward": False}),
    "rollouts to their end": Way({"truncated_rollout": False}),
    "text encoders in every iteration": Way(encode=True),
    "a call for each query": Way(pass_batch=1),
    "torch's kernels": Way(kernels=nullcontext),
    "LoRA roles of rank 16 on one base": Way(LORA),
}
"""Ours without one saving at a time; LoRA stands beside them."""

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
    savings: bool = Field(
        False, description="ours without each of its savings, instead of the authors' passes"
    )


def run(settings: TrainingBenchSettings) -> int:
    """Measure, print a table and one JSON line."""
    torch.set_num_threads(settings.threads)
    keep_freed_memory()
    ways = SAVINGS if settings.savings else WAYS
    works = {name: _work(settings, way) for name, way in ways.items()}
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    spent: dict[str, int] = dict.fromkeys(ways, 0)
    counters = {name: _count_samples(work) for name, (work, _) in works.items()}
    order = list(ways)
    for turn in range(settings.rounds + 1):
        order.append(order.pop(0))  # another goes first; all draw the same schedules, anchors and noise
        for name in order:
            work, before = works[name]
            at, start = counters[name](), time.perf_counter()
            with ways[name].kernels():
                for step in (2 * turn, 2 * turn + 1):
                    before()
                    work.iterate(step)
            if turn:
                seconds[name].append(time.perf_counter() - start)
                spent[name] += counters[name]() - at
        print(f"\rround {turn}/{settings.rounds}", end="", file=sys.stderr, flush=True)
    rows = [
        {**_row(name, seconds, spent, settings), "networks and state, MB": held_mb(work.roles)}
        for name, (work, _) in works.items()
    ]
    show(
        "training", rows, seconds=seconds, teacher=settings.teacher.name, batch=settings.batch,
        n_max=settings.n_max, threads=settings.threads, dtype=settings.dtype, goal=GOAL,
    )  # fmt: skip
    return 0


def _work(settings: TrainingBenchSettings, way: Way) -> tuple[Distillation, Callable[[], object]]:
    """The loop in one way, and what runs before each of its iterations."""
    config = CDMConfig(
        batch=settings.batch, n_max=settings.n_max, dtype=settings.dtype, lr_student=1e-7, lr_fake=1e-7, **way.changes
    )  # fmt: skip
    family = load_family(settings.teacher)
    prompts = read_prompts(settings.prompts or PROMPTS)
    table = embed_in_memory(family, prompts.texts, getattr(torch, config.dtype))
    roles = Roles(family.transformer, config, computing=Computing(family.fsdp_units, family.lora_targets))
    work = Distillation(family, config, roles, prompts, table, way.pass_batch * settings.batch)
    for module in family.text_modules().values():
        nn.Module.to(module, getattr(torch, config.dtype))
    texts = [prompts.texts[i % len(prompts.texts)] for i in range(settings.batch)]
    return work, (lambda: family.encode([*texts, ""])) if way.encode else (lambda: None)


def held_mb(roles: Roles) -> float:
    """Megabytes of all networks, masters, averages and moments, each piece of memory once."""
    networks = [tensor for role in _roles(roles) for tensor in role.net.state_dict().values()]
    state = [tensor for group in roles.tensors().values() for tensor in group.values()]
    sizes: dict[int, int] = {
        tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes()
        for tensor in (*networks, *state)
    }
    return sum(sizes.values()) / 1e6


def _roles(roles: Roles) -> tuple[Network, ...]:
    return roles.student, roles.fake, roles.teacher


def _count_samples(work: Distillation) -> Callable[[], int]:
    """How many samples went through the transformers so far; a pass with gradient counts three."""
    spent = 0

    def hook(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        nonlocal spent
        spent += len(kwargs["hidden_states"]) * (3 if torch.is_grad_enabled() else 1)

    for net in {role.net for role in _roles(work.roles)}:  # roles with LoRA share one
        net.register_forward_pre_hook(hook, with_kwargs=True)
    return lambda: spent


def _row(
    name: str, seconds: dict[str, list[float]], spent: dict[str, int], settings: TrainingBenchSettings
) -> dict[str, Any]:
    ours = seconds[OURS]
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
