"""Laws of the adapters: three networks on one base, whose graphs and weights do not disturb each other."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from engines.families.base import Family
from tests.folders import FOLDERS
from tests.training.family_cases import CASES, SIZES, adapted, load, velocity
from training.errors import TrainingError
from training.lora import Adapters, Size, add_adapters, fold


@pytest.fixture(scope="module", params=CASES)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return FOLDERS[request.param](tmp_path_factory.mktemp("base") / request.param)


@pytest.fixture
def family(folder: Path) -> Family:
    return load(folder)


@torch.no_grad()
def computed(family: Family, adapters: Adapters, adapter: str | None) -> Tensor:
    with adapters.active(adapter):
        return velocity(family, family.transformer)


@pytest.mark.parametrize("targets", ["attention", "attention+ff"])
def test_every_block_is_adapted_and_nothing_else(family, targets):
    """All linear layers that stand in a block, but for modulation; "attention" leaves out those of no attention."""
    linear = [name for name, module in family.transformer.named_modules() if isinstance(module, nn.Linear)]
    wanted = [name for name in linear if "transformer_blocks." in name and ".norm" not in name]
    if targets == "attention":
        wanted = [name for name in wanted if ".attn" in name]
    adapters = add_adapters(family.transformer, SIZES, family.lora_targets[targets], torch.float32, 0)
    assert sorted(adapters.layers) == sorted(wanted)
    blocks = sum(len(part) for name, part in family.transformer.named_children() if name.endswith("blocks"))
    assert len({layer.partition(".attn")[0] for layer in adapters.layers if ".attn" in layer}) == blocks


def test_all_three_networks_begin_as_the_base(family):
    with torch.no_grad():
        plain = velocity(family, family.transformer)
    adapters = add_adapters(family.transformer, SIZES, family.lora_targets["attention+ff"], torch.float32, 0)
    for adapter in (None, "student", "fake"):
        assert torch.equal(computed(family, adapters, adapter), plain), adapter


def test_first_factors_depend_on_the_seed_and_rank_alone(folder):
    def first(sizes: dict[str, Size], seed: int, adapter: str, dtype: torch.dtype) -> dict[str, Tensor]:
        family = load(folder, dtype)
        torch.manual_seed(seed + 1)  # nothing of it comes from torch's own state
        state = torch.get_rng_state()
        found = add_adapters(family.transformer, sizes, family.lora_targets["attention"], dtype, seed)
        assert torch.equal(torch.get_rng_state(), state)
        return {name: factor.detach() for name, factor in found.parameters(adapter).items()}

    both = {"student": Size(4, 1.0), "fake": Size(4, 8.0)}
    student = first(both, 3, "student", torch.float32)
    for other in (
        first(both, 3, "fake", torch.float32),
        first({"fake": Size(4, 2.0)}, 3, "fake", torch.float32),
    ):
        assert all(torch.equal(other[name], factor) for name, factor in student.items())
    rounded, reseeded = first(both, 3, "student", torch.bfloat16), first(both, 4, "student", torch.float32)
    for name, factor in student.items():
        assert torch.equal(rounded[name], factor.bfloat16())
        assert torch.equal(reseeded[name], factor) == (".lora_B." in name)


def test_the_active_adapter_is_put_back_whatever_happens(family):
    adapters = adapted(family)
    student, fake, teacher = (computed(family, adapters, adapter) for adapter in ("student", "fake", None))
    assert all((a - b).abs().max() > 0.1 for a, b in ((student, fake), (fake, teacher), (teacher, student)))
    with adapters.active("student"):
        with pytest.raises(ZeroDivisionError), adapters.active(None):
            _ = 1 / 0
        assert adapters.current == "student"
        assert torch.equal(computed(family, adapters, "fake"), fake)
        with torch.no_grad():
            assert torch.equal(velocity(family, family.transformer), student)
    with torch.no_grad():
        assert torch.equal(velocity(family, family.transformer), teacher)


def gradients(adapters: Adapters, adapter: str) -> dict[str, Tensor | None]:
    """And clear them."""
    found = {}
    for name, factor in adapters.parameters(adapter).items():
        found[name], factor.grad = factor.grad, None
    return found


def test_passes_of_other_networks_leave_a_graph_alone(family):
    adapters = adapted(family)
    with adapters.active("student"):
        velocity(family, family.transformer).square().sum().backward()
    wanted = gradients(adapters, "student")
    with adapters.active("student"):
        v = velocity(family, family.transformer)
    computed(family, adapters, None), computed(family, adapters, "fake")
    with adapters.active("fake"):
        v_fake = velocity(family, family.transformer)
    v.square().sum().backward()
    got = gradients(adapters, "student")
    assert all((got[name] is None) == (value is None) for name, value in wanted.items())
    assert all(torch.equal(got[name], value) for name, value in wanted.items() if value is not None)
    assert all(value is None for value in gradients(adapters, "fake").values())
    v_fake.square().sum().backward()
    assert any(value is not None for value in gradients(adapters, "fake").values())
    assert all(parameter.grad is None for parameter in adapters.base().values())


def test_every_layers_factors_are_computed_with(family):
    """None is bypassed by an attention that reads weights; only the last text query of SD3 is nobody's."""
    adapters = adapted(family)
    with adapters.active("student"):
        velocity(family, family.transformer).square().sum().backward()
    dead = [
        name for name, value in gradients(adapters, "student").items() if value is None or not value.any()
    ]
    last = "transformer_blocks.1.attn.add_q_proj"
    assert dead == ([f"{last}.lora_A.weight", f"{last}.lora_B.weight"] if family.name == "sd3" else [])


