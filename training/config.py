"""What a distillation learns (`CDMConfig`, `ConsistencyConfig`) and how it is computed (`MachineConfig`).

Constants are named as in arXiv 2605.06376; the defaults of `CDMConfig` are its published SD3-Medium setting. Equal
configs, teachers and prompts train equal students, whatever the machine; `training/recipes.py` holds the named ones.
"""

from __future__ import annotations

from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

LEAST_HALF_STEP = 0.005
"""σ step whose difference of bfloat16 velocities is not mostly rounding: 2⁻⁹ of a velocity over twice the step."""


class OptimConfig(BaseModel):
    """What every distillation has: length, rates, average, precision, LoRA."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    steps: int = Field(
        4001, ge=1, description="iterations; with CDM the student takes every student_every-th"
    )
    batch: int = Field(128, ge=1, description="prompts per step, over all processes")
    seed: int = Field(0, ge=0, description="seed of everything drawn")
    resolution: int = Field(
        0, ge=0, description="side of the square pictures trained at; 0: the teacher's own"
    )

    lr_student: float = Field(1e-5, gt=0, description="learning rate of the student")
    warmup: int = Field(
        100, ge=0, description="steps of linear warm-up, each network counting its own; then constant"
    )
    cooldown: int = Field(
        0, ge=0, description="iterations at the end over which the learning rates fall linearly to 0"
    )
    optimizer: Literal["adamw", "adamw8bit"] = Field(
        "adamw", description="adamw8bit keeps moments in 8 bits (bitsandbytes)"
    )
    adam_beta1: float = Field(0.9, ge=0, lt=1, description="AdamW β1")
    adam_beta2: float = Field(0.999, ge=0, lt=1, description="AdamW β2")
    adam_eps: float = Field(1e-8, gt=0, description="AdamW ε")
    weight_decay: float = Field(1e-4, ge=0, description="AdamW weight decay")
    clip: float = Field(1.0, gt=0, description="gradient norm limit, each network its own")
    ema_decay: float = Field(0.999, ge=0, lt=1, description="student average: min((1+n)/(10+n), decay)")

    student_rank: int = Field(0, ge=0, description="LoRA rank of the student; 0 trains every weight")
    student_alpha: float = Field(128.0, gt=0, description="LoRA alpha of the student")
    lora_targets: Literal["attention", "attention+ff"] = Field(
        "attention+ff", description="which linear layers LoRA adapts"
    )
    dtype: Literal["float32", "bfloat16"] = Field(
        "bfloat16", description="compute copies of the networks; master weights, losses and time are float32"
    )

    @model_validator(mode="after")
    def _cooldown_fits(self) -> Self:
        if self.cooldown > self.steps:
            raise ValueError(f"cooldown={self.cooldown} is longer than steps={self.steps}; lower it")
        return self


class CDMConfig(OptimConfig):
    """Distribution matching: CDM, its ablations, decoupled DMD and DMD2 (without its GAN)."""

    # the schedule whose anchors are trained
    schedule: Literal["dynamic", "fixed"] = Field(
        "dynamic", description="dynamic: random length and anchors, as CDM; fixed: the sampler's own, as DMD2"
    )
    n_max: int = Field(
        28, ge=1, description="longest dynamic schedule: N ~ U{1…n_max}, drawn every iteration"
    )
    anchor_low: float = Field(0.25, ge=0, le=1, description="lowest inner anchor σ, before the shift")
    anchor_high: float = Field(0.95, ge=0, le=1, description="highest inner anchor σ, before the shift")
    anchor_shift: float = Field(
        1.0, gt=0, description="scheduler shift applied to dynamic anchors; 1 leaves them alone"
    )
    fixed_steps: int = Field(
        4, ge=1, description="steps of the fixed schedule: the σ that few-step sampling uses"
    )

    # re-noising and guidance
    tau_low: float = Field(0.02, gt=0, lt=1, description="lowest re-noising time")
    tau_high: float = Field(0.98, gt=0, lt=1, description="highest re-noising time")
    guidance: float = Field(7.0, ge=0, description="g of the CFG augmentation")
    dm_guidance: float = Field(
        1.0, ge=0, description="classifier-free guidance scale of the teacher in DM and CDM; 1: none, as CDM"
    )

    # the objective
    weight_ca: float = Field(1.0, ge=0, description="weight of the CFG-augmentation term")
    weight_dm: float = Field(1.0, ge=0, description="weight of the distribution-matching term at the anchor")
    weight_cdm: float = Field(1.0, ge=0, description="weight of the off-trajectory term")
    off_trajectory: Literal["velocity", "gaussian", "none"] = Field(
        "velocity",
        description="where the CDM term asks: along the rollout's velocity, x̂0 noised afresh, or the anchor itself",
    )
    off_below_anchor: bool = Field(
        False, description="keep σ' of the off-trajectory point at or below the anchor's σ"
    )
    weight_floor: float = Field(0.1, gt=0, description="least mean distance in w = 1/max(mean|·|, floor)")

    # the fake teacher
    lr_fake: float = Field(5e-6, gt=0, description="learning rate of the fake teacher")
    fake_rank: int = Field(0, ge=0, description="LoRA rank of the fake teacher; 0 trains every weight")
    fake_alpha: float = Field(128.0, gt=0, description="LoRA alpha of the fake teacher")
    fake_merge: float = Field(0.999, ge=0, le=1, description="after a fake step φ ← m·φ + (1−m)·θ")
    student_every: int = Field(2, ge=1, description="fake-teacher steps per student step")

    # savings
    shared_forward: bool = Field(
        True, description="one student forward for CA and DM at the anchor; off repeats it, as the authors do"
    )
    truncated_rollout: bool = Field(
        True, description="stop each sample's rollout at its anchor; off runs all N steps, as the authors do"
    )
    shared_rollout: bool = Field(
        False,
        description="one batch of prompts and rollouts for all iterations up to a student step, in which the student "
        "stays the same; off draws them for every iteration, as the authors do",
    )

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        for low, high in (("anchor_low", "anchor_high"), ("tau_low", "tau_high")):
            if getattr(self, low) > getattr(self, high):
                raise ValueError(
                    f"{low}={getattr(self, low)} is above {high}={getattr(self, high)}; swap them"
                )
        if self.weight_ca == self.weight_dm == self.weight_cdm == 0:
            raise ValueError(
                "weight_ca, weight_dm and weight_cdm are all 0: nothing would be learnt; set one of them"
            )
        if bool(self.student_rank) != bool(self.fake_rank) and self.fake_merge < 1:
            raise ValueError(
                f"student_rank={self.student_rank} and fake_rank={self.fake_rank}: a merge φ ← m·φ + (1−m)·θ needs "
                "both as LoRA of one rank or both with every weight; set fake_merge=1, or equal ranks"
            )
        if self.student_rank and self.fake_merge < 1:
            same = self.student_rank == self.fake_rank and self.student_alpha == self.fake_alpha
            if not same:
                raise ValueError(
                    "a merge φ ← m·φ + (1−m)·θ of LoRA factors needs equal ranks and alphas of student and fake "
                    "teacher; set them equal, or fake_merge=1"
                )
        return self


class ConsistencyConfig(OptimConfig):
    """Continuous-time consistency distillation on the teacher's own guided trajectories (no pictures needed)."""

    guidance: float = Field(8.0, ge=0, description="classifier-free guidance scale of the teacher's velocity")
    n_max: int = Field(8, ge=1, description="longest teacher rollout to the point that is trained")
    tangent_warmup: int = Field(
        200, ge=0, description="iterations over which the derivative −σ·dF/dσ is faded in, as sCM's r"
    )
    tangent_scale: float = Field(0.1, gt=0, description="c of the tangent's normalisation g/(‖g‖+c)")
    tangent_step: float = Field(
        0.0,
        ge=0,
        le=0.1,
        description="the derivative is a difference over σ ± this; 0: exact, by forward-mode autodiff",
    )

    @model_validator(mode="after")
    def _derivative_above_rounding(self) -> Self:
        if self.dtype == "bfloat16" and 0 < self.tangent_step < LEAST_HALF_STEP:
            raise ValueError(
                f"tangent_step={self.tangent_step:g} with dtype=bfloat16 divides rounding by next to nothing; give at "
                f"least {LEAST_HALF_STEP}, 0 (exact), or dtype=float32"
            )
        return self


