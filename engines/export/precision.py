"""Which parts of a model compute in bfloat16, and how they are made to.

A bfloat16 has 8 bits of mantissa. In a transformer of the denoiser only what does the work, the matrix products of
attention and feed-forward, is lowered: each such module whole, with casts at its borders. What adds up over the
layers (the residual stream), what multiplies everything (gates, modulation) and what must tell close numbers apart
(time) stays float32. `cdm-bench sensitivity` measures what each part would cost.
"""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from engines.export.memory import free

LOW = torch.bfloat16

ANGLES = "image_rotary_emb"
"""Cosines and sines of positions, which diffusers hands to an attention: bfloat16 confuses near positions."""


class Lowered(nn.Module):
    """`module` in bfloat16 between float32 neighbours: float tensors are cast going in, float32 coming out.

    Whatever else the module has (a norm's `linear`, say) is found on it as before.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module.to(LOW)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        dtype = next(self.module.parameters()).dtype
        return _cast(
            self.module(
                *_cast(args, dtype),
                **{name: value if name == ANGLES else _cast(value, dtype) for name, value in kwargs.items()},
            ),
            torch.float32,
        )


def _cast(value: Any, dtype: torch.dtype) -> Any:
    if isinstance(value, Tensor) and value.is_floating_point():
        return value.to(dtype)
    if isinstance(value, tuple):
        return tuple(_cast(item, dtype) for item in value)
    return value


def lower_(module: nn.Module, patterns: Sequence[str]) -> list[str]:
    """Lower every submodule whose name matches one of `patterns`, in place; returns the names."""
    found = [
        name for name, _ in module.named_modules() if any(fnmatchcase(name, pattern) for pattern in patterns)
    ]
    outermost = [name for name in found if not any(name.startswith(f"{other}.") for other in found)]
    for name in outermost:
        parent, _, child = name.rpartition(".")
        owner = module.get_submodule(parent)
        setattr(owner, child, Lowered(module.get_submodule(name)))
    return outermost


def raise_(module: nn.Module) -> None:
    """Compute in float32 again, with the weights as lowering has rounded them: what a graph's arithmetic is held to.

    The bfloat16 weights are emptied: a graph made of them must have been written.
    """
    for tensor in (*module.parameters(), *module.buffers()):
        if tensor.dtype == LOW:
            low = tensor.data
            tensor.data = low.to(torch.float32)
            free([low])
