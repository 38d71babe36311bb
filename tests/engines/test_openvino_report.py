"""The fusion report tells an attention that is one node from one that fell apart."""

from __future__ import annotations

import openvino as ov
import openvino.opset15 as ops
import pytest

from engines.base import EngineOptions
from engines.bundle import Bundle
from engines.errors import ExportError
from engines.openvino import OpenVINOEngine, core
from engines.openvino_report import FusionReport, fusion_report


@pytest.mark.parametrize("precision", ["f32", "bf16"])
def test_denoiser_fuses_attention_gelu_and_norms(bundle: Bundle, precision: str) -> None:
    engine = OpenVINOEngine(bundle, EngineOptions("openvino", precision, threads=1))
    report = engine.fusion_report("denoiser")
    assert (report.attentions, report.attentions_fused) == (2, 2)
    assert (report.gelus, report.gelus_in_products) == (3, 3)  # the last block has no text feed-forward
    assert report.rms == 7  # q and k of image and text; the last block needs no text query
    assert report.nodes["FullyConnected"] > 10
    report.require_attention("denoiser")
    engine.close()


def _attention(*, scores_leave: bool) -> FusionReport:
    """softmax(q·kᵀ)·v; where `scores_leave`, somebody else reads the scores too, and no single node can hold them."""
    q, k, v = (ops.parameter([1, 4, 64, 32], name=name, dtype=ov.Type.f32) for name in "qkv")
    scores = ops.softmax(ops.matmul(q, k, False, True), axis=-1)
    outputs = [ops.matmul(scores, v, False, False), *([ops.relu(scores)] if scores_leave else [])]
    model = ov.Model(outputs, [q, k, v], "attention")
    return fusion_report(core().compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"}), model)


def test_attention_that_falls_apart_is_refused_with_the_count() -> None:
    whole, apart = _attention(scores_leave=False), _attention(scores_leave=True)
    assert (whole.attentions, whole.attentions_fused) == (1, 1)
    assert (apart.attentions, apart.attentions_fused) == (1, 0)
    whole.require_attention("denoiser")
    with pytest.raises(ExportError, match=r"denoiser: 1 of 1 attentions fell apart.*--allow-unfused"):
        apart.require_attention("denoiser")
