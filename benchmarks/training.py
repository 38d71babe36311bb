"""`cdm-bench training`: student steps per second of our iteration against the authors' schedule of passes.

Same teacher, batch, draws, precision and kernels, in one run, the two taking turns iteration pair by iteration pair.
The authors' pair (arXiv 2605.06376, code of bacc57f): text encoders every iteration, all N rollout steps, one student
forward with gradient for each of CA, DM and CDM, and one call for each teacher and fake-teacher query. Ours: prompts
encoded once, rollouts that stop at their anchors, one forward for CA and DM, one batch for each network.

    cdm-bench training --teacher runs/teacher/model --n-max 28 --batch 16 --rounds 8
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
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
from training.prompts import embed_prompts, read_prompts
from training.roles import Roles

PROMPTS = Path(__file__).parents[1] / "training" / "assets" / "sample_prompts.txt"


class TrainingBenchSettings(CommandSettings, env_prefix="CDM_BENCH_TRAINING_"):
    """Time pairs of iterations (one student step) in both ways, alternating."""

    teacher: Path = Field(Path("runs/teacher/model"), description="diffusers folder of the teacher")
    prompts: Path = Field(PROMPTS, description="prompt list")
    batch: int = Field(16, ge=1, description="prompts per step")
    n_max: int = Field(28, ge=1, description="longest schedule; 28 as published")
    rounds: int = Field(8, ge=2, description="pairs of iterations in each way, after one to warm up")
    dtype: Literal["float32", "bfloat16"] = Field("bfloat16", description="compute copies of the networks")
    threads: int = Field(1, ge=1, description="CPU threads")


def run(settings: TrainingBenchSettings) -> int:
    """Measure, print a table and one JSON line."""
    torch.set_num_threads(settings.threads)
    keep_freed_memory()
    ways = {
        "ours": _work(settings, {}, settings.batch * 6),
        "authors' passes": _work(
            settings, {"shared_forward": False, "truncated_rollout": False}, settings.batch, encode=True
        ),
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    spent: dict[str, int] = dict.fromkeys(ways, 0)
    counters = {name: _count_samples(work) for name, (work, _) in ways.items()}
    with cpu_kernels():
        for turn in range(settings.rounds + 1):
            # Who goes first alternates; both draw the same schedules, anchors and noise.
            for name in list(ways)[:: 1 if turn % 2 else -1]:
                work, before = ways[name]
                at, start = counters[name](), time.perf_counter()
                for step in (2 * turn, 2 * turn + 1):
                    before()
                    work.iterate(step)
                if turn:
                    seconds[name].append(time.perf_counter() - start)
                    spent[name] += counters[name]() - at
    rows = [_row(name, seconds, spent, settings) for name in ways]
    ratios = [b / a for a, b in zip(seconds["ours"], seconds["authors' passes"], strict=True)]
    show(
        "training", rows, speedup=statistics.median(ratios), speedups=ratios, teacher=settings.teacher.name,
        n_max=settings.n_max, threads=settings.threads, dtype=settings.dtype,
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
    prompts = read_prompts(settings.prompts)
    table = embed_prompts(family, prompts.texts, getattr(torch, config.dtype))
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
    own = seconds[name]
    ratios = [b / a for a, b in zip(own, seconds["authors' passes"], strict=True)]
    return {
        "way": name,
        "s per student step": statistics.median(own),
        "least": min(own),
        "student steps/s": 1 / statistics.median(own),
        "speed, to authors'": statistics.median(ratios),
        "passes per sample and student step": spent[name] / len(own) / settings.batch,
    }
