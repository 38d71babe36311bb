"""The switch between a transformer's own blocks and the same blocks with the kernels.

    use_fused_kernels(transformer, enabled=True)

Blocks keep their weights and their place: they only change class, and their attention its processor. Rewrites of a
family (`Family.fuse`) and lowering to bfloat16 come first, this comes last.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any, TypeVar

from torch import nn

from engines.errors import RuntimeUnavailable

Module = TypeVar("Module", bound=nn.Module)


def use_fused_kernels(transformer: Module, enabled: bool) -> Module:
    """Make every block of `transformer` (an SD3 or LongCat model, wrapped or not) run with the kernels, or as before.

    The model is changed in place, and returned. With the kernels it computes the same, on a CUDA device, without
    gradients.

    Raises:
        RuntimeUnavailable: Triton is missing, or no block is of a kind that has kernels.
    """
    if find_spec("triton") is None:
        if not enabled:
            return transformer  # nothing can have been turned on
        raise RuntimeUnavailable(
            "fused kernels need the package 'triton', which is not installed; install it (torch for CUDA brings it), "
            "or turn the fused kernels off"
        )
    from engines.kernels import longcat, sd3

    fused = sd3.BLOCKS | longcat.BLOCKS
    blocks = fused if enabled else {new: old for old, new in fused.items()}
    module: Any
    for module in transformer.modules():
        if type(module) in blocks:
            module.__class__ = blocks[type(module)]
        _switch_attention(module, sd3.PROCESSORS | longcat.PROCESSORS, enabled)
    if enabled and not any(type(module) in fused.values() for module in transformer.modules()):
        raise RuntimeUnavailable(
            f"{type(transformer).__name__} has no blocks with fused kernels, which exist for "
            f"{', '.join(block.__name__ for block in fused)}; turn the fused kernels off"
        )
    return transformer


def _switch_attention(module: Any, processors: dict[type, type], enabled: bool) -> None:
    """A processor that is someone else's stays, and so does one that norms nothing (SD3-Medium's)."""
    processor: Any = getattr(module, "processor", None)
    if not enabled and type(processor) in processors.values():
        module.set_processor(processor.eager)
    elif enabled and type(processor) in processors and getattr(module, "norm_q", None) is not None:
        module.set_processor(processors[type(processor)](processor))
