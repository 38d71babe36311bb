"""RMSNorm of queries and keys, and their rotary position embedding, in one pass.

Image and text have norm weights of their own and meet in attention: every segment is normed, turned by its place in
the joint sequence and written there at once, so that nothing is joined afterwards. Cosines and sines are float32;
without them (SD3.5) there is only the norm. Element i turns with i + D/2 (rotate-half, what LongCat is rewritten to),
or 2i with 2i + 1 (interleaved, as it comes), which reads and writes two bytes at a time where rotate-half does 16.
One program takes eight heads of one token, of q and of k. Letters: B batch, L tokens, H heads, D their width.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import triton_op, wrap_triton

from engines.errors import ExecutionError
from engines.kernels.launch import check, contiguous_rows, warps

HEADS = 8
"""Heads per program: it divides the head counts of SD3 and LongCat (24), so that no lane of theirs is idle."""


@triton.jit  # type: ignore[untyped-decorator]
def norm_rotate(
    source: tl.tensor,
    target: tl.tensor,
    weight: tl.tensor,
    head: tl.tensor,
    head_stride: int,
    heads: int,
    cosines: tl.tensor,
    sines: tl.tensor,
    half: tl.constexpr,
    block: tl.constexpr,
    rotate: tl.constexpr,
    interleaved: tl.constexpr,
    eps: tl.constexpr,
) -> None:
    """One token's heads from `source` to `target` (contiguous), each head as the two elements of its pairs."""
    column = tl.arange(0, block)
    inside = (head < heads)[:, None] & (column < half)[None, :]
    one = column * 2 if interleaved else column
    other = one + (1 if interleaved else half)
    read = source + head[:, None] * head_stride
    first = tl.load(read + one[None, :], mask=inside, other=0.0).to(tl.float32)
    second = tl.load(read + other[None, :], mask=inside, other=0.0).to(tl.float32)
    squares = tl.sum(first * first + second * second, axis=1)
    rms = tl.rsqrt(squares / (2 * half) + eps)[:, None]
    first *= rms * tl.load(weight + one, mask=column < half, other=0.0).to(tl.float32)[None, :]
    second *= rms * tl.load(weight + other, mask=column < half, other=0.0).to(tl.float32)[None, :]
    if rotate:
        turned = first * cosines - second * sines
        second = second * cosines + first * sines
        first = turned
    write = target + head[:, None] * (2 * half)
    tl.store(write + one[None, :], first, mask=inside)
    tl.store(write + other[None, :], second, mask=inside)


