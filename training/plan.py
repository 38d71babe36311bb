"""`cdm-train plan RECIPE`: will it fit, where does the memory go, how long will it take — before anything is loaded.

    cdm-train plan sd3-cdm --gpus 8 --memory 80
    cdm-train plan longcat-cdm --gpus 4 --gpu h200 --parallel fsdp --gradient-checkpointing --micro-batch 2

No weights are read and no GPU is needed: the transformer is built from its configuration on torch's meta device, and
its passes are run on shapes. Prints tables and one JSON line; ends with 1 if it does not fit. See docs/planning.md.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from pydantic import Field
from pydantic_settings import CliPositionalArg

from engines.cli import CommandSettings
from training.config import CDMConfig, ConsistencyConfig, KeepConfig, MachineConfig, OptimConfig
from training.errors import TrainingError
from training.plan_advice import Advisor, Change
from training.plan_memory import Memory, gigabytes
from training.plan_model import BUILT_IN, HUB_NAMES, describe
from training.plan_setup import Setup
from training.plan_time import GPUS, Speed, iteration, seconds
from training.recipes import (
    LONGCAT,
    SD3,
    SD35,
    emoji_cdm,
    emoji_consistency,
    longcat_cdm,
    made,
    sd3_cdm,
    sd3_consistency,
    sd35_cdm,
)
from training.recipes_tuning import emoji_keep, finetune, keep
from training.variants import Variant, changes

RECIPES: Mapping[str, tuple[Callable[[], OptimConfig], str]] = {
    "sd3-cdm": (sd3_cdm, HUB_NAMES[SD3.as_posix()]),
    "sd35-cdm": (sd35_cdm, HUB_NAMES[SD35.as_posix()]),
    "longcat-cdm": (longcat_cdm, HUB_NAMES[LONGCAT.as_posix()]),
    "sd3-consistency": (sd3_consistency, HUB_NAMES[SD3.as_posix()]),
    "emoji-cdm": (emoji_cdm, ""),
    "emoji-consistency": (emoji_consistency, ""),
    "finetune": (finetune, ""),
    "finetune-student": (keep, ""),
    "emoji-finetune-student": (emoji_keep, ""),
}
"""Recipe → its config, and the model that it distils if none is named."""


OTHERS = ("keep_weight", "keep_share", "fake_warmup", "tangent_step")
"""Constants of other methods than CDM that a plan depends on."""


def _described(method: type[OptimConfig], name: str) -> str:
    return (
        f"{method.model_fields[name].description} ({method.__name__.removesuffix('Config').lower()} recipes)"
    )


class PlanSettings(CommandSettings, MachineConfig, CDMConfig, env_prefix="CDM_PLAN_"):  # type: ignore[misc]
    """Memory by part and time per step of a recipe, before anything is loaded."""

    recipe: CliPositionalArg[str] = Field(
        description=f"recipe: {', '.join(RECIPES)}; its settings are the defaults"
    )
    variant: Variant = Field("cdm", description="objective of a CDM recipe, as in training")
    teacher: str = Field(
        "", description=f"diffusers folder, hub id, or {', '.join(BUILT_IN)}; empty: the recipe's own"
    )
    gpus: int = Field(1, ge=1, description="GPUs, a process each")
    gpu: str = Field("h100", description=f"kind of GPU: {', '.join(GPUS)}")
    memory: float = Field(0.0, ge=0, description="GB (10⁹ bytes) of one GPU; 0: what --gpu has")
    tflops: float = Field(0.0, ge=0, description="peak TFLOP/s of one GPU in --dtype; 0: what --gpu has")
    bandwidth: float = Field(0.0, ge=0, description="memory bandwidth of one GPU, GB/s; 0: what --gpu has")
    link: float = Field(0.0, ge=0, description="GB/s between GPUs; 0: what --gpu has")
    efficiency: float = Field(0.4, gt=0, le=1, description="share of the peak that is reached: an assumption")
    overhead: float = Field(1.5, ge=0, description="GB per GPU for CUDA and libraries: an allowance")
    fragmentation: float = Field(
        0.05, ge=0, description="share of what comes and goes that the allocator cannot use: an allowance"
    )
    keep_weight: float = Field(1.0, ge=0, description=_described(KeepConfig, "keep_weight"))
    keep_share: float = Field(0.5, ge=0, lt=1, description=_described(KeepConfig, "keep_share"))
    fake_warmup: int = Field(100, ge=0, description=_described(KeepConfig, "fake_warmup"))
    tangent_step: float = Field(0.0, ge=0, description=_described(ConsistencyConfig, "tangent_step"))
    sample_every: int = Field(250, ge=0, description="steps between sample grids; 0 draws none")
    keep: int = Field(2, ge=1, description="newest checkpoints that are kept")
    prompt_count: int = Field(10_000, ge=1, description="distinct prompts; finetune: captioned pictures")
    ram: float = Field(0.0, ge=0, description="GB of main memory; 0: not looked at")
    disk: float = Field(0.0, ge=0, description="GB free on disk; 0: not looked at")

    def config(self) -> OptimConfig:
        """The recipe's constants, and those that were given.

        Raises:
            TrainingError: no such recipe, or a setting that its method does not have.
        """
        if self.recipe not in RECIPES:
            raise TrainingError(f"there is no recipe {self.recipe!r}; recipes: {', '.join(RECIPES)}")
        base = RECIPES[self.recipe][0]()
        if self.variant != "cdm":
            if type(base) is not CDMConfig:
                raise TrainingError(f"--variant is no setting of {self.recipe}; leave it out")
            varied = changes(self.variant, base, self.recipe.split("-")[0])
            base = CDMConfig(**{**base.model_dump(), **varied})
        given = {
            name: getattr(self, name)
            for name in (*CDMConfig.model_fields, *OTHERS)
            if name in self.model_fields_set
        }
        for name in given.keys() - type(base).model_fields.keys():
            raise TrainingError(
                f"--{name.replace('_', '-')} is no setting of {self.recipe}; leave it out, or plan another recipe"
            )
        return made(type(base), {**base.model_dump(), **given})

    def setup(self) -> Setup:
        """What is planned.

        Raises:
            TrainingError: a recipe, a teacher or a batch that cannot be.
        """
        config = self.config()
        teacher = self.teacher or RECIPES[self.recipe][1]
        if not teacher:
            raise TrainingError(f"{self.recipe} has no teacher of its own; name its folder with --teacher")
        model = describe(teacher)
        if config.resolution:
            model = model.at_resolution(config.resolution)
        machine = MachineConfig(**{name: getattr(self, name) for name in MachineConfig.model_fields})
        return Setup(
            model, config, machine, self.gpus, "cpu" if self.device == "cpu" else "gpu",
            self.sample_every > 0, self.prompt_count, self.keep, round(self.overhead * 1e9), self.fragmentation,
        )  # fmt: skip

    def speed(self) -> Speed:
        """Of one GPU.

        Raises:
            TrainingError: an unknown one.
        """
        if self.gpu not in GPUS:
            raise TrainingError(
                f"--gpu={self.gpu} is not known; known: {', '.join(GPUS)}; or give --memory, --tflops and --bandwidth"
            )
        gpu = GPUS[self.gpu]
        return Speed(
            self.tflops or getattr(gpu, self.config().dtype), self.bandwidth or gpu.bandwidth, self.efficiency,
            self.link or gpu.link,
        )  # fmt: skip


def plan(settings: PlanSettings) -> int:
    """Print the plan; 0 if it fits, 1 if not."""
    setup, speed = settings.setup(), settings.speed()
    limit = (settings.memory or GPUS[settings.gpu].memory) * 1e9
    cache: dict[Any, Any] = {}
    memory = Memory(setup, cache)
    advisor = Advisor(setup, int(limit), speed, cache)
    fits = memory.total <= limit
    each = seconds(memory, speed)

    print(
        _table(
            ("one GPU, at its worst: " + memory.worst, "GB"), _sized({**memory.parts, "total": memory.total})
        )
    )
    worst_first = sorted(memory.phases.items(), key=lambda item: -sum(item[1].values()))
    print(
        _table(
            ("what comes and goes, by phase", "GB"),
            _sized({name: sum(p.values()) for name, p in worst_first}),
        )
    )
    print(
        _table(("main memory", "GB"), _sized(memory.main_memory))
        + _table(("disk", "GB"), _sized(memory.disk))
    )
    work = iteration(memory)
    rows = [
        (
            part.name, f"{part.flops / 1e12:,.1f}", f"{part.moved / 1e9:,.1f}", f"{part.sent / 1e9:,.1f}",
            f"{part.seconds(speed):.2f}",
        )
        for part in work
    ]  # fmt: skip
    print(_table(("an average iteration, one GPU", "TFLOP", "GB moved", "GB sent", "s"), rows))
    print(
        f"{each:.2f} s an iteration, {each * setup.config.steps / 3600:.1f} h for {setup.config.steps}, at "
        f"{speed.efficiency:.0%} of {speed.tflops:g} TFLOP/s (an assumption: --efficiency)\n"
    )

    shortages = _shortages(settings, memory)
    alone, together, largest = [], [], 0
    if fits:
        largest = advisor.largest_micro_batch(setup)
        print(
            f"It fits: {memory.total / 1e9:.1f} of {limit / 1e9:g} GB. The largest micro-batch that does: {largest}."
        )
    else:
        alone, together = advisor.alone(), advisor.together()
        print(f"It does not fit: {memory.total / 1e9:.1f} GB of {limit / 1e9:g} GB. Each change by itself:\n")
        print(_changes(alone, each, limit))
        if together:
            print("Together, one upon another, until it fits:\n\n" + _changes(together, each, limit))
        else:
            print(
                "No changes that are known here make it fit; take larger GPUs, or more of them with --parallel fsdp."
            )
    for shortage in shortages:
        print(shortage)
    print(json.dumps({
        "plan": settings.recipe, "model": setup.model.name, "gpus": setup.gpus, "fits": fits and not shortages,
        "limit_gb": limit / 1e9, "total_gb": round(memory.total / 1e9, 3), "worst": memory.worst,
        "parts_gb": gigabytes(memory.parts), "main_memory_gb": gigabytes(memory.main_memory),
        "disk_gb": gigabytes(memory.disk), "largest_micro_batch": largest,
        "tflop": {part.name: round(part.flops / 1e12, 3) for part in work},
        "seconds": {"iteration": each, "total": each * setup.config.steps}, "efficiency": speed.efficiency,
        "alone": [_told(change) for change in alone], "together": [_told(change) for change in together],
        "shortages": shortages,
    }, ensure_ascii=False))  # fmt: skip
    return int(not fits or bool(shortages))


def _shortages(settings: PlanSettings, memory: Memory) -> list[str]:
    """What main memory or disk lack, and with how many prompts they would do."""
    found = []
    for flag, limit, parts, by_prompt in (
        ("ram", settings.ram, memory.main_memory, "latents of all pictures"),
        ("disk", settings.disk, memory.disk, "embeddings of all prompts"),
    ):
        needed = sum(parts.values())
        if limit and needed > limit * 1e9:
            growing = parts.get(by_prompt, 0)
            each = growing / settings.prompt_count
            left = int((limit * 1e9 - (needed - growing)) / each) if each else 0
            other = "fewer processes a machine" if flag == "ram" else "a smaller --keep"
            remedy = f"give at most {left} prompts" if left > 0 else f"it takes more, or {other}"
            found.append(f"--{flag}={limit:g} GB is too little: {needed / 1e9:.1f} GB are needed; {remedy}")
    return found


def _sized(parts: Mapping[str, int]) -> Iterable[tuple[str, str]]:
    return ((name, f"{value / 1e9:,.2f}") for name, value in parts.items() if value)


def _changes(changes: Sequence[Change], before: float, limit: float) -> str:
    rows = (
        (
            change.flags, change.costs, f"{change.total / 1e9:,.1f}", "yes" if change.total <= limit else "no",
            f"{change.seconds / before:.2f}×",
        )
        for change in changes
    )  # fmt: skip
    return _table(("change", "costs", "GB", "fits", "time"), rows)


def _told(change: Change) -> dict[str, Any]:
    return {"flags": change.flags, "total_gb": round(change.total / 1e9, 3), "seconds": change.seconds}


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    cells = [list(header), *(list(row) for row in rows)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(header))]
    lines = [
        "| " + " | ".join(f"{cell:<{width}}" for cell, width in zip(line, widths, strict=True)) + " |"
        for line in cells
    ]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(lines) + "\n"
