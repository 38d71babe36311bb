"""Every kernel compiled to a cubin for every GPU generation, without a GPU; and what torch's compilers make of it."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from diffusers import SD3Transformer2DModel
from torch import Tensor, nn
from torch._inductor.graph import GraphLowering
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from engines.errors import RuntimeUnavailable
from engines.kernels import compile as kernels
from engines.kernels.gate_residual_norm import gate_residual_norm
from engines.kernels.layer_norm_modulate import layer_norm_modulate
from engines.kernels.qk_norm_rope import qk_norm_rope
from engines.kernels.switch import use_fused_kernels

KIB = 1024
OPERATORS = {"layer_norm_modulate", "gate_residual_norm", "qk_norm_rope"}


@pytest.fixture(scope="module", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Nothing is taken from an earlier run."""
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("triton")
        patch.setenv("TRITON_CACHE_DIR", str(folder))
        yield folder


@pytest.mark.parametrize("precision", kernels.PRECISIONS)
@pytest.mark.parametrize("architecture", kernels.ARCHITECTURES)
def test_kernels_compile_for(architecture: int, precision: str, own_cache: Path) -> None:
    """The widest launches: no register is spilled, shared memory is there, and nothing is computed in float64."""
    for case in kernels.CASES:
        if case.model != "LongCat":
            continue
        compiled = kernels.compile_case(case, precision, architecture)
        assert compiled.kernel == case.name
        assert compiled.cubin > 10_000
        assert 16 <= compiled.registers <= 128
        assert compiled.spilled == 0
        assert compiled.shared <= kernels.ARCHITECTURES[architecture] * KIB
    written = list(own_cache.rglob("*.ptx"))
    assert written
    for path in written:
        text = path.read_text()
        assert ".f64" not in text
        assert "st.global.v4.b32" in text, "16 bytes at a time"


def test_the_command_prints_a_table_and_one_json_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert kernels.main(["--architectures", "90"]) == 0
    *table, last = capsys.readouterr().out.splitlines()
    report = json.loads(last)
    assert len(report["kernels"]) == len(kernels.CASES) * len(kernels.PRECISIONS)
    assert len(table) == 3 + len(report["kernels"])
    assert {f"{name}_kernel" for name in OPERATORS} == {row["kernel"] for row in report["kernels"]}
    assert report["wrong"] == 0
    assert table[2].split()[-1] == "sm_90"
    one = report["kernels"][0]
    assert table[3].endswith(f"  {one['registers']} 0 {one['shared']}")


def test_the_command_fails_for_a_kernel_that_spills(monkeypatch: pytest.MonkeyPatch) -> None:
    row = kernels.Compiled("k", "m", "mixed", 90, warps=8, registers=255, spilled=16, shared=0, cubin=1)
    for wrong, code in (
        (row, 1),
        (row._replace(spilled=0), 0),
        (row._replace(spilled=0, shared=228 * KIB), 1),
    ):
        monkeypatch.setattr(kernels, "compile_all", lambda architectures, wrong=wrong: [wrong])
        assert kernels.main(["--architectures", "90"]) == code


def test_an_unknown_architecture_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        kernels.main(["--architectures", "90", "61"])
    assert "61" in capsys.readouterr().err


def test_the_interpreter_compiles_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "INTERPRETED", True)
    with pytest.raises(RuntimeUnavailable, match="TRITON_INTERPRET=1"):
        kernels.compile_case(kernels.CASES[0], "mixed", 90)


@torch.no_grad()
def test_export_keeps_the_kernels_as_operators_at_any_size() -> None:
    """What AOTInductor is given: exported here on the CPU, where the kernels could not run."""
    model: nn.Module = SD3Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, num_layers=2, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=12, caption_projection_dim=16, pooled_projection_dim=6, out_channels=4,
        pos_embed_max_size=8, qk_norm="rms_norm", dual_attention_layers=(0,),
    )  # fmt: skip
    use_fused_kernels(model.eval().requires_grad_(False), enabled=True)
    batch, length = torch.export.Dim("batch"), torch.export.Dim("length")
    inputs = {
        "hidden_states": torch.randn(2, 4, 8, 8),
        "encoder_hidden_states": torch.randn(2, 5, 12),
        "pooled_projections": torch.randn(2, 6),
        "timestep": torch.tensor([900.0, 20.0]),
    }
    sizes = {
        "hidden_states": {0: batch},
        "encoder_hidden_states": {0: batch, 1: length},
        "pooled_projections": {0: batch},
        "timestep": {0: batch},
    }
    graph = torch.export.export(model, (), inputs, dynamic_shapes=sizes).graph
    calls = Counter(str(node.target) for node in graph.nodes if "cdm." in str(node.target))
    assert calls == {
        "cdm.layer_norm_modulate.default": 5,
        "cdm.gate_residual_norm.default": 3,
        "cdm.qk_norm_rope.default": 3,
    }


class Lowered(BaseException):
    """Carries Inductor's program out of the compiler, before it would look for a device."""


class Hopper:
    """The driver of a GPU that is not there: as much of it as the compiler asks for."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)


@pytest.mark.filterwarnings("ignore:.*torch.jit.script_method.*:DeprecationWarning")  # Inductor's own
@torch.no_grad()
def test_inductor_launches_the_kernels_in_place(monkeypatch: pytest.MonkeyPatch) -> None:
    """No copy of an input or output around a launch, one buffer for both segments, and numbers stay float32.

    Inductor's Triton backend for CPUs stands for CUDA's, whose lowering of our kernels it shares.
    """

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rows = nn.Linear(32, 6 * 32)

        def forward(self, x: Tensor, temb: Tensor, h: Tensor, angles: Tensor) -> tuple[Tensor, ...]:
            shift, scale, gate, shift_mlp, scale_mlp, _ = self.rows(temb).chunk(6, dim=1)
            y = layer_norm_modulate([x[:, :3], x[:, 3:]], scale, shift, eps=1e-6, dtype=torch.bfloat16)
            r, z = gate_residual_norm(x, gate, h, scale_mlp, shift_mlp, eps=1e-6, dtype=torch.bfloat16)
            q, k = (tensor.unflatten(-1, (4, 8)) for tensor in (y, z))
            weight = shift[0, :8]
            return r, *qk_norm_rope([q], [k], [weight], [weight], cos=angles, sin=angles, eps=1e-6)

    def stop(graph: GraphLowering) -> None:
        raise Lowered(codegen(graph)[0].value)

    codegen = GraphLowering.codegen
    monkeypatch.setattr(GraphLowering, "codegen", stop)
    monkeypatch.setattr(driver, "_active", Hopper())
    model = Model().requires_grad_(False)
    inputs = torch.randn(2, 7, 32), torch.randn(2, 32), torch.randn(2, 7, 32).bfloat16(), torch.randn(7, 4)
    torch._dynamo.reset()
    settings = {"cpu_backend": "triton", "compile_threads": 1, "fx_graph_cache": False}
    with pytest.raises(Lowered) as stopped:
        torch.compile(model, fullgraph=True, dynamic=True, options=settings)(*inputs)
    torch._dynamo.reset()
    program = str(stopped.value.args[0])
    body = program[program.index("def call(") :]
    launches = [line.split(".run(")[0].strip() for line in body.splitlines() if ".run(" in line]
    assert launches == [
        "layer_norm_modulate_kernel_0",
        "layer_norm_modulate_kernel_1",
        "gate_residual_norm_kernel_2",
        "qk_norm_rope_kernel_3",
    ]
    assert "fp64" not in program
