"""Every kernel, run by Triton's interpreter on the CPU, against the formula in float64.

float32 in and out: relative L2 error of at most 5e-7 (measured: below 1e-7). The interpreter truncates where a GPU
rounds bfloat16, so the mixed dtypes are tested with float16, within a step of its mantissa.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from engines.kernels.gate_residual_norm import (
    gate_residual_norm,
    gate_residual_norm_op,
    gate_residual_norm_reference,
)
from engines.kernels.launch import INTERPRETED
from engines.kernels.layer_norm_modulate import (
    layer_norm_modulate,
    layer_norm_modulate_op,
    layer_norm_modulate_reference,
)
from engines.kernels.qk_norm_rope import qk_norm_rope, qk_norm_rope_op, qk_norm_rope_reference

EPS = 1e-6
TOLERANCE = {torch.float32: 5e-7, torch.float16: 1e-3}
"""dtype of an output → its relative L2 error."""


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def assert_close(got: Tensor, expected: Tensor) -> None:
    assert got.shape == expected.shape
    error = float((got.double() - expected).norm() / expected.norm().clamp(min=1e-30))
    assert error <= TOLERANCE[got.dtype], error


def layer_norm(x: Tensor) -> Tensor:
    x = x.double()
    mean = x.mean(dim=-1, keepdim=True)
    return (x - mean) / ((x - mean).square().mean(dim=-1, keepdim=True) + EPS).sqrt()


def modulated(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    return layer_norm(x) * (1 + scale.double()[:, None]) + shift.double()[:, None]


def rows(batch: int, width: int, count: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    """Views of one row per sample, as adaLN's product gives them."""
    return torch.randn(batch, count * width).to(dtype).chunk(count, dim=1)


def test_triton_interprets() -> None:
    assert INTERPRETED


@pytest.mark.parametrize("width", [1, 37, 64, 1536])
@pytest.mark.parametrize(("batch", "length"), [(1, 1), (3, 2), (1, 5)])
def test_layer_norm_modulate_is_its_formula(batch: int, length: int, width: int) -> None:
    x, (scale, shift) = torch.randn(batch, length, width), rows(batch, width, 2)
    got = layer_norm_modulate([x], scale, shift, eps=EPS, dtype=torch.float32)
    assert_close(got, modulated(x, scale, shift))


@pytest.mark.parametrize(
    ("x_dtype", "dtype"), [(torch.float32, torch.float16), (torch.float16, torch.float16)]
)
def test_layer_norm_modulate_writes_what_is_read_next(x_dtype: torch.dtype, dtype: torch.dtype) -> None:
    x, (scale, shift) = torch.randn(2, 3, 96).to(x_dtype), rows(2, 96, 2)
    got = layer_norm_modulate([x], scale, shift, eps=EPS, dtype=dtype)
    assert got.dtype == dtype
    assert_close(got, modulated(x, scale, shift))


def test_layer_norm_far_from_zero_keeps_its_digits() -> None:
    """A variance from the mean of squares would have none left."""
    x, (scale, shift) = torch.randn(2, 3, 96) + 1000, rows(2, 96, 2)
    got = layer_norm_modulate([x], scale, shift, eps=EPS, dtype=torch.float32)
    torch.testing.assert_close(got.double(), modulated(x, scale, shift), atol=1e-3, rtol=0)


def test_segments_come_out_joined_whatever_their_strides() -> None:
    whole = torch.randn(3, 9, 40)
    segments = [whole[:, 5:8], whole[:, :0], torch.randn(4, 3, 40).transpose(0, 1), torch.randn(3, 40, 2).mT]
    scale, shift = rows(3, 40, 2)
    got = layer_norm_modulate(segments, scale, shift, eps=EPS, dtype=torch.float32)
    assert_close(got, modulated(torch.cat(segments, dim=1), scale, shift))


@pytest.mark.parametrize("width", [37, 1536])
@pytest.mark.parametrize(("batch", "length"), [(1, 1), (3, 2)])
def test_gate_residual_norm_is_its_formula(batch: int, length: int, width: int) -> None:
    x, h = torch.randn(batch, length + 1, width)[:, 1:], torch.randn(batch, length, 2 * width)[..., :width]
    gate, scale, shift = rows(batch, width, 3)
    r, y = gate_residual_norm(x, gate, h, scale, shift, eps=EPS, dtype=torch.float32)
    expected = x.double() + gate.double()[:, None] * h.double()
    assert_close(r, expected)
    assert_close(y, modulated(expected, scale, shift))


def test_gate_residual_norm_keeps_the_stream_in_its_dtype() -> None:
    h = torch.randn(2, 40, 3).mT.half()
    gate, scale, shift = rows(2, 40, 3)
    for x in (torch.randn(2, 3, 40), torch.randn(2, 3, 40).half()):
        r, y = gate_residual_norm(x, gate, h, scale, shift, eps=EPS, dtype=torch.float16)
        assert (r.dtype, y.dtype) == (x.dtype, torch.float16)
        expected = x.double() + gate.double()[:, None] * h.double()
        assert_close(r, expected)
        assert_close(y, modulated(expected, scale, shift))


