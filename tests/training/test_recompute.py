"""Gradient checkpointing changes what is kept, and nothing that is computed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from engines.families.base import Family
from tests.folders import FOLDERS
from tests.training.family_cases import CASES, adapted, load, velocity
from training.lora import Adapters
from training.recompute import recompute_blocks


@pytest.fixture(scope="module", params=CASES)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return FOLDERS[request.param](tmp_path_factory.mktemp("base") / request.param)


def taken(
    family: Family, forward: Callable[[], Tensor], between: Callable[[], object]
) -> tuple[dict[str, Tensor], int]:
    """Gradients by parameter name, and bytes of what the forward kept that is no parameter."""
    known = {parameter.data_ptr() for parameter in family.transformer.parameters()}
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        if tensor.data_ptr() not in known:
            kept[tensor.data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        v = forward()
    between()
    v.square().mean().backward()
    found = {}
    for name, parameter in family.transformer.named_parameters():
        if parameter.grad is not None:
            found[name], parameter.grad = parameter.grad, None
    return found, sum(kept.values())


def require_equal(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert found.keys() == wanted.keys()
    assert wanted
    for name, value in wanted.items():
        assert torch.equal(found[name], value), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_of_every_weight(folder: Path, dtype: torch.dtype) -> None:
    """LongCat's time goes in by way of hooks that are gone when a block is recomputed: it is outside of the blocks."""
    family = load(folder, dtype)
    family.transformer.requires_grad_(True)

    def forward() -> Tensor:
        return velocity(family, family.transformer)

    wanted, whole = taken(family, forward, int)
    assert any(name.startswith("time_") for name in wanted)
    recompute_blocks(family.transformer)
    found, less = taken(family, forward, int)
    require_equal(found, wanted)
    assert less < whole / 4


def forward_of(family: Family, adapters: Adapters, adapter: str | None) -> Tensor:
    with adapters.active(adapter):
        return velocity(family, family.transformer)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_of_an_adapter_with_other_networks_in_between(folder: Path, dtype: torch.dtype) -> None:
    """The gradient is taken while no adapter, or another, is in force: blocks are recomputed with their own."""
    family = load(folder, dtype)
    adapters = adapted(family, dtype)

    @torch.no_grad()
    def teachers() -> None:
        forward_of(family, adapters, None), forward_of(family, adapters, "fake")

    wanted, whole = taken(family, lambda: forward_of(family, adapters, "student"), teachers)
    recompute_blocks(family.transformer, adapters)
    for between in (None, "fake"):
        with adapters.active(between):
            found, less = taken(family, lambda: forward_of(family, adapters, "student"), teachers)
        require_equal(found, wanted)
        assert adapters.current is None
        assert less < whole / 4
