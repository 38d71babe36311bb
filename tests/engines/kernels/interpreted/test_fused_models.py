"""Small models of diffusers' real classes, with and without the kernels: the same pictures' worth of numbers."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import LongCatImageTransformer2DModel, SD3Transformer2DModel
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from engines.export import precision
from engines.families.joint_attention import fuse_projections, use_joint_attention
from engines.families.rotary import use_rotate_half, use_tables
from engines.kernels.switch import use_fused_kernels

TOLERANCE = 1e-6
"""Relative L2 error of a whole model, float32; measured: 1e-7."""

Call = tuple[nn.Module, dict[str, Any]]


class Operators(TorchDispatchMode):
    """Counts the calls of our operators."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "cdm":
            self.calls[func._opname] += 1
        return func(*args, **(kwargs or {}))


def build_sd3(text_weight: int = 1, **newer: Any) -> Call:
    model: nn.Module = SD3Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, num_layers=2, attention_head_dim=8, num_attention_heads=3,
        joint_attention_dim=12, caption_projection_dim=24, pooled_projection_dim=6, out_channels=4,
        pos_embed_max_size=8, **newer,
    )  # fmt: skip
    return use_joint_attention(_ready(model)), {
        "hidden_states": torch.randn(2, 4, 4, 6),
        "encoder_hidden_states": torch.randn(2, 2, 12),
        "pooled_projections": torch.randn(2, 6),
        "timestep": torch.tensor([900.0, 20.0]),
        "joint_attention_kwargs": {"text_weight": text_weight},
    }


def build_sd35(text_weight: int = 1) -> Call:
    return build_sd3(text_weight, qk_norm="rms_norm", dual_attention_layers=(0,))


