"""What a build log says of an engine. Logs of real builds are read in test_tensorrt_build.py."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from engines.errors import ExportError
from engines.tensorrt_report import Attention, Report, read_log

LISTING = """Layers:
Name: __mye1_0_myl0_0, LayerType: shape_call, Inputs: [], Outputs: []
Name: __myl_FcAddSilu_myl0_1, LayerType: runtime_fusion, Inputs: [ { Name: pooled, Dimensions: [-1,64] }]
Name: __mye2_myl0_2, LayerType: signal, Inputs: []
Name: __mye3_myl0_3, LayerType: wait, Inputs: []
Name: _gemm_mha_v2_myl0_4, LayerType: kgen, Inputs: [ { Name: mha_input, Dimensions: [-1,-1,64] }]
Name: __myl_MulMulMulAddMulTanhAddMul_myl0_5, LayerType: kgen, Inputs: []
Name: node_linear_19+node_linear_6_myl0_6, LayerType: gemm, Inputs: []

I/O Tensors:
 Name: x, IOMode: Input, DataType: Float"""

REPORT = Report(
    component="denoiser",
    precision="bf16",
    target="8.9",
    onnx_bytes=10,
    engine_bytes=20,
    scratch_bytes=50_000_000,
    unfused_bytes=20_000_000,
    attentions=3,
    fusable=2,
    fused=2,
    kernels=4,
    activations=2,
    activations_in_products=1,
    build_s=1.5,
)


def test_kernels_are_counted_without_those_that_do_no_work() -> None:
    log = ["Max Scratch Memory: 10634752 bytes", LISTING, "Max Scratch Memory: 5 bytes"]
    assert read_log(log) == {
        "scratch_bytes": 10634752,
        "kernels": 4,
        "fused": 1,
        "activations": 2,
        "activations_in_products": 1,
    }


def test_a_log_without_a_listing_leaves_the_kernels_unknown() -> None:
    assert read_log(["Max Scratch Memory: 7 bytes"])["kernels"] is None


def test_an_unfused_attention_writes_scores_and_probabilities() -> None:
    assert Attention(4, 8, 1044, 1050, 2).unfused_bytes == 2 * 4 * 8 * 1044 * 1050 * 2


@pytest.mark.parametrize(
    ("head", "fusable"),
    [(8, False), (16, True), (64, True), (256, True), (264, False), (512, False), (None, True)],
)
def test_heads_have_a_kernel_from_16_to_256(head: int | None, fusable: bool) -> None:
    assert Attention(1, 1, 2, 2, 2, head).fusable is fusable


@pytest.mark.parametrize(
    ("changes", "fell_apart"),
    [
        ({}, 0),
        ({"fused": 1}, 1),
        ({"fused": 0}, 2),
        ({"fused": 0, "scratch_bytes": 19_999_999}, 0),
        ({"fused": 0, "fusable": 0, "unfused_bytes": 0}, 0),
        ({"kernels": None, "fused": 0}, 2),
        ({"kernels": None, "fused": 0, "scratch_bytes": 19_999_999}, 0),
    ],
    ids=["fused", "one", "all", "no room for it", "too wide", "no listing", "no listing, no room"],
)
def test_attention_fell_apart_where_kernels_are_missing_and_memory_leaves_room(
    changes: dict[str, Any], fell_apart: int
) -> None:
    assert replace(REPORT, **changes).fell_apart == fell_apart


def test_the_check_says_how_many_and_what_gave_it_away() -> None:
    REPORT.require_attention("denoiser")
    with pytest.raises(ExportError) as error:
        replace(REPORT, fused=1, precision="f32").require_attention("denoiser")
    assert str(error.value) == (
        "denoiser (f32, 8.9): 1 of 3 attentions are not one kernel (scratch memory 50.0 MB, where one of them unfused "
        "takes 20.0 MB); build the bfloat16 graph, in which TensorRT fuses them"
    )


def test_a_table_says_what_was_fused() -> None:
    row = REPORT.row()
    assert row["attentions fused"] == "2 of 3 (1 cannot be)"
    assert row["activations in products"] == "1 of 2"
    assert replace(REPORT, attentions=0, fusable=0).row()["attentions fused"] == "none there"


def test_a_report_comes_back_as_it_was_written_and_another_versions_does_not() -> None:
    assert Report.from_json(REPORT.to_json()) == REPORT
    assert Report.from_json(b'{"component": "denoiser"}') is None
    assert Report.from_json(b"\xff") is None
