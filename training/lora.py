"""LoRA roles on one base: a frozen transformer that carries one adapter per trained role, by `peft`.

    sizes = {"student": Size(64, 128.0), "fake": Size(64, 128.0)}
    adapters = add_adapters(transformer, sizes, family.lora_targets["attention+ff"], torch.float32, seed=0)
    with adapters.active("student"):
        v_student = family.velocity(transformer, x, sigma, cond)
    with adapters.active(None):
        v_teacher = family.velocity(transformer, x, sigma, cond)      # the base itself

One set of base weights, so, serves all three networks. A role that is fully trained instead has a copy of its own, made
before adapters are added: the base then carries the other role's adapter alone, and without it is still the teacher.
"""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from training.errors import TrainingError


class Size(NamedTuple):
    """An adapter adds alpha/rank · B·A to a weight `(out, in)`; A is `(rank, in)`, B `(out, rank)`."""

    rank: int
    alpha: float

    @property
    def scale(self) -> float:
        """What B·A is multiplied by."""
        return self.alpha / self.rank


class Adapters:
    """The adapters of one transformer, of which one or none is in force."""

    def __init__(self, transformer: nn.Module, sizes: Mapping[str, Size]) -> None:
        """`transformer` has them already: see `add_adapters`."""
        self.transformer, self.sizes = transformer, dict(sizes)
        self.current: str | None = next(iter(self.sizes))  # as peft leaves it: the first that was added
        """The one in force; None: the base alone."""
        self._layers: dict[str, Any] = {
            name: module for name, module in transformer.named_modules() if isinstance(module, LoraLayer)
        }
        self._switch(None)

    @property
    def layers(self) -> tuple[str, ...]:
        """Full names of the adapted linear layers."""
        return tuple(self._layers)

    @contextmanager
    def active(self, adapter: str | None) -> Iterator[None]:
        """Within the block the transformer computes with `adapter`, or None: as the base. Blocks may be nested.

        Graphs that are alive stay whole, as nothing but a choice in the forward changes: peft's own `set_adapter`
        would turn off the gradients of the other adapters' factors.
        """
        before = self.current
        self._switch(adapter)
        try:
            yield
        finally:
            self._switch(before)

    def _switch(self, adapter: str | None) -> None:
        assert adapter is None or adapter in self.sizes, adapter
        if adapter == self.current:  # some milliseconds of a large model, for every block that is recomputed
            return
        for layer in self._layers.values():
            # Where peft looks, in every layer's forward.
            layer._disable_adapters = adapter is None
            layer._active_adapter = [adapter] if adapter else []
        self.current = adapter

    def parameters(self, adapter: str) -> dict[str, nn.Parameter]:
        """An adapter's factors by name: `LAYER.lora_A.weight`, `LAYER.lora_B.weight`, the same for every adapter."""
        return {
            f"{name}.lora_{part}.weight": getattr(layer, f"lora_{part}")[adapter].weight
            for name, layer in self._layers.items()
            for part in "AB"
        }

    def base(self) -> dict[str, nn.Parameter]:
        """The base's parameters by the names that they have without adapters."""
        return {
            name.replace(".base_layer.", "."): parameter
            for name, parameter in self.transformer.named_parameters()
            if ".lora_" not in name
        }


def require_rank(transformer: nn.Module, targets: str, adapter: str, rank: int) -> None:
    """The layers that `targets` names have that rank.

    Raises:
        TrainingError: one has not.
    """
    layers = {
        name: module
        for name, module in transformer.named_modules()
        if isinstance(module, nn.Linear) and re.fullmatch(targets, name)
    }
    assert layers, f"{targets} chooses no layer"
    narrow = min(layers, key=lambda name: min(layers[name].weight.shape))
    if rank > min(layers[narrow].weight.shape):
        raise TrainingError(
            f"--{adapter}-rank={rank} is more than the layer {narrow} {tuple(layers[narrow].weight.shape)} has; "
            "lower it, or give 0 to train every weight"
        )


def add_adapters(
    transformer: nn.Module, sizes: Mapping[str, Size], targets: str, dtype: torch.dtype, seed: int
) -> Adapters:
    """Freeze `transformer` and add adapters with factors of `dtype` to its linear layers whose full name is `targets`.

    No adapter changes anything at first: A is uniform as in `torch.nn.Linear`, B is 0. A depends on seed and rank
    alone, so that adapters of one rank begin with equal ones: while they are, averages of factors are averages of what
    they add; later a merge (1−m)·θ into φ is off by m·(1−m)·(B_φ−B_θ)(A_φ−A_θ).

    Args:
        targets: a regular expression, from `Family.lora_targets`.

    Raises:
        TrainingError: a rank larger than a layer.
    """
    for adapter, size in sizes.items():
        require_rank(transformer, targets, adapter, size.rank)
    transformer.requires_grad_(False)
    for adapter, size in sizes.items():
        config = LoraConfig(
            r=size.rank,
            lora_alpha=size.alpha,  # type: ignore[arg-type]  # peft divides it by the rank
            target_modules=targets,
            init_lora_weights=False,
        )
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Already found a `peft_config`")  # two are meant
            inject_adapter_in_model(config, transformer, adapter)
    adapters = Adapters(transformer, sizes)
    for adapter in sizes:
        _initialise(adapters.parameters(adapter), dtype, seed)
    return adapters


@torch.no_grad()
def _initialise(factors: Mapping[str, nn.Parameter], dtype: torch.dtype, seed: int) -> None:
    # On the CPU in float32, so that every device and type begins with the same numbers.
    generator = torch.Generator().manual_seed(seed)
    for name, factor in factors.items():
        values = torch.zeros(factor.shape)
        if ".lora_A." in name:
            bound = 1 / math.sqrt(factor.shape[1])
            values.uniform_(-bound, bound, generator=generator)
        factor.data = values.to(factor.device, dtype)
        factor.requires_grad_(True)


@torch.no_grad()
def fold(base: Mapping[str, Tensor], factors: Mapping[str, Tensor], scale: float) -> dict[str, Tensor]:
    """float32 weights by name: `base`, plus scale · B·A for every layer in `factors` (see `Adapters.parameters`)."""
    weights = {name: weight.detach().float().clone() for name, weight in base.items()}
    for name, a in factors.items():
        layer, is_a, _ = name.partition(".lora_A.weight")
        if is_a:
            b = factors[f"{layer}.lora_B.weight"]
            weights[f"{layer}.weight"].addmm_(b.detach().float(), a.detach().float(), alpha=scale)
    return weights