def build_longcat() -> Call:
    model: nn.Module = LongCatImageTransformer2DModel(
        in_channels=8, num_layers=1, num_single_layers=2, attention_head_dim=16, num_attention_heads=3,
        joint_attention_dim=12, pooled_projection_dim=12, axes_dims_rope=[4, 6, 6],
    )  # fmt: skip
    words, height, width = 2, 2, 3
    places = torch.stack(torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij"), dim=-1)
    image = torch.cat([torch.ones(height * width, 1), places.flatten(0, 1) + words], dim=1)
    text = torch.arange(words)[:, None] * torch.tensor([0, 1, 1])
    return _ready(model), {
        "hidden_states": torch.randn(2, height * width, 8),
        "encoder_hidden_states": torch.randn(2, words, 12),
        "timestep": torch.tensor([0.9, 0.02]),
        "img_ids": image,
        "txt_ids": text.float(),
    }


def build_rotate_half() -> Call:
    model, inputs = build_longcat()
    use_tables(model)
    use_rotate_half(model)
    return model, inputs


def _ready(model: nn.Module) -> nn.Module:
    """Norms of 1 would hide one left out, or swapped with another."""
    with torch.no_grad():
        for name, weights in model.named_parameters():
            if ".norm_" in name and weights.ndim == 1:
                weights.copy_(torch.rand_like(weights) + 0.5)
    return model.eval().requires_grad_(False)


def run(call: Call) -> Tensor:
    model, inputs = call
    with torch.no_grad():
        out: Tensor = model(**inputs, return_dict=False)[0]
    return out


def error(got: Tensor, expected: Tensor) -> float:
    assert got.dtype == expected.dtype
    return float((got - expected).norm() / expected.norm())


BUILD: dict[str, Callable[[], Call]] = {
    "SD3": build_sd3,
    "SD3 without T5": lambda: build_sd3(text_weight=4),
    "SD3.5": build_sd35,
    "SD3.5 without T5": lambda: build_sd35(text_weight=4),
    "LongCat": build_longcat,
    "LongCat, rotate-half": build_rotate_half,
}
# Per SD3 block: a norm for image and one for text, behind attention one each, but no text behind the last. SD3.5's
# first block has a second attention. LongCat: one block of two streams, two of one.
SD3 = {"layer_norm_modulate": 4, "gate_residual_norm": 3}
SD35 = {"layer_norm_modulate": 5, "gate_residual_norm": 3, "qk_norm_rope": 3}
LONGCAT = {"layer_norm_modulate": 4, "gate_residual_norm": 2, "qk_norm_rope": 3}
CALLS = dict(zip(BUILD, (SD3, SD3, SD35, SD35, LONGCAT, LONGCAT), strict=True))


@pytest.fixture(params=BUILD)
def name(request: pytest.FixtureRequest) -> str:
    torch.manual_seed(0)
    return str(request.param)


def test_models_are_the_same_functions_with_kernels(name: str) -> None:
    model, inputs = BUILD[name]()
    before = run((model, inputs))
    names = list(model.state_dict())
    assert use_fused_kernels(model, enabled=True) is model
    with Operators() as operators:
        fused = run((model, inputs))
    assert operators.calls == CALLS[name]
    assert error(fused, before) < TOLERANCE
    assert not torch.equal(fused, before)
    assert list(model.state_dict()) == names
    use_fused_kernels(model, enabled=False)
    with Operators() as operators:
        torch.testing.assert_close(run((model, inputs)), before, atol=0, rtol=0)
    assert not operators.calls


def test_fused_projections_and_copies_keep_the_kernels(name: str) -> None:
    model, inputs = BUILD[name]()
    before = run((model, inputs))
    if name.startswith("SD3"):
        fuse_projections(model)
    else:
        model.fuse_qkv_projections()
    fused = copy.deepcopy(use_fused_kernels(model, enabled=True))
    with Operators() as operators:
        assert error(run((fused, inputs)), before) < TOLERANCE
    assert operators.calls == CALLS[name]


def test_untouched_diffusers_models_are_taken_too() -> None:
    """The processor that SD3 has from diffusers comes back, too."""
    torch.manual_seed(0)
    model = SD3Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, num_layers=2, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=12, caption_projection_dim=16, pooled_projection_dim=6, out_channels=4,
        pos_embed_max_size=8, qk_norm="rms_norm",
    )  # fmt: skip
    inputs = {
        "hidden_states": torch.randn(1, 4, 8, 8),
        "encoder_hidden_states": torch.randn(1, 3, 12),
        "pooled_projections": torch.randn(1, 6),
        "timestep": torch.tensor([500.0]),
    }
    processors = {key: type(value) for key, value in model.attn_processors.items()}
    before = run((model, inputs))
    assert error(run((use_fused_kernels(model, enabled=True), inputs)), before) < TOLERANCE
    use_fused_kernels(model, enabled=False)
    assert {key: type(value) for key, value in model.attn_processors.items()} == processors


def test_products_in_low_precision_between_float32(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As close to float32 as the eager model in the same mixed precision; nothing is cast on its own on the way.

    float16 stands for bfloat16, which the interpreter truncates where a GPU rounds.
    """
    monkeypatch.setattr(precision, "LOW", torch.float16)
    model, inputs = BUILD[name]()
    exact = run((model, inputs))
    blocks = "*transformer_blocks.*"
    lowered = precision.lower_(
        model, [f"{blocks}.{part}" for part in ("attn", "attn2", "ff", "ff_context", "proj_mlp", "proj_out")]
    )
    assert lowered
    eager = error(run((model, inputs)), exact)
    use_fused_kernels(model, enabled=True)
    seen: Counter[torch.dtype] = Counter()
    for linear in (module for module in model.modules() if isinstance(module, nn.Linear)):
        linear.register_forward_hook(lambda *_, linear=linear: seen.update([linear.weight.dtype]))
    monkeypatch.setattr(precision.Lowered, "forward", _never)
    fused = error(run((model, inputs)), exact)
    assert seen[torch.float16] >= 12
    assert fused < 1.5 * eager < 2e-4


def _never(*args: object) -> None:
    raise AssertionError("casts around a product")
