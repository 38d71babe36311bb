"""The networks of a distillation and everything about them that a checkpoint holds.

Student θ (trained, averaged), teacher (frozen) and, for distribution matching, the fake teacher φ (trained on the
student's samples). All start as the teacher's transformer. What is trained has float32 masters beside compute copies
in `config.dtype`. With LoRA a role is an adapter on the teacher's own weights, so that one base serves all three.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from training import checkpoint
from training.config import CDMConfig, OptimConfig
from training.ema import EMA
from training.errors import TrainingError
from training.optim import MixedPrecision, adamw, cooled, warmup
from training.parallel import Parallel, laid_out, whole


class Network:
    """One role as the loop calls it."""

    def __init__(self, net: nn.Module) -> None:
        self.net = net

    def active(self) -> AbstractContextManager[None]:
        """While in force, `net` computes this role."""
        return nullcontext()


class Trained(Network):
    """A role with its masters and optimizer."""

    def __init__(
        self, net: nn.Module, names: Collection[str], config: OptimConfig, lr: float, parallel: Parallel
    ) -> None:  # fmt: skip
        super().__init__(net)
        self.config, self.lr = config, lr
        self.mixed = MixedPrecision(net, getattr(torch, config.dtype), names, parallel)
        self.optimizer = adamw(self.mixed.parameters, config, lr)
        self.updates = 0

    @property
    def masters(self) -> dict[str, Tensor]:
        """Float32 weights by name: this process's shards of them."""
        return self.mixed.masters

    def training(self) -> AbstractContextManager[None]:
        """Around a forward and its backward: recomputed activations must be this role's, too."""
        return self.active()

    def update(self, step: int) -> float:
        """One optimizer step on the gradients that lie in `net`, at iteration `step`; their norm before clipping."""
        config = self.config
        factor = warmup(self.updates, config.steps, config.warmup, "constant")
        factor *= cooled(step, config.steps, config.cooldown)
        self.updates += 1
        return self.mixed.step(self.optimizer, clip=config.clip, lr=self.lr * factor)


class Roles:
    """Student, teacher and maybe a fake teacher; saved and restored as one."""

    def __init__(
        self, transformer: nn.Module, config: OptimConfig, parallel: Parallel | None = None, units: Sequence[str] = ()
    ) -> None:  # fmt: skip
        """Takes `transformer` (float32) over as the teacher: it is cast to `config.dtype`, and sharded with FSDP2.

        `units`: class names of its blocks. Only with a `CDMConfig` there is a fake teacher.
        """
        self.config = config
        self.parallel = parallel or Parallel(next(transformer.parameters()).device)
        self._units = units
        dtype = getattr(torch, config.dtype)
        self.student = self._copy(transformer, config.lr_student)
        self._fake = self._copy(transformer, config.lr_fake) if isinstance(config, CDMConfig) else None
        # torch's own `to`: that of diffusers warns of modules to keep in float32, and lists none.
        frozen = nn.Module.to(transformer, self.parallel.device, dtype).eval().requires_grad_(False)
        self.teacher = Network(self.parallel.shard(frozen, units))
        self.ema = EMA(self.student.masters, config.ema_decay)

    @property
    def fake(self) -> Trained:
        """The fake teacher."""
        assert self._fake is not None, "this method has no fake teacher"
        return self._fake

    def _trained(self) -> dict[str, Trained]:
        return {"student": self.student} | ({} if self._fake is None else {"fake": self._fake})

    def _copy(self, transformer: nn.Module, lr: float) -> Trained:
        net = copy.deepcopy(transformer).float().to(self.parallel.device).eval().requires_grad_(True)
        self.parallel.shard(net, self._units)
        return Trained(net, [name for name, _ in net.named_parameters()], self.config, lr, self.parallel)

    @torch.no_grad()
    def merge_fake(self) -> None:
        """φ ← m·φ + (1−m)·θ, on the masters."""
        assert isinstance(self.config, CDMConfig)
        if self.config.fake_merge < 1:
            torch._foreach_lerp_(
                self.fake.mixed.parameters, self.student.mixed.parameters, 1 - self.config.fake_merge
            )
            self.fake.mixed.refresh()

    @contextmanager
    def averaged(self) -> Iterator[Network]:
        """The student computes with its averaged weights within the block."""
        kept = {name: value.clone() for name, value in self.student.masters.items()} if self._shared else None
        self.student.mixed.show(self.ema.average)
        try:
            yield self.student
        finally:
            self.student.mixed.show(self.student.masters if kept is None else kept)

    def student_weights(self) -> dict[str, Tensor]:
        """The averaged student whole: float32 on the CPU, by parameter name. Every process takes part."""
        sharded = laid_out(self.ema.average, self.student.mixed.trained)
        return {name: whole(value).cpu() for name, value in sharded.items()}

    @property
    def _shared(self) -> bool:
        return self.config.dtype == "float32"

    # what `training.run` saves

    def tensors(self) -> Mapping[str, Mapping[str, Tensor]]:
        """Masters, average and optimizers, by parameter name; sharded ones as sharded tensors."""
        student = self.student
        groups: dict[str, Mapping[str, Tensor]] = {
            "student_ema": laid_out(self.ema.average, student.mixed.trained)
        }
        for name, trained in self._trained().items():
            groups[name] = laid_out(trained.masters, trained.mixed.trained)
            groups[f"{name}_adamw"] = checkpoint.optimizer_tensors(trained.optimizer)
        return groups

    def counters(self) -> Mapping[str, Any]:
        """How often each was updated."""
        updates = {f"{name}_updates": trained.updates for name, trained in self._trained().items()}
        return {**updates, "ema_updates": self.ema.updates}

    def restore(self, saved: checkpoint.Checkpoint) -> None:
        """Put both back.

        Raises:
            TrainingError: they are another model's.
        """
        for name, trained in self._trained().items():
            if f"{name}_updates" not in saved.meta:
                raise TrainingError(f"{saved.path} holds no {name}; it is another method's checkpoint")
            trained.mixed.load(saved.tensors(name))
            checkpoint.load_optimizer(trained.optimizer, saved.tensors(f"{name}_adamw"))
            trained.updates = saved.meta[f"{name}_updates"]
        self.ema.load(saved.tensors("student_ema"), saved.meta["ema_updates"])