def turned(x: Tensor, weight: Tensor, cos: Tensor | None, sin: Tensor | None, interleaved: bool) -> Tensor:
    """Pairs as complex numbers, turned by a product; cos and sin `(L, D/2)`."""
    x = x.double()
    x = x / (x.square().mean(dim=-1, keepdim=True) + EPS).sqrt() * weight.double()
    if cos is None or sin is None:
        return x
    if interleaved:
        pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous())
        return torch.view_as_real(pairs * torch.complex(cos.double(), sin.double())[:, None]).flatten(-2)
    pairs = torch.complex(*x.chunk(2, dim=-1)) * torch.complex(cos.double(), sin.double())[:, None]
    return torch.cat([pairs.real, pairs.imag], dim=-1)


@pytest.mark.parametrize("rotary", ["none", "half", "interleaved"])
@pytest.mark.parametrize(("batch", "heads", "width"), [(1, 24, 64), (3, 3, 20), (1, 24, 128), (2, 9, 8)])
def test_qk_norm_rope_is_its_formula(batch: int, heads: int, width: int, rotary: str) -> None:
    """Two segments, one of them `(B, H, L, D)` in memory and one a view of a joint q-k-v product."""
    lengths = (1, 3)
    joint = torch.randn(batch, lengths[0], 3 * heads * width)
    queries, keys = ([part.unflatten(-1, (heads, width))] for part in joint.chunk(3, dim=-1)[:2])
    queries.append(torch.randn(batch, heads, lengths[1], width).transpose(1, 2))
    keys.append(torch.randn(batch, lengths[1] + 2, heads, width)[:, 2:])
    weights = torch.randn(4, width)
    angles = torch.randn(sum(lengths) + 1, width // 2)
    cos, sin = angles.cos(), angles.sin()
    interleaved = rotary == "interleaved"
    tables: dict[str, Tensor] = {}
    if interleaved:  # as diffusers makes them: every angle twice
        tables = {"cos": cos.repeat_interleave(2, dim=1), "sin": sin.repeat_interleave(2, dim=1)}
    elif rotary == "half":  # only the first half of a row is read, and each table has strides of its own
        tables = {"cos": torch.cat([cos, torch.full_like(cos, 9.0)], dim=1), "sin": sin.mT.contiguous().mT}
    q, k = qk_norm_rope(
        queries, keys, weights[:2], weights[2:], **tables, interleaved=interleaved, eps=EPS
    )  # fmt: skip
    begin = 0
    for index, length in enumerate(lengths):
        place = slice(begin, begin + length)
        here = (cos[place], sin[place]) if tables else (None, None)
        for got, given, weight in ((q, queries, weights[index]), (k, keys, weights[2 + index])):
            assert_close(got[:, place], turned(given[index], weight, *here, interleaved))
        begin += length
    assert q.shape == k.shape == (batch, sum(lengths), heads, width)


def test_references_are_the_same_functions() -> None:
    x, h = torch.randn(2, 3, 40).half(), torch.randn(2, 3, 40)
    gate, scale, shift = rows(2, 40, 3)
    for dtype in (torch.float32, torch.float16):
        args = {"eps": EPS, "dtype": dtype}
        pairs = [
            (
                (layer_norm_modulate([x, x[:, :1]], scale, shift, **args),),
                (layer_norm_modulate_reference([x, x[:, :1]], scale, shift, **args),),
            ),
            (
                gate_residual_norm(x, gate, h, scale, shift, **args),
                gate_residual_norm_reference(x, gate, h, scale, shift, **args),
            ),
        ]
        for ours, theirs in pairs:
            for got, expected in zip(ours, theirs, strict=True):
                assert got.dtype == expected.dtype
                assert_close(got, expected.double())
    heads, weights, angles = torch.randn(2, 2, 3, 4, 8), torch.randn(2, 8), torch.randn(3, 8)
    for rope in ({}, {"cos": angles, "sin": angles + 1}, {"cos": angles, "sin": angles, "interleaved": True}):
        inputs = ([heads[0]], [heads[1]], weights[:1], weights[1:])
        for got, expected in zip(
            qk_norm_rope(*inputs, **rope, eps=EPS),
            qk_norm_rope_reference(*inputs, **rope, eps=EPS),
            strict=True,
        ):
            assert_close(got, expected.double())


def test_operators_are_what_their_fakes_say() -> None:
    """torch's own check of schema, aliasing and meta implementation."""
    x, (gate, scale, shift) = torch.randn(2, 3, 40), rows(2, 40, 3)
    q, weight, table = torch.randn(2, 3, 4, 8), torch.randn(8), torch.randn(6, 4)
    for operator, args in (
        (layer_norm_modulate_op, ([x, x[:, :2]], scale, shift, EPS, torch.float16)),
        (gate_residual_norm_op, (x, gate, x.half(), scale, shift, EPS, torch.float16)),
        (qk_norm_rope_op, ([q, q], [q, q], [weight] * 2, [weight] * 2, table, table, False, EPS)),
        (qk_norm_rope_op, ([q], [q], [weight], [weight], None, None, False, EPS)),
    ):
        torch.library.opcheck(operator, args, test_utils=("test_schema", "test_faketensor"))
