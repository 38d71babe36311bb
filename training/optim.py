"""Optimizer plumbing of every recipe: low-precision copies with float32 masters, schedules, Muon groups."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from training.checkpoint import require_same_tensors
from training.config import OptimConfig
from training.parallel import Parallel, local


class MixedPrecision:
    """Float32 master weights beside parameters that compute in `dtype`.

    Optimizers and EMA see `masters`; the model sees rounded copies. Measured 1.35× faster than autocast on CPU, because
    nothing is cast inside the step. With `dtype=float32` masters and parameters share storage. Sharded parameters
    (FSDP2) have sharded masters: plain tensors, this process's part.
    """

    def __init__(
        self, parameters: Mapping[str, nn.Parameter], dtype: torch.dtype, parallel: Parallel | None = None
    ) -> None:
        """Masters of `parameters`, which compute in `dtype` or will be cast to it."""
        self.parallel = parallel
        self._same = dtype == torch.float32
        self.trained = dict(parameters)
        shards = {name: local(parameter.detach()) for name, parameter in parameters.items()}
        self.masters = {n: shard if self._same else shard.float().clone() for n, shard in shards.items()}

    @classmethod
    def of(cls, model: nn.Module, dtype: torch.dtype, parallel: Parallel | None = None) -> MixedPrecision:
        """All parameters of `model` (float32) that require a gradient; the whole model is cast to `dtype`."""
        before = dict(model.named_parameters())
        names = [name for name, parameter in before.items() if parameter.requires_grad]
        mixed = cls({name: before[name] for name in names}, dtype, parallel)
        if dtype != torch.float32:
            nn.Module.to(model, dtype)  # torch's own: diffusers' warns of float32 modules that it has none of
            after = dict(model.named_parameters())  # sharded ones may be other objects now
            mixed.trained = {name: after[name] for name in names}
        return mixed

    @property
    def parameters(self) -> list[Tensor]:
        """Masters, in the model's order: what an optimizer takes."""
        return list(self.masters.values())

    def step(self, *optimizers: torch.optim.Optimizer, clip: float, lr: float | None = None) -> float:
        """Average the gradients over processes, clip their norm, step, clear, refresh. The norm before clipping.

        A non-finite norm skips the update: the caller's loss check reports it.
        """
        gradients = []
        for master, parameter in zip(self.parameters, self.trained.values(), strict=True):
            if parameter.grad is not None:
                master.grad = local(parameter.grad).float()
                gradients.append(master.grad)
                parameter.grad = None
        if self.parallel is not None:
            self.parallel.average_(gradients)
        total = nn.utils.get_total_norm(gradients) if self.parallel is None else self.parallel.norm(gradients)
        norm = total.item()
        if math.isfinite(norm):
            if norm > clip:
                torch._foreach_mul_(gradients, clip / (norm + 1e-6))
            for optimizer in optimizers:
                for group in optimizer.param_groups:
                    if lr is not None:
                        group["lr"] = lr * group.get("lr_scale", 1.0)
                optimizer.step()
            self.refresh()
        for master in self.parameters:
            master.grad = None
        return norm

    @torch.no_grad()
    def refresh(self) -> None:
        """Copy masters into the model."""
        if not self._same:
            self.show(self.masters)

    @torch.no_grad()
    def show(self, values: Mapping[str, Tensor]) -> None:
        """Put other values than the masters into the model, until the next `refresh`."""
        copies = [local(parameter.detach()) for parameter in self.trained.values()]
        torch._foreach_copy_(copies, [values[name] for name in self.trained])

    @torch.no_grad()
    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Put back saved masters.

        Raises:
            TrainingError: they are another model's.
        """
        require_same_tensors(tensors, self.masters, "weights")
        for name, tensor in tensors.items():
            self.masters[name].copy_(tensor)
        self.refresh()


def adamw(masters: Sequence[Tensor], config: OptimConfig, lr: float) -> torch.optim.Optimizer:
    """The configured AdamW over float32 tensors (`require_optimizer` has asked for what it needs)."""
    settings: dict[str, Any] = {
        "lr": lr, "betas": (config.adam_beta1, config.adam_beta2), "eps": config.adam_eps,
        "weight_decay": config.weight_decay,
    }  # fmt: skip
    if config.optimizer == "adamw":
        return torch.optim.AdamW(masters, fused=True, **settings)
    from bitsandbytes.optim import AdamW8bit

    optimizer: torch.optim.Optimizer = AdamW8bit(list(masters), **settings)
    return optimizer


def warmup(step: int, total: int, warm: int, then: Literal["constant", "cosine"]) -> float:
    """Learning-rate factor: linear from 0 over `warm` steps, then constant or half a cosine to 0 at `total`."""
    if step < warm:
        return (step + 1) / warm
    if then == "constant":
        return 1.0
    return 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, total - warm)))


def cooled(step: int, total: int, cooldown: int) -> float:
    """Learning-rate factor of iteration `step`: 1, then linearly towards 0 over the last `cooldown` of `total`."""
    left = total - step
    return 1.0 if left > cooldown else left / (cooldown + 1)


def split_muon(
    named: Iterable[tuple[str, Tensor]], parts: tuple[str, ...]
) -> tuple[list[Tensor], list[Tensor]]:
    """(matrices whose name contains one of `parts`, everything else): Muon for the first, AdamW for the rest."""
    matrices: list[Tensor] = []
    rest: list[Tensor] = []
    for name, tensor in named:
        (matrices if tensor.ndim == 2 and any(part in name for part in parts) else rest).append(tensor)
    return matrices, rest
