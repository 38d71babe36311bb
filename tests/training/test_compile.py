"""Compiled blocks compute what they did, with gradients and with whichever adapter is in force."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters

from engines.families.base import Family
from tests.folders import FOLDERS
from tests.training.family_cases import adapted, load, velocity
from training.compile import compile_blocks
from training.lora import Adapters
from training.recompute import recompute_blocks

pytestmark = pytest.mark.filterwarnings(
    "ignore:The .grad attribute of a Tensor that is not a leaf"  # torch's compiler looks at everything
)


@pytest.fixture(autouse=True)
def forget() -> None:
    """Nothing compiled by one test serves another."""
    torch._dynamo.reset()
    counters.clear()


def step(family: Family, adapters: Adapters) -> tuple[Tensor, dict[str, Tensor]]:
    """v of all three networks one after another, and the student's gradients."""
    with adapters.active("student"):
        v = velocity(family, family.transformer)
    with torch.no_grad():
        others = [velocity(family, family.transformer)]
        with adapters.active("fake"):
            others.append(velocity(family, family.transformer))
    v.square().mean().backward()
    found = {}
    for name, factor in adapters.parameters("student").items():
        if factor.grad is not None:
            found[name], factor.grad = factor.grad.float(), None
    return torch.stack([v.detach(), *others]), found


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sd35-medium", "longcat"])
def test_blocks_are_captured_whole_and_nothing_changes(name: str, tmp_path: Path) -> None:
    """Without the compiler behind, which takes minutes and only rounds: what torch captures is what it would get."""
    family = load(FOLDERS[name](tmp_path / name))
    adapters = adapted(family)
    v, gradients = step(family, adapters)
    compile_blocks(family.transformer, family.fsdp_units, backend="aot_eager")
    for recomputed in (False, True):
        if recomputed:
            recompute_blocks(family.transformer, adapters)
        for _ in range(2):
            found, found_gradients = step(family, adapters)
            torch.testing.assert_close(found, v, atol=1e-5, rtol=1e-5)
            assert found_gradients.keys() == gradients.keys()
            for key, value in gradients.items():
                torch.testing.assert_close(found_gradients[key], value, atol=1e-5, rtol=1e-4, msg=key)
    assert not counters["graph_break"], counters["graph_break"]
    kinds = {type(module).__name__ for module in family.transformer.modules()} & set(family.fsdp_units)
    assert counters["stats"]["unique_graphs"] >= 3 * len(kinds)  # each role has its own


def test_a_copy_is_not_compiled(tmp_path: Path) -> None:
    family = load(FOLDERS["longcat"](tmp_path / "longcat"))
    compile_blocks(family.transformer, family.fsdp_units, backend="aot_eager")
    other = copy.deepcopy(family.transformer)
    with torch.no_grad():
        velocity(family, other)
        assert not counters["stats"]
        velocity(family, family.transformer)
    assert counters["stats"]["unique_graphs"] > 0


@pytest.mark.slow
def test_compiler_itself_keeps_gradients(tmp_path: Path) -> None:
    family = load(FOLDERS["longcat"](tmp_path / "longcat"))
    v = velocity(family, family.transformer.requires_grad_(True))
    v.square().mean().backward()
    plain = {name: parameter.grad for name, parameter in family.transformer.named_parameters()}
    family.transformer.zero_grad()
    compile_blocks(family.transformer, ("LongCatImageSingleTransformerBlock",))
    compiled = velocity(family, family.transformer)
    compiled.square().mean().backward()
    torch.testing.assert_close(compiled, v, atol=1e-5, rtol=1e-5)
    for name, parameter in family.transformer.named_parameters():
        torch.testing.assert_close(parameter.grad, plain[name], atol=1e-5, rtol=1e-4, msg=name)
    assert counters["stats"]["unique_graphs"] == 1
