"""The three networks of CDM and everything about them that a checkpoint holds.

Student θ (trained, averaged), teacher (frozen), fake teacher φ (trained on the student's samples). All start as the
teacher's transformer. Trained ones have float32 masters beside compute copies in `config.dtype`.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from training import checkpoint
from training.config import CDMConfig
from training.ema import EMA
from training.optim import MixedPrecision, warmup


@dataclass
class Trained:
    """A network with its masters and optimizer."""

    net: nn.Module
    mixed: MixedPrecision
    optimizer: torch.optim.Optimizer
    lr: float
    updates: int = 0

    def update(self, config: CDMConfig) -> float:
        """One optimizer step on the gradients that lie in `net`; their norm before clipping."""
        lr = self.lr * warmup(self.updates, config.steps, config.warmup, "constant")
        self.updates += 1
        return self.mixed.step(self.optimizer, clip=config.clip, lr=lr)


class Roles:
    """Student, teacher and fake teacher; saved and restored as one."""

    def __init__(self, transformer: nn.Module, config: CDMConfig) -> None:
        """Takes `transformer` (float32) over as the teacher: it is cast to `config.dtype`. All stay on its device."""
        self.config = config
        dtype = getattr(torch, config.dtype)
        self.student = self._trained(transformer, dtype, config.lr_student)
        self.fake = self._trained(transformer, dtype, config.lr_fake)
        # torch's own `to`: that of diffusers warns of modules to keep in float32, and lists none.
        self.teacher = nn.Module.to(transformer, dtype).eval().requires_grad_(False)
        self.ema = EMA(self.student.mixed.masters, config.ema_decay)

    def _trained(self, transformer: nn.Module, dtype: torch.dtype, lr: float) -> Trained:
        config = self.config
        net = copy.deepcopy(transformer).float().eval().requires_grad_(True)
        mixed = MixedPrecision(net, dtype)
        optimizer = torch.optim.AdamW(
            mixed.parameters, lr=lr, betas=(config.adam_beta1, config.adam_beta2), eps=config.adam_eps,
            weight_decay=config.weight_decay, fused=True,
        )  # fmt: skip
        return Trained(net, mixed, optimizer, lr)

    @torch.no_grad()
    def merge_fake(self) -> None:
        """φ ← m·φ + (1−m)·θ, on the masters."""
        torch._foreach_lerp_(
            self.fake.mixed.parameters, self.student.mixed.parameters, 1 - self.config.fake_merge
        )
        self.fake.mixed.refresh()

    def averaged(self) -> nn.Module:
        """A frozen copy of the student with its averaged weights, in the compute dtype."""
        net = copy.deepcopy(self.teacher)
        parameters = dict(net.named_parameters())
        for name, value in self.ema.average.items():
            parameters[name].copy_(value)
        return net

    # what `training.run` saves

    def tensors(self) -> Mapping[str, Mapping[str, Tensor]]:
        """Masters, average and both optimizers."""
        return {
            "student": self.student.mixed.masters,
            "fake": self.fake.mixed.masters,
            "student_ema": self.ema.average,
            "student_adamw": checkpoint.optimizer_tensors(self.student.optimizer),
            "fake_adamw": checkpoint.optimizer_tensors(self.fake.optimizer),
        }

    def counters(self) -> Mapping[str, Any]:
        """How often each was updated."""
        return {
            "student_updates": self.student.updates,
            "fake_updates": self.fake.updates,
            "ema_updates": self.ema.updates,
        }

    def restore(self, saved: checkpoint.Checkpoint) -> None:
        """Put both back."""
        for name, trained in (("student", self.student), ("fake", self.fake)):
            trained.mixed.load(saved.tensors(name))
            checkpoint.load_optimizer(trained.optimizer, saved.tensors(f"{name}_adamw"))
            trained.updates = saved.meta[f"{name}_updates"]
        self.ema.load(saved.tensors("student_ema"), saved.meta["ema_updates"])