@triton.jit  # type: ignore[untyped-decorator]
def qk_norm_rope_kernel(
    q: tl.tensor,
    k: tl.tensor,
    q_weight: tl.tensor,
    k_weight: tl.tensor,
    cos: tl.tensor,
    sin: tl.tensor,
    q_out: tl.tensor,
    k_out: tl.tensor,
    length: int,
    heads: int,
    before: int,
    q_batch: int,
    q_token: int,
    q_head: int,
    k_batch: int,
    k_token: int,
    k_head: int,
    out_batch: int,
    cos_token: int,
    sin_token: int,
    half: tl.constexpr,
    block: tl.constexpr,
    block_heads: tl.constexpr,
    rotate: tl.constexpr,
    interleaved: tl.constexpr,
    eps: tl.constexpr,
) -> None:
    """Strides in elements; `before`: the joint sequence's tokens before this segment."""
    program = tl.program_id(0)
    batch = (program // length).to(tl.int64)
    token = program % length
    head = tl.program_id(1) * block_heads + tl.arange(0, block_heads)
    cosines = 1.0
    sines = 0.0
    if rotate:
        column = tl.arange(0, block)
        angle = column * 2 if interleaved else column
        cosines = tl.load(cos + (before + token) * cos_token + angle, mask=column < half, other=0.0)[None, :]
        sines = tl.load(sin + (before + token) * sin_token + angle, mask=column < half, other=0.0)[None, :]
    out = batch * out_batch + (before + token) * heads * (2 * half)
    norm_rotate(
        q + batch * q_batch + token * q_token, q_out + out, q_weight, head, q_head, heads,
        cosines, sines, half, block, rotate, interleaved, eps,
    )  # fmt: skip
    norm_rotate(
        k + batch * k_batch + token * k_token, k_out + out, k_weight, head, k_head, heads,
        cosines, sines, half, block, rotate, interleaved, eps,
    )  # fmt: skip


def tile(heads: int, width: int, rotate: bool, interleaved: bool) -> dict[str, int]:
    """What a launch fixes for so many heads of this width."""
    block_heads, block = min(HEADS, triton.next_power_of_2(heads)), triton.next_power_of_2(width // 2)
    return {
        "half": width // 2,
        "block": block,
        "block_heads": block_heads,
        "rotate": rotate,
        "interleaved": interleaved,
        "num_warps": warps(block_heads * block),
    }


@triton_op("cdm::qk_norm_rope", mutates_args=())
def qk_norm_rope_op(
    queries: list[Tensor],
    keys: list[Tensor],
    query_weights: list[Tensor],
    key_weights: list[Tensor],
    cos: Tensor | None,
    sin: Tensor | None,
    interleaved: bool,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """`qk_norm_rope` without its checks."""
    q_out, k_out = _empty(queries), _empty(queries)
    heads, width = q_out.shape[2:]
    rotate = cos is not None and sin is not None
    constants = tile(heads, width, rotate, interleaved)
    before = 0
    for query, key, q_weight, k_weight in zip(queries, keys, query_weights, key_weights, strict=True):
        q, k = contiguous_rows(query), contiguous_rows(key)
        batch, length = q.shape[:2]
        # A kernel without rotation reads no table: any pointer will do.
        cosines, sines = (q if table is None else contiguous_rows(table) for table in (cos, sin))
        wrap_triton(qk_norm_rope_kernel)[(batch * length, triton.cdiv(heads, constants["block_heads"]))](
            q, k, q_weight.contiguous(), k_weight.contiguous(), cosines, sines, q_out, k_out,
            length, heads, before, *q.stride()[:3], *k.stride()[:3], q_out.stride(0),
            cosines.stride(0), sines.stride(0), eps=eps, **constants,
        )  # fmt: skip
        before += length
    return q_out, k_out


@qk_norm_rope_op.register_fake  # type: ignore[untyped-decorator]
def _(
    queries: list[Tensor],
    keys: list[Tensor],
    query_weights: list[Tensor],
    key_weights: list[Tensor],
    cos: Tensor | None,
    sin: Tensor | None,
    interleaved: bool,
    eps: float,
) -> tuple[Tensor, Tensor]:
    return _empty(queries), _empty(queries)


def _empty(segments: list[Tensor]) -> Tensor:
    batch, _, heads, width = segments[0].shape
    return segments[0].new_empty((batch, sum(x.shape[1] for x in segments), heads, width))


def qk_norm_rope(
    queries: Sequence[Tensor],
    keys: Sequence[Tensor],
    query_weights: Sequence[Tensor],
    key_weights: Sequence[Tensor],
    *,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    interleaved: bool = False,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """q and k `(B, L, H, D)`, contiguous, from segments `(B, Lᵢ, H, D)` of any strides, each with its weights `(D,)`.

    A `(B, H, L, D)` tensor goes in transposed, `.transpose(1, 2)`, without a copy.
    cos and sin: float32, a row per token of the joint sequence. Rotate-half reads the first D/2 of a row; interleaved
    ones have every angle twice, `(L, D)`, as diffusers makes them.

    Raises:
        RuntimeUnavailable, ExecutionError: as `engines.kernels.launch.check` says; an odd D, or too small a table.
    """
    assert all(query.shape == key.shape for query, key in zip(queries, keys, strict=True))
    assert (cos is None) == (sin is None)
    tables = [table for table in (cos, sin) if table is not None]
    length, width = sum(query.shape[1] for query in queries), queries[0].shape[-1]
    if width % 2:
        raise ExecutionError(
            f"heads are {width} wide and qk_norm_rope takes even widths; turn the fused kernels off"
        )
    angles = width if interleaved else width // 2
    for table in tables:
        if table.dtype != torch.float32 or table.shape[0] < length or table.shape[1] < angles:
            raise ExecutionError(
                f"a rotary table of {tuple(table.shape)} {table.dtype} does not hold {length} tokens of {angles} "
                "angles; give float32 cos and sin of the whole sequence"
            )
    check("qk_norm_rope", *queries, *keys, *query_weights, *key_weights, *tables)
    q, k = qk_norm_rope_op(
        list(queries), list(keys), list(query_weights), list(key_weights), cos, sin, interleaved, eps
    )
    return q, k


def qk_norm_rope_reference(
    queries: Sequence[Tensor],
    keys: Sequence[Tensor],
    query_weights: Sequence[Tensor],
    key_weights: Sequence[Tensor],
    *,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    interleaved: bool = False,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """The same in plain torch, in float32 or, of float64 inputs, in float64."""

    def one(segments: Sequence[Tensor], weights: Sequence[Tensor]) -> Tensor:
        exact = torch.promote_types(segments[0].dtype, torch.float32)
        normed = []
        for given, weight in zip(segments, weights, strict=True):
            x = given.to(exact)
            rms = torch.rsqrt(x.square().mean(dim=-1, keepdim=True) + eps)
            normed.append(x * rms * weight.to(exact))
        x = torch.cat(normed, dim=1)
        if cos is not None and sin is not None:
            half = x.shape[-1] // 2
            one = slice(0, None, 2) if interleaved else slice(0, half)
            other = slice(1, None, 2) if interleaved else slice(half, None)
            cosines, sines = (table[: x.shape[1], None, one].to(exact) for table in (cos, sin))
            turned = torch.empty_like(x)
            turned[..., one] = x[..., one] * cosines - x[..., other] * sines
            turned[..., other] = x[..., other] * cosines + x[..., one] * sines
            x = turned
        return x.to(segments[0].dtype)

    return one(queries, query_weights), one(keys, key_weights)