def test_merged_weights_are_the_adapted_network(folder, family):
    plain = load(folder)
    adapters = adapted(family)
    merged = fold(adapters.base(), adapters.parameters("student"), adapters.sizes["student"].scale)
    assert merged.keys() == dict(plain.transformer.named_parameters()).keys()
    assert all(weight.dtype == torch.float32 for weight in merged.values())
    plain.transformer.load_state_dict(merged, strict=False)
    with torch.no_grad():
        v = velocity(plain, plain.transformer)
    torch.testing.assert_close(v, computed(family, adapters, "student"), atol=1e-5, rtol=1e-5)
    base = load(folder).transformer.state_dict()
    assert all(torch.equal(weight, base[name]) for name, weight in adapters.base().items())  # as before


def test_bfloat16_adapters_round_and_no_more(folder, family):
    adapters, half = adapted(family), load(folder, torch.bfloat16)
    rounded = adapted(half, torch.bfloat16)
    assert {value.dtype for value in rounded.parameters("student").values()} == {torch.bfloat16}
    exact, plain = computed(family, adapters, "student"), computed(family, adapters, None)
    found = computed(half, rounded, "student")
    assert (found - exact).norm() < 0.1 * (plain - exact).norm()


def test_a_role_that_is_fully_trained_has_a_copy_and_the_base_stays_the_teacher(family):
    """Student by LoRA beside a whole fake teacher; the other way round is the same with the names changed."""
    fake = copy.deepcopy(family.transformer).requires_grad_(True)
    adapters = add_adapters(
        family.transformer, {"student": SIZES["student"]}, family.lora_targets["attention"], torch.float32, 0
    )
    teacher = computed(family, adapters, None)
    with adapters.active("student"):
        v = velocity(family, family.transformer)
    velocity(family, fake).square().sum().backward()  # no adapter is asked for
    with torch.no_grad():
        for parameter in fake.parameters():
            if parameter.grad is not None:
                parameter -= 0.01 * parameter.grad.sign()
        assert not torch.equal(velocity(family, fake), teacher)
    assert torch.equal(computed(family, adapters, None), teacher)
    v.square().sum().backward()
    assert any(factor.grad is not None for factor in adapters.parameters("student").values())


def test_a_rank_that_no_layer_has_is_refused(family):
    with pytest.raises(
        TrainingError,
        match=r"--fake-rank=999 is more than the layer transformer_blocks\.0\S+ \(\d+, \d+\) has",
    ):
        add_adapters(
            family.transformer, {"fake": Size(999, 1.0)}, family.lora_targets["attention"], torch.float32, 0
        )
