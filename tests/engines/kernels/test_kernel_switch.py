"""What the kernels refuse, and in which words. Nothing here runs one."""

from __future__ import annotations

import sys

import pytest
import torch
from diffusers import SD3Transformer2DModel
from torch import nn

from engines.errors import ExecutionError, RuntimeUnavailable
from engines.kernels.gate_residual_norm import gate_residual_norm
from engines.kernels.layer_norm_modulate import layer_norm_modulate
from engines.kernels.qk_norm_rope import qk_norm_rope
from engines.kernels.switch import use_fused_kernels


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    model: nn.Module = SD3Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, num_layers=2, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=12, caption_projection_dim=16, pooled_projection_dim=6, out_channels=4,
        pos_embed_max_size=8,
    )  # fmt: skip
    return model.eval()


def run(model: nn.Module) -> None:
    dtype = next(model.parameters()).dtype
    model(
        hidden_states=torch.randn(1, 4, 8, 8, dtype=dtype),
        encoder_hidden_states=torch.randn(1, 3, 12, dtype=dtype),
        pooled_projections=torch.randn(1, 6, dtype=dtype),
        timestep=torch.tensor([500.0]),
    )


def test_on_a_cpu_one_sentence_says_what_to_do(model: nn.Module) -> None:
    use_fused_kernels(model, enabled=True)
    with (
        torch.no_grad(),
        pytest.raises(RuntimeUnavailable, match=r"got a tensor on cpu; move the model there, or"),
    ):
        run(model)
    use_fused_kernels(model, enabled=False)
    run(model)


def test_gradients_are_refused_and_inference_mode_is_not(model: nn.Module) -> None:
    use_fused_kernels(model, enabled=True)
    with pytest.raises(
        ExecutionError, match=r"layer_norm_modulate has no backward; call the model under torch\.no"
    ):
        run(model)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode(), pytest.raises(RuntimeUnavailable):  # the next obstacle
            run(model)
    use_fused_kernels(model, enabled=False)
    run(model)


def test_float64_is_refused(model: nn.Module) -> None:
    use_fused_kernels(nn.Module.to(model, torch.float64), enabled=True)
    with torch.no_grad(), pytest.raises(ExecutionError, match=r"got torch\.float64; convert the model"):
        run(model)


@pytest.mark.parametrize("kernel", ["layer_norm_modulate", "gate_residual_norm", "qk_norm_rope"])
def test_every_kernel_checks_every_input(kernel: str) -> None:
    """One input of a wrong dtype, or wanting a gradient, at a time."""
    x, row, weight = torch.randn(1, 2, 8), torch.randn(1, 8), torch.randn(8)
    settings = {"eps": 1e-6, "dtype": torch.float32}

    def call(*given: torch.Tensor) -> object:
        if kernel == "layer_norm_modulate":
            return layer_norm_modulate(list(given[2:]), given[0], given[1], **settings)
        if kernel == "gate_residual_norm":
            return gate_residual_norm(*given, **settings)
        q, k, *weights, cos, sin = given
        return qk_norm_rope([q], [k], weights[:1], weights[1:], cos=cos, sin=sin, eps=1e-6)

    heads, table = x[:, :, None], torch.randn(2, 4)
    inputs = {
        "layer_norm_modulate": [row, row, x, x],
        "gate_residual_norm": [x, row, x, row, row],
        "qk_norm_rope": [heads, heads, weight, weight, table, table],
    }[kernel]
    for place, good in enumerate(inputs):
        for bad, message in ((good.double(), "float64"), (good.clone().requires_grad_(), "no backward")):
            with pytest.raises(ExecutionError, match=message):
                call(*inputs[:place], bad, *inputs[place + 1 :])
    with pytest.raises(RuntimeUnavailable, match="on cpu"):
        call(*inputs)


def test_rotary_tables_must_fit() -> None:
    def rotate(table: torch.Tensor, width: int = 8, interleaved: bool = False) -> None:
        q, weight = torch.randn(1, 3, 2, width), torch.randn(width)
        segments, weights = [q, q[:, :1]], [weight] * 2
        qk_norm_rope(
            segments, segments, weights, weights, cos=table, sin=table, interleaved=interleaved, eps=1e-6
        )  # fmt: skip

    for table, interleaved in (
        (torch.randn(3, 4), False),
        (torch.randn(4, 3), False),
        (torch.randn(4, 4), True),
        (torch.randn(4, 4).half(), False),
    ):
        with pytest.raises(ExecutionError, match=r"a rotary table of \(\d, \d\) .* does not hold 4 tokens"):
            rotate(table, interleaved=interleaved)
    with pytest.raises(ExecutionError, match="7 wide"):
        rotate(torch.randn(4, 4), width=7)
    with pytest.raises(RuntimeUnavailable, match="on cpu"):  # all else is right
        rotate(torch.randn(4, 4))


def test_without_triton_a_sentence_says_so_and_eager_stays(
    model: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "triton", None)
    with pytest.raises(RuntimeUnavailable, match="need the package 'triton', which is not installed"):
        use_fused_kernels(model, enabled=True)
    assert use_fused_kernels(model, enabled=False) is model


def test_a_model_without_such_blocks_is_refused() -> None:
    model = nn.Sequential(nn.Linear(2, 2))
    with pytest.raises(
        RuntimeUnavailable, match=r"Sequential has no blocks .* JointTransformerBlock, LongCatImage"
    ):
        use_fused_kernels(model, enabled=True)
    assert use_fused_kernels(model, enabled=False) is model
