"""Every constant of CDM, named as in arXiv 2605.06376; the defaults are its published SD3-Medium setting.

The loop reads nothing else: equal configs, teachers and prompts train equal students. `training/recipes.py` holds the
named ones.
"""

from __future__ import annotations

from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator


class CDMConfig(BaseModel):
    """One distillation."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    # the dynamic continuous schedule
    n_max: int = Field(28, ge=1, description="longest schedule: N ~ U{1…n_max} steps, drawn every iteration")
    anchor_low: float = Field(0.25, ge=0, le=1, description="lowest inner anchor σ, before the shift")
    anchor_high: float = Field(0.95, ge=0, le=1, description="highest inner anchor σ, before the shift")
    anchor_shift: float = Field(
        1.0, gt=0, description="scheduler shift applied to anchors; 1 leaves them alone"
    )

    # re-noising and guidance
    tau_low: float = Field(0.02, gt=0, lt=1, description="lowest re-noising time")
    tau_high: float = Field(0.98, gt=0, lt=1, description="highest re-noising time")
    guidance: float = Field(7.0, ge=0, description="g of the CFG augmentation")

    # the objective
    weight_ca: float = Field(1.0, ge=0, description="weight of the CFG-augmentation term")
    weight_dm: float = Field(1.0, ge=0, description="weight of the distribution-matching term at the anchor")
    weight_cdm: float = Field(1.0, ge=0, description="weight of the off-trajectory term")
    weight_floor: float = Field(0.1, gt=0, description="least mean distance in w = 1/max(mean|·|, floor)")
    fake_merge: float = Field(0.999, ge=0, le=1, description="after a fake step φ ← m·φ + (1−m)·θ")
    student_every: int = Field(2, ge=1, description="fake-teacher steps per student step")

    # optimization
    steps: int = Field(4001, ge=1, description="fake-teacher steps; the student takes steps/student_every")
    batch: int = Field(128, ge=1, description="prompts per step")
    lr_student: float = Field(1e-5, gt=0, description="learning rate of the student")
    lr_fake: float = Field(5e-6, gt=0, description="learning rate of the fake teacher")
    warmup: int = Field(
        100, ge=0, description="steps of linear warm-up, each network counting its own; then constant"
    )
    adam_beta1: float = Field(0.9, ge=0, lt=1, description="AdamW β1")
    adam_beta2: float = Field(0.999, ge=0, lt=1, description="AdamW β2")
    adam_eps: float = Field(1e-8, gt=0, description="AdamW ε")
    weight_decay: float = Field(1e-4, ge=0, description="AdamW weight decay")
    clip: float = Field(1.0, gt=0, description="gradient norm limit, each network its own")
    ema_decay: float = Field(0.999, ge=0, lt=1, description="student average: min((1+n)/(10+n), decay)")
    seed: int = Field(0, ge=0, description="seed of everything drawn")

    # how it is computed
    dtype: Literal["float32", "bfloat16"] = Field(
        "bfloat16", description="compute copies of the networks; master weights, losses and time are float32"
    )
    shared_forward: bool = Field(
        True, description="one student forward for CA and DM at the anchor; off repeats it, as the authors do"
    )
    truncated_rollout: bool = Field(
        True, description="stop each sample's rollout at its anchor; off runs all N steps, as the authors do"
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
        return self
