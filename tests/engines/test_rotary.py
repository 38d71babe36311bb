"""LongCat's rotary rewrites are the same function: tables bit for bit, halves up to the order of a sum."""

from __future__ import annotations

import copy

import pytest
import torch
from diffusers import LongCatImageTransformer2DModel
from diffusers.models.transformers import transformer_longcat_image
from diffusers.models.transformers.transformer_longcat_image import LongCatImagePosEmbed
from torch import Tensor, nn

from engines.export.precision import lower_
from engines.families.longcat import LongCatFamily
from engines.families.rotary import (
    POSITIONS,
    RotaryTables,
    Rotation,
    attentions,
    fuse_projections,
    use_rotate_half,
    use_tables,
)

TEXT, IMAGE = 5, 12


@pytest.fixture(scope="module")
def transformer() -> LongCatImageTransformer2DModel:
    torch.manual_seed(0)
    model = LongCatImageTransformer2DModel(
        in_channels=8, num_layers=2, num_single_layers=2, attention_head_dim=16, num_attention_heads=3,
        joint_attention_dim=12, pooled_projection_dim=12, axes_dims_rope=[4, 6, 6],
    )  # fmt: skip
    with torch.no_grad():
        for name, weights in model.named_parameters():
            if (
                ".norm_" in name and name.endswith("weight") and weights.ndim == 1
            ):  # 1 each would hide their order
                weights.copy_(torch.linspace(0.5, 2.0, weights.numel()))
    return model.eval()


def _inputs(dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    random = torch.Generator().manual_seed(1)
    place = torch.arange(TEXT)
    return {
        "hidden_states": torch.randn((2, IMAGE, 8), generator=random).to(dtype),
        "encoder_hidden_states": torch.randn((2, TEXT, 12), generator=random).to(dtype),
        "timestep": torch.tensor([0.9, 0.3], dtype=dtype),
        "txt_ids": torch.stack([torch.zeros(TEXT), place, place], dim=-1),
        "img_ids": torch.cat(
            [torch.ones(IMAGE, 1), torch.randint(512, 900, (IMAGE, 2), generator=random)], dim=-1
        ),
    }


def test_tables_equal_diffusers_angles_to_the_last_bit() -> None:
    angles = LongCatImagePosEmbed(theta=10000, axes_dim=[16, 56, 56])
    random = torch.Generator().manual_seed(0)
    ids = torch.randint(0, POSITIONS, (500, 3), generator=random).float()
    ids[0] = POSITIONS - 1
    for mine, theirs in zip(RotaryTables(angles)(ids), angles(ids), strict=True):
        assert mine.dtype == torch.float32
        assert torch.equal(mine, theirs)


@torch.no_grad()
@pytest.mark.parametrize("tables", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rotated_halves_are_the_same_function(
    transformer: LongCatImageTransformer2DModel, dtype: torch.dtype, tables: bool
) -> None:
    model = nn.Module.to(copy.deepcopy(transformer), dtype)
    expected = model(**_inputs(dtype), return_dict=False)[0]
    if tables:
        use_tables(model)
        assert torch.equal(model(**_inputs(dtype), return_dict=False)[0], expected)
    use_rotate_half(model)
    got = model(**_inputs(dtype), return_dict=False)[0]
    # Rotations are the same float32 numbers in another order; only sums over a head are added up differently.
    assert float((got - expected).norm() / expected.norm()) < (1e-5 if dtype == torch.float32 else 1e-13)


@torch.no_grad()
@pytest.mark.parametrize("halves", [True, False])
def test_fused_projections_are_the_same_function_in_fewer_weights(
    transformer: LongCatImageTransformer2DModel, halves: bool
) -> None:
    model = nn.Module.to(copy.deepcopy(transformer), torch.float64)
    expected = model(**_inputs(torch.float64), return_dict=False)[0]
    if halves:
        use_rotate_half(model)
    fuse_projections(model)
    got = model(**_inputs(torch.float64), return_dict=False)[0]
    assert float((got - expected).norm() / expected.norm()) < 1e-13
    assert sum(p.numel() for p in model.parameters()) == sum(p.numel() for p in transformer.parameters())
    products = {
        name.rsplit(".", 1)[-1] for name, module in model.named_modules() if isinstance(module, nn.Linear)
    }
    assert {"to_qkv", "to_added_qkv"} <= products
    assert not {"to_q", "to_v", "add_k_proj"} & products


def test_positions_matter(transformer: LongCatImageTransformer2DModel) -> None:
    """What the other tests compare would be equal anyway, did nothing depend on the angles."""
    moved = _inputs()
    moved["img_ids"] = moved["img_ids"].flip(0)
    with torch.no_grad():
        here, there = (transformer(**inputs, return_dict=False)[0] for inputs in (_inputs(), moved))
    assert float((here - there).norm() / here.norm()) > 1e-2


@torch.no_grad()
@pytest.mark.parametrize("tables", [True, False])
def test_angles_stay_float32_where_no_rewrite_carries_them(
    transformer: LongCatImageTransformer2DModel, monkeypatch: pytest.MonkeyPatch, tables: bool
) -> None:
    """`--skip-rewrites rotate_half`: diffusers hands them over as a tuple."""
    model = copy.deepcopy(transformer)
    if tables:
        use_tables(model)
    lower_(model, LongCatFamily.low_precision(None))  # type: ignore[arg-type]
    seen: list[torch.dtype] = []
    apply = transformer_longcat_image.apply_rotary_emb

    def watched(states: Tensor, angles: tuple[Tensor, Tensor], **more: object) -> Tensor:
        seen.extend([states.dtype, *(table.dtype for table in angles)])
        return apply(states, angles, **more)

    monkeypatch.setattr(transformer_longcat_image, "apply_rotary_emb", watched)
    model(**_inputs(), return_dict=False)
    assert seen == [torch.bfloat16, torch.float32, torch.float32] * 2 * len(list(attentions(model)))


@torch.no_grad()
def test_angles_stay_float32_in_a_lowered_attention(
    transformer: LongCatImageTransformer2DModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = copy.deepcopy(transformer)
    expected = model(**_inputs(), return_dict=False)[0]
    use_tables(model)
    use_rotate_half(model)
    lower_(model, LongCatFamily.low_precision(None))  # type: ignore[arg-type]
    seen: list[torch.dtype] = []
    rotate = Rotation.__call__

    def watched(self: Rotation, states: Tensor) -> Tensor:
        rotated = rotate(self, states)
        seen.extend([states.dtype, self.cos.dtype, self.sin.dtype, rotated.dtype])
        return rotated

    monkeypatch.setattr(Rotation, "__call__", watched)
    got = model(**_inputs(), return_dict=False)[0]
    low, full = torch.bfloat16, torch.float32
    assert seen == [low, full, full, low] * 2 * len(list(attentions(model)))
    assert 1e-4 < float((got - expected).norm() / expected.norm()) < 2e-2
