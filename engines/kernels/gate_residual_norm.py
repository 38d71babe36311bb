"""A gated residual and the adaLN behind it in one pass: r = x + gate·h, and y = LN(r)·(1 + scale) + shift.

x is the residual stream (float32 in our mixed precision) and h what a bfloat16 product gave: the sum is taken in
float32, r keeps x's dtype, and y is what the next product reads. The norm sees r before it is rounded.
One program takes one token. Letters: B batch, L tokens, D width.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import triton_op, wrap_triton
from torch.nn import functional as F

from engines.kernels.launch import check, contiguous_rows
from engines.kernels.layer_norm_modulate import normalized, tile


@triton.jit  # type: ignore[untyped-decorator]
def gate_residual_norm_kernel(
    x: tl.tensor,
    gate: tl.tensor,
    h: tl.tensor,
    scale: tl.tensor,
    shift: tl.tensor,
    r: tl.tensor,
    y: tl.tensor,
    length: int,
    x_batch: int,
    x_token: int,
    gate_batch: int,
    h_batch: int,
    h_token: int,
    scale_batch: int,
    shift_batch: int,
    width: tl.constexpr,
    block: tl.constexpr,
    eps: tl.constexpr,
) -> None:
    """One token per program; strides in elements, r and y contiguous."""
    program = tl.program_id(0)
    batch = (program // length).to(tl.int64)
    token = program % length
    column = tl.arange(0, block)
    inside = column < width
    row = tl.load(x + batch * x_batch + token * x_token + column, mask=inside, other=0.0).to(tl.float32)
    new = tl.load(h + batch * h_batch + token * h_token + column, mask=inside, other=0.0).to(tl.float32)
    row += tl.load(gate + batch * gate_batch + column, mask=inside, other=0.0).to(tl.float32) * new
    out = (batch * length + token) * width + column
    tl.store(r + out, row, mask=inside)
    factor = tl.load(scale + batch * scale_batch + column, mask=inside, other=0.0).to(tl.float32)
    offset = tl.load(shift + batch * shift_batch + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(y + out, normalized(row, inside, width, eps) * (1.0 + factor) + offset, mask=inside)


@triton_op("cdm::gate_residual_norm", mutates_args=())
def gate_residual_norm_op(
    x: Tensor, gate: Tensor, h: Tensor, scale: Tensor, shift: Tensor, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """`gate_residual_norm` without its checks."""
    x, gate, h, scale, shift = (contiguous_rows(tensor) for tensor in (x, gate, h, scale, shift))
    batch, length, width = x.shape
    r, y = x.new_empty(x.shape), x.new_empty(x.shape, dtype=dtype)
    wrap_triton(gate_residual_norm_kernel)[(batch * length,)](
        x, gate, h, scale, shift, r, y,
        length, x.stride(0), x.stride(1), gate.stride(0), h.stride(0), h.stride(1), scale.stride(0), shift.stride(0),
        eps=eps, **tile(width),
    )  # fmt: skip
    return r, y


@gate_residual_norm_op.register_fake  # type: ignore[untyped-decorator]
def _(
    x: Tensor, gate: Tensor, h: Tensor, scale: Tensor, shift: Tensor, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(x.shape, dtype=dtype)


def gate_residual_norm(
    x: Tensor, gate: Tensor, h: Tensor, scale: Tensor, shift: Tensor, *, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """r in x's dtype and y in `dtype`, both `(B, L, D)`, as x and h are; gate, scale and shift `(B, D)`.

    Raises:
        RuntimeUnavailable, ExecutionError: as `engines.kernels.launch.check` says.
    """
    check("gate_residual_norm", x, gate, h, scale, shift)
    assert h.shape == x.shape, (h.shape, x.shape)
    assert gate.shape == scale.shape == shift.shape == x.shape[::2], (gate.shape, scale.shape, shift.shape)
    r, y = gate_residual_norm_op(x, gate, h, scale, shift, eps, dtype)
    return r, y


def gate_residual_norm_reference(
    x: Tensor, gate: Tensor, h: Tensor, scale: Tensor, shift: Tensor, *, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """The same in plain torch, in float32 or, of float64 inputs, in float64."""
    exact = torch.promote_types(x.dtype, torch.float32)
    r = x.to(exact) + gate.to(exact)[:, None] * h.to(exact)
    y = F.layer_norm(r, r.shape[-1:], eps=eps) * (1 + scale.to(exact)[:, None]) + shift.to(exact)[:, None]
    return r.to(x.dtype), y.to(dtype)
