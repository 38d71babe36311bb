"""The CPU kernels are the same functions as torch's, forward and backward."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from training import cpu_kernels as kernels


def _gradients(function: object, inputs: list[Tensor]) -> list[Tensor]:
    leaves = [tensor.clone().requires_grad_() for tensor in inputs]
    output = function(*leaves)  # type: ignore[operator]
    (output.float() * torch.linspace(-1, 1, output.numel()).view(output.shape)).sum().backward()
    return [output.detach(), *(leaf.grad for leaf in leaves if leaf.grad is not None)]


@pytest.mark.parametrize("keys", [7, 5])
def test_attention_equals_torch_in_float64(keys: int) -> None:
    random = torch.Generator().manual_seed(0)
    shapes = [(2, 3, 7, 8), (2, 3, keys, 8), (2, 3, keys, 8)]
    inputs = [torch.randn(shape, generator=random, dtype=torch.float64) for shape in shapes]
    for ours, theirs in zip(
        _gradients(kernels._Attention.apply, inputs),
        _gradients(F.scaled_dot_product_attention, inputs),
        strict=True,
    ):
        assert torch.allclose(ours, theirs, atol=1e-12)


def test_gelu_equals_torch_in_float64() -> None:
    inputs = [torch.linspace(-8, 8, 401, dtype=torch.float64)]
    for ours, theirs in zip(
        _gradients(kernels._Gelu.apply, inputs),
        _gradients(lambda x: F.gelu(x, approximate="tanh"), inputs),
        strict=True,
    ):
        assert torch.allclose(ours, theirs, atol=1e-12)


def test_bfloat16_stays_within_its_rounding() -> None:
    x = torch.linspace(-6, 6, 1001)
    exact = F.gelu(x, approximate="tanh")
    with kernels.cpu_kernels():
        ours = F.gelu(x.bfloat16(), approximate="tanh").float()
    assert float((ours - exact).abs().max()) < 0.04


def test_masks_and_other_kinds_go_to_torch_and_the_block_ends() -> None:
    q = torch.randn(1, 2, 4, 8)
    mask = torch.ones(4, 4, dtype=torch.bool).tril()
    before = F.scaled_dot_product_attention, F.gelu
    with kernels.cpu_kernels():
        masked = F.scaled_dot_product_attention(q, q, q, attn_mask=mask)
        causal = F.scaled_dot_product_attention(q, q, q, is_causal=True)
        assert torch.equal(F.gelu(q), before[1](q))
    assert torch.allclose(masked, causal, atol=1e-6)
    assert (F.scaled_dot_product_attention, F.gelu) == before
