"""The networks of a distillation and everything about them that a checkpoint holds.

Student θ (trained, averaged), teacher (frozen) and, for distribution matching, the fake teacher φ (trained on the
student's samples). All start as the teacher's transformer. What is trained has float32 masters beside compute copies
in `config.dtype`. With LoRA a role is an adapter on the teacher's own weights, so that one base serves all three.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from training import checkpoint
from training.compile import compile_blocks
from training.config import CDMConfig, OptimConfig
from training.ema import EMA
from training.errors import TrainingError
from training.lora import Adapters, Size, add_adapters
from training.optim import MixedPrecision, adamw, cooled, warmup
from training.optimizer_state import load_optimizer, optimizer_tensors
from training.parallel import Parallel, laid_out, whole
from training.recompute import recompute_blocks
from training.requirements import checkpoint_bytes, require_optimizer, require_shardable


class Network:
    """One role as the loop calls it: a transformer of its own, or the base with the role's adapter in force."""

    def __init__(self, net: nn.Module, adapters: Adapters | None = None, adapter: str | None = None) -> None:
        self.net, self.adapters, self.adapter = net, adapters, adapter

    def active(self) -> AbstractContextManager[None]:
        """While in force, `net` computes this role."""
        return nullcontext() if self.adapters is None else self.adapters.active(self.adapter)


class Trained(Network):
    """A role with its masters and optimizer."""

    def __init__(self, network: Network, mixed: MixedPrecision, config: OptimConfig, lr: float) -> None:
        super().__init__(network.net, network.adapters, network.adapter)
        self.config, self.mixed, self.lr = config, mixed, lr
        self.optimizer = adamw(mixed.parameters, config, lr)
        self.updates = 0

    @property
    def masters(self) -> dict[str, Tensor]:
        """Float32 weights, or an adapter's factors, by name: this process's shards of them."""
        return self.mixed.masters

    def training(self) -> AbstractContextManager[None]:
        """Around a forward and its backward."""
        return self.active()

    def update(self, step: int) -> float:
        """One optimizer step on the gradients that lie in `net`, at iteration `step`; their norm before clipping."""
        config = self.config
        factor = warmup(self.updates, config.steps, config.warmup, "constant")
        factor *= cooled(step, config.steps, config.cooldown)
        self.updates += 1
        return self.mixed.step(self.optimizer, clip=config.clip, lr=self.lr * factor)


@dataclass(frozen=True)
class Computing:
    """How the networks are computed, beside what they learn."""

    units: Sequence[str] = ()
    """Class names of the transformer's blocks."""
    lora_targets: Mapping[str, str] = field(default_factory=dict)
    gradient_checkpointing: bool = False
    compile: bool = False


