"""LayerNorm and adaLN's modulation in one pass over the tokens: y = LN(x)·(1 + scale) + shift.

One program normalises one token, kept in registers between its mean, its variance and its output: x is read once and
y written once. eps is a constant of every kernel, not an argument: Inductor hands floats over as float64, and all that
meets one would be computed in float64. Letters: B batch, L tokens, D width.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import triton_op, wrap_triton
from torch.nn import functional as F

from engines.kernels.launch import check, contiguous_rows, warps


@triton.jit  # type: ignore[untyped-decorator]
def normalized(x: tl.tensor, inside: tl.tensor, width: tl.constexpr, eps: tl.constexpr) -> tl.tensor:
    """LayerNorm without weights of one float32 row, whose lanes that are not `inside` hold zeros."""
    centered = tl.where(inside, x - tl.sum(x, axis=0) / width, 0.0)
    return centered * tl.rsqrt(tl.sum(centered * centered, axis=0) / width + eps)


@triton.jit  # type: ignore[untyped-decorator]
def layer_norm_modulate_kernel(
    x: tl.tensor,
    scale: tl.tensor,
    shift: tl.tensor,
    y: tl.tensor,
    length: int,
    before: int,
    x_batch: int,
    x_token: int,
    scale_batch: int,
    shift_batch: int,
    y_batch: int,
    width: tl.constexpr,
    block: tl.constexpr,
    eps: tl.constexpr,
) -> None:
    """One token per program; strides in elements, `before` the tokens of y that come before this segment."""
    program = tl.program_id(0)
    batch = (program // length).to(tl.int64)
    token = program % length
    column = tl.arange(0, block)
    inside = column < width
    row = tl.load(x + batch * x_batch + token * x_token + column, mask=inside, other=0.0).to(tl.float32)
    factor = tl.load(scale + batch * scale_batch + column, mask=inside, other=0.0).to(tl.float32)
    offset = tl.load(shift + batch * shift_batch + column, mask=inside, other=0.0).to(tl.float32)
    out = normalized(row, inside, width, eps) * (1.0 + factor) + offset
    tl.store(y + batch * y_batch + (before + token) * width + column, out, mask=inside)


def tile(width: int) -> dict[str, int]:
    """What a launch fixes for this width: one token per program, its lanes a power of two."""
    block = triton.next_power_of_2(width)
    return {"width": width, "block": block, "num_warps": warps(block)}


@triton_op("cdm::layer_norm_modulate", mutates_args=())
def layer_norm_modulate_op(
    segments: list[Tensor], scale: Tensor, shift: Tensor, eps: float, dtype: torch.dtype
) -> Tensor:
    """`layer_norm_modulate` without its checks."""
    scale, shift = contiguous_rows(scale), contiguous_rows(shift)
    y = _empty(segments, dtype)
    before = 0
    for given in segments:
        x = contiguous_rows(given)
        batch, length, width = x.shape
        wrap_triton(layer_norm_modulate_kernel)[(batch * length,)](
            x, scale, shift, y,
            length, before, x.stride(0), x.stride(1), scale.stride(0), shift.stride(0), y.stride(0),
            eps=eps, **tile(width),
        )  # fmt: skip
        before += length
    return y


@layer_norm_modulate_op.register_fake  # type: ignore[untyped-decorator]
def _(segments: list[Tensor], scale: Tensor, shift: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
    return _empty(segments, dtype)


def _empty(segments: list[Tensor], dtype: torch.dtype) -> Tensor:
    batch, _, width = segments[0].shape
    return segments[0].new_empty((batch, sum(x.shape[1] for x in segments), width), dtype=dtype)


def layer_norm_modulate(
    segments: Sequence[Tensor], scale: Tensor, shift: Tensor, *, eps: float, dtype: torch.dtype
) -> Tensor:
    """LN(x)·(1 + scale) + shift in `dtype`, `(B, L, D)`; scale and shift `(B, D)`, views of a chunked row as they are.

    `segments` are the parts of x, each `(B, Lᵢ, D)`: they come out behind one another, and need no joining before.

    Raises:
        RuntimeUnavailable, ExecutionError: as `engines.kernels.launch.check` says.
    """
    check("layer_norm_modulate", *segments, scale, shift)
    batch, _, width = segments[0].shape
    assert all(x.shape[::2] == (batch, width) for x in segments), [x.shape for x in segments]
    assert scale.shape == shift.shape == (batch, width), (scale.shape, shift.shape)
    y: Tensor = layer_norm_modulate_op(list(segments), scale, shift, eps, dtype)
    return y


def layer_norm_modulate_reference(
    segments: Sequence[Tensor], scale: Tensor, shift: Tensor, *, eps: float, dtype: torch.dtype
) -> Tensor:
    """The same in plain torch, in float32 or, of float64 inputs, in float64."""
    x = torch.cat(list(segments), dim=1)
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    y = F.layer_norm(x, x.shape[-1:], eps=eps) * (1 + scale.to(x.dtype)[:, None]) + shift.to(x.dtype)[:, None]
    return y.to(dtype)
