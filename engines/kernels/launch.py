"""What every kernel asks of its inputs before it is launched, and how wide it is launched."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from engines.errors import ExecutionError, RuntimeUnavailable

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
"""What kernels read and write; between, they compute in float32."""

INTERPRETED: bool = triton.knobs.runtime.interpret
"""Whether Triton was imported under TRITON_INTERPRET=1: kernels then run, slowly, on the CPU."""


def check(kernel: str, *tensors: Tensor) -> None:
    """Refuse what `kernel` cannot run on; while torch traces, no device is needed.

    Raises:
        RuntimeUnavailable: not on a CUDA device.
        ExecutionError: a dtype the kernels don't have, or a gradient asked for.
    """
    for tensor in tensors:
        if tensor.dtype not in DTYPES:
            raise ExecutionError(
                f"{kernel} takes float32, bfloat16 or float16 and got {tensor.dtype}; convert the model, or turn the "
                "fused kernels off (use_fused_kernels(transformer, enabled=False))"
            )
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
        raise ExecutionError(
            f"{kernel} has no backward; call the model under torch.no_grad(), or turn the fused kernels off to train "
            "(use_fused_kernels(transformer, enabled=False))"
        )
    if torch.compiler.is_compiling() or INTERPRETED:
        return
    for tensor in tensors:
        if tensor.device.type != "cuda":
            raise RuntimeUnavailable(
                f"{kernel} runs on a CUDA device and got a tensor on {tensor.device}; move the model there, or turn "
                "the fused kernels off (use_fused_kernels(transformer, enabled=False))"
            )


def contiguous_rows(tensor: Tensor) -> Tensor:
    """`tensor`, copied only where its last dimension is not contiguous; any other strides are the kernel's business."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def warps(elements: int) -> int:
    """Warps for a tile: eight elements a thread, 16 bytes of bfloat16, up to eight warps."""
    return min(max(elements // 256, 1), 8)
