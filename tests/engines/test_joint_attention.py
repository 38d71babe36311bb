"""One weighted token in the place of equal ones, and fused projections: the same function, and the same gradients."""

from __future__ import annotations

import copy

import pytest
import torch
from diffusers import SD3Transformer2DModel
from torch import Tensor, nn

from engines.families.joint_attention import fuse_projections, use_joint_attention

EQUAL, WORDS = 5, 3


@pytest.fixture(scope="module", params=["SD3", "SD3.5-Medium"])
def transformer(request: pytest.FixtureRequest) -> SD3Transformer2DModel:
    newer = {"qk_norm": "rms_norm", "dual_attention_layers": (0,)} if request.param != "SD3" else {}
    torch.manual_seed(0)
    model: SD3Transformer2DModel = SD3Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, num_layers=3, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=12, caption_projection_dim=16, pooled_projection_dim=6, out_channels=4,
        pos_embed_max_size=8, **newer,
    )  # fmt: skip
    return nn.Module.to(model, torch.float64)


def _inputs() -> dict[str, Tensor]:
    random = torch.Generator().manual_seed(1)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=random, dtype=torch.float64)

    words, equal = normal(2, WORDS, 12), torch.zeros(2, EQUAL, 12, dtype=torch.float64)
    return {
        "hidden_states": normal(2, 4, 8, 8),
        "encoder_hidden_states": torch.cat([words, equal], dim=1),
        "pooled_projections": normal(2, 6),
        "timestep": torch.tensor([900.0, 250.0], dtype=torch.float64),
    }


def _velocity_and_gradients(model: nn.Module, inputs: dict[str, Tensor], weight: int) -> dict[str, Tensor]:
    """A parameter that the output does not depend on has none, or zeros: zeros either way."""
    model.zero_grad()
    kwargs = {"joint_attention_kwargs": {"text_weight": weight}} if weight else {}
    out = model(**inputs, **kwargs, return_dict=False)[0]
    (out * torch.linspace(-1, 1, out.numel(), dtype=torch.float64).view(out.shape)).sum().backward()
    gradients = {
        name: torch.zeros_like(weights) if weights.grad is None else weights.grad.clone()
        for name, weights in model.named_parameters()
    }
    return {"velocity": out.detach(), **gradients}


def test_one_token_stands_for_equal_ones(transformer: SD3Transformer2DModel) -> None:
    ours = use_joint_attention(copy.deepcopy(transformer))
    full = _inputs()
    folded = {**full, "encoder_hidden_states": full["encoder_hidden_states"][:, : WORDS + 1]}
    expected = _velocity_and_gradients(transformer, full, weight=0)
    normed = any("norm_k" in name for name in expected)
    atol = 1e-5 if normed else 1e-11  # diffusers' RMSNorm computes in float32
    for inputs, weight in ((full, 1), (folded, EQUAL)):
        got = _velocity_and_gradients(ours, inputs, weight)
        for name, theirs in expected.items():
            torch.testing.assert_close(got[name], theirs, atol=atol, rtol=1e-9 + atol, msg=name)
    unweighted = _velocity_and_gradients(ours, folded, weight=1)["velocity"]
    assert float((unweighted - expected["velocity"]).abs().max()) > 1e-4


@torch.no_grad()
def test_fused_projections_are_the_same_function(transformer: SD3Transformer2DModel) -> None:
    ours, inputs = use_joint_attention(copy.deepcopy(transformer)), _inputs()
    expected = transformer(**inputs, return_dict=False)[0]
    fuse_projections(ours)
    called: list[str] = []
    for name, module in ours.named_modules():
        if name.rsplit(".", 1)[-1] in ("to_q", "to_qkv", "add_k_proj", "to_added_qkv"):
            module.register_forward_hook(lambda *_, name=name: called.append(name.rsplit(".", 1)[-1]))
    torch.testing.assert_close(ours(**inputs, return_dict=False)[0], expected, atol=1e-12, rtol=1e-10)
    assert set(called) == {"to_qkv", "to_added_qkv"}
