"""An export holds the weights of one component once: no copy in the graph, nothing kept when it is written."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from onnx import numpy_helper
from torch import Tensor, nn

from engines.export.graphs import DenoiserGraph
from engines.export.memory import free
from engines.export.onnx_file import OPSET, GraphModule, save_model, to_onnx
from engines.export.precision import LOW, raise_
from engines.families.base import Family, load_family

LARGE = 1000
"""Elements; what is smaller may be copied."""


class TwoProducts(GraphModule):
    """One weight used as it is and transposed, another transposed twice: what graphs do with weights."""

    inputs = ("x",)
    outputs = ("y",)

    def __init__(self) -> None:
        super().__init__()
        self.axes = {"x": {0: "batch"}, "y": {0: "batch"}}
        random = torch.Generator().manual_seed(0)
        self.weights = nn.Module()
        self.shared = nn.Parameter(torch.randn(48, 48, generator=random))
        self.linear = nn.Linear(48, 64)

    def forward(self, x: Tensor) -> tuple[Tensor]:
        return (self.linear(x @ self.shared) + self.linear(x @ self.shared.T),)


def storages(model: ir.Model) -> set[int]:
    tensors = [value.const_value for value in model.graph.initializers.values()]
    raws = [tensor.raw for tensor in tensors if isinstance(tensor, ir.Tensor) and tensor.size >= LARGE]
    assert raws
    assert all(isinstance(raw, Tensor) for raw in raws)
    return {raw.untyped_storage().data_ptr() for raw in raws if isinstance(raw, Tensor)}


def test_transposed_weights_are_right_in_the_file_and_copied_nowhere_before(tmp_path: Path) -> None:
    module = TwoProducts().eval()
    model = to_onnx(module, {"x": torch.randn(2, 5, 48)}, OPSET["float32"])
    assert storages(model) == {weight.data_ptr() for weight in (module.shared, module.linear.weight)}
    save_model(tmp_path, "twice", model)
    written = onnx.load(tmp_path / "twice.onnx").graph.initializer
    arrays = [numpy_helper.to_array(tensor) for tensor in written]
    for expected in (module.shared, module.shared.T, module.linear.weight.T):
        found = [np.array_equal(array, expected.detach().numpy()) for array in arrays]
        assert sum(found) == 1


@pytest.fixture(scope="module")
def family(student: Path) -> Family:
    family = load_family(student)
    family.fuse()
    return family


def test_a_denoisers_graph_holds_the_modules_own_memory(family: Family) -> None:
    prompt = family.tokenize(["an apple", "a pear"])
    conditioning: dict[str, Tensor] = {}
    for encoder in family.text_encoders():
        with torch.no_grad():
            outputs = encoder.module(prompt[encoder.input])
        conditioning |= dict(zip(encoder.outputs, outputs, strict=True))
    module = DenoiserGraph(family, {name: {0: "batch"} for name in conditioning})
    height, width = family.latent_size
    example = {
        "x": torch.randn(2, family.latent_channels, height, width),
        "sigma": torch.tensor([1.0, 0.5]),
        "sigma_next": torch.tensor([0.5, 0.2]),
        **conditioning,
    }
    model = to_onnx(module, example, OPSET["float32"])
    own = {tensor.data_ptr() for tensor in (*module.parameters(), *module.buffers())}
    assert len(storages(model)) > 10
    assert storages(model) <= own


def test_fused_attention_gives_the_separate_projections_up(family: Family) -> None:
    names = {name for name, _ in family.transformer.named_parameters()}
    assert any("to_qkv" in name for name in names)
    assert not [name for name in names if ".to_q." in name or ".add_k_proj." in name]


def test_freed_memory_is_free_whoever_still_refers_to_it() -> None:
    tensor = torch.randn(8, 8)
    kept = tensor.T
    free([tensor])
    assert kept.untyped_storage().nbytes() == 0
    seen = torch.randn(8, 8)
    array = seen.numpy()
    before = array.copy()
    free([seen])
    assert seen.numel() == 0
    assert np.array_equal(array, before)


def test_raised_weights_keep_their_rounding_and_free_what_they_were() -> None:
    module = nn.Linear(32, 32).to(LOW)
    low, expected = module.weight.data, module.weight.detach().float()
    raise_(module)
    assert torch.equal(module.weight, expected)
    assert module.bias.dtype == torch.float32
    assert low.untyped_storage().nbytes() == 0