class KeepConfig(CDMConfig):
    """CDM from an existing student towards a fine-tuned teacher, keeping what the student could do."""

    keep_weight: float = Field(
        1.0,
        ge=0,
        description="λ of λ·mean (x̂0 − x̂0 of the old student)² on general prompts; 0: no regulariser",
    )
    keep_share: float = Field(
        0.5, ge=0, lt=1, description="share of every batch that general prompts are; 0: none, nothing is kept"
    )
    fake_warmup: int = Field(
        100,
        ge=0,
        description="first iterations in which the fake teacher alone learns: it starts as the teacher",
    )

    @model_validator(mode="after")
    def _keeps(self) -> Self:
        if self.student_rank:
            raise ValueError(
                f"student_rank={self.student_rank}: a distilled student's folder has every weight, and goes on with "
                "every weight; set student_rank=0"
            )
        if self.fake_warmup >= self.steps:
            raise ValueError(
                f"fake_warmup={self.fake_warmup} leaves the student none of steps={self.steps}; lower it"
            )
        if self.keep_weight and not round(self.keep_share * self.batch):
            raise ValueError(
                f"keep_weight={self.keep_weight:g} acts on general prompts, and keep_share={self.keep_share:g} of "
                f"batch={self.batch} is none; raise keep_share, or set keep_weight=0"
            )
        return self


class FinetuneConfig(OptimConfig):
    """Flow matching on captioned pictures; the "student" of other fields is what is fine-tuned."""

    caption_dropout: float = Field(
        0.1, ge=0, lt=1, description="share of empty prompts, which guidance needs"
    )


class MachineConfig(BaseModel):
    """How a distillation is computed: a resumed run may change it, and results differ by rounding only."""

    device: str = Field(
        "auto", description="torch device: auto, cpu, cuda, cuda:1; auto takes a GPU if there is one"
    )
    parallel: Literal["ddp", "fsdp"] = Field(
        "ddp", description="with several processes: every one holds all weights, or FSDP2 shards them"
    )
    micro_batch: int = Field(
        0,
        ge=0,
        description="samples of one forward with gradient in one process; 0: the process's whole share",
    )
    gradient_checkpointing: bool = Field(
        False, description="recompute blocks in the backward pass instead of keeping their activations"
    )
    compile: bool = Field(False, description="torch.compile the transformer's blocks")
    pass_batch: int = Field(128, ge=1, description="most samples in one no-gradient pass of a network")
    threads: int = Field(1, ge=1, description="CPU threads")