class Roles:
    """Student, teacher and maybe a fake teacher; saved and restored as one."""

    def __init__(
        self, transformer: nn.Module, config: OptimConfig, parallel: Parallel | None = None,
        computing: Computing | None = None,
    ) -> None:  # fmt: skip
        """Takes `transformer` (float32) over as the teacher: it is cast to `config.dtype`, and sharded with FSDP2.

        Only with a `CDMConfig` there is a fake teacher.

        Raises:
            TrainingError: a LoRA rank beyond a layer's size, no bitsandbytes, or what cannot be sharded.
        """
        computing = computing or Computing()
        self.config = config
        self.parallel = parallel or Parallel(next(transformer.parameters()).device)
        require_optimizer(config)
        if self.parallel.fsdp:
            require_shardable(config)
        dtype, units = getattr(torch, config.dtype), computing.units
        sizes = {"student": Size(config.student_rank, config.student_alpha)}
        rates = {"student": config.lr_student}
        if isinstance(config, CDMConfig):
            sizes["fake"], rates["fake"] = Size(config.fake_rank, config.fake_alpha), config.lr_fake
        # Roles that train every weight are copied while the base has no adapters.
        roles: dict[str, Trained] = {}
        for name in (name for name, size in sizes.items() if not size.rank):
            net = self._placed(copy.deepcopy(transformer).float()).eval().requires_grad_(True)
            mixed = MixedPrecision.of(self.parallel.shard(net, units), dtype, self.parallel)
            roles[name] = Trained(Network(net), mixed, config, rates[name])
        # torch's own `to`: that of diffusers warns of modules to keep in float32, and lists none.
        base = self._placed(nn.Module.to(transformer, dtype)).eval().requires_grad_(False)
        adapted = {name: size for name, size in sizes.items() if size.rank}
        self.adapters: Adapters | None = None
        if adapted:
            targets = computing.lora_targets[config.lora_targets]
            self.adapters = add_adapters(base, adapted, targets, dtype, config.seed)
        self.parallel.shard(base, units)
        for name in adapted:
            assert self.adapters is not None
            mixed = MixedPrecision(self.adapters.parameters(name), dtype, self.parallel)
            roles[name] = Trained(Network(base, self.adapters, name), mixed, config, rates[name])
        self.teacher = Network(base, self.adapters)
        self.student, self._fake = roles["student"], roles.get("fake")
        self.ema = EMA(self.student.masters, config.ema_decay)
        for network in roles.values() if computing.gradient_checkpointing else ():
            recompute_blocks(network.net, network.adapters)
        for net in {network.net for network in (self.teacher, *roles.values())} if computing.compile else ():
            compile_blocks(net, units)

    def _placed(self, net: nn.Module) -> nn.Module:
        """On this process's device. What is to be sharded stays in main memory: FSDP2 moves it block by block."""
        return net if self.parallel.fsdp else nn.Module.to(net, self.parallel.device)

    @property
    def fake(self) -> Trained:
        """The fake teacher."""
        assert self._fake is not None, "this method has no fake teacher"
        return self._fake

    def _trained(self) -> dict[str, Trained]:
        return {"student": self.student} | ({} if self._fake is None else {"fake": self._fake})

    @torch.no_grad()
    def merge_fake(self) -> None:
        """φ ← m·φ + (1−m)·θ, on the masters."""
        assert isinstance(self.config, CDMConfig)
        if self.config.fake_merge < 1:
            torch._foreach_lerp_(
                self.fake.mixed.parameters, self.student.mixed.parameters, 1 - self.config.fake_merge
            )
            self.fake.mixed.refresh()

    def start_student(self, weights: Mapping[str, Tensor]) -> None:
        """The student, and its average, begin as these whole float32 weights instead of the teacher's.

        Raises:
            TrainingError: they are another model's.
        """
        placed = _placed(weights, self.student.mixed.trained)
        self.student.mixed.load(placed)
        self.ema.load(placed, 0)

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
        """The averaged student, or its adapter's factors, whole: float32 on the CPU. Every process takes part."""
        sharded = laid_out(self.ema.average, self.student.mixed.trained)
        return {name: whole(value).cpu() for name, value in sharded.items()}

    @property
    def _shared(self) -> bool:
        return self.config.dtype == "float32"

    def checkpoint_bytes(self) -> int:
        """About how large a checkpoint is."""
        sizes = [sum(value.numel() for value in each.masters.values()) for each in self._trained().values()]
        moments = 2 if self.config.optimizer == "adamw8bit" else 8
        return checkpoint_bytes(sizes[0], sum(sizes), 1, moments) * (
            self.parallel.world if self.parallel.fsdp else 1
        )

    # what `training.run` saves

    def tensors(self) -> Mapping[str, Mapping[str, Tensor]]:
        """Masters, average and optimizers, by parameter name; sharded ones as sharded tensors."""
        student = self.student
        groups: dict[str, Mapping[str, Tensor]] = {
            "student_ema": laid_out(self.ema.average, student.mixed.trained)
        }
        for name, trained in self._trained().items():
            groups[name] = laid_out(trained.masters, trained.mixed.trained)
            groups[f"{name}_adamw"] = optimizer_tensors(trained.optimizer, trained.mixed.trained)
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
            parameters = trained.mixed.trained
            trained.mixed.load(_placed(saved.tensors(name), parameters))
            load_optimizer(trained.optimizer, saved.tensors(f"{name}_adamw"), parameters)
            trained.updates = saved.meta[f"{name}_updates"]
        average = _placed(saved.tensors("student_ema"), self.student.mixed.trained)
        self.ema.load(average, saved.meta["ema_updates"])


def _placed(tensors: Mapping[str, Tensor], parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """This process's shards; names of another model are left for whoever loads them to refuse."""
    return {
        name: checkpoint.place(value, parameters[name]) if name in parameters else value
        for name, value in tensors.items()
    }
