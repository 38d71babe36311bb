"""`cdm-bench tensorrt` builds a bundle for GPUs that are not here, and says what came of it in one JSON line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

pytest.importorskip("tensorrt_rtx")

from benchmarks.tensorrt import TensorRTBenchSettings, run
from engines.bundle import Bundle
from engines.errors import RuntimeUnavailable


def test_every_component_is_built_kept_and_listed(
    tiny_bundle: Bundle, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = TensorRTBenchSettings(bundle=tiny_bundle.root, max_batch=2, cache_dir=tmp_path)
    assert run(settings) == 0
    line = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert line["benchmark"] == "tensorrt"
    assert (line["bundle"], line["max_batch"], line["sizes"]) == (
        tiny_bundle.manifest.name,
        2,
        ["64x64", "80x48"],
    )
    assert [row["component"] for row in line["rows"]] == list(tiny_bundle.manifest.components)
    denoiser = line["rows"][-2]
    assert (denoiser["precision"], denoiser["target"], denoiser["attentions fused"]) == (
        "bf16",
        "8.9",
        "2 of 2",
    )
    assert min(denoiser[column] for column in ("ONNX MB", "engine MB", "scratch MB", "kernels")) > 0
    assert len(list(tmp_path.rglob("*.blob"))) == 2 * len(line["rows"])


def test_a_capability_that_is_no_target_is_refused(tiny_bundle: Bundle) -> None:
    with pytest.raises(RuntimeUnavailable, match=r"9\.0 is no target"):
        run(TensorRTBenchSettings(bundle=tiny_bundle.root, capabilities=["9.0"]))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"capabilities": ["8.9"]}, r"--capabilities means nothing with --plans"),
        ({"cache_dir": Path("cache")}, r"--cache-dir means nothing with --plans"),
        ({"precisions": ["bf16", "f32"]}, r"--plans is a folder of one precision, not of bf16, f32"),
    ],
)
def test_plans_are_of_one_precision_for_the_gpu_here(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        TensorRTBenchSettings(bundle=Path("bundle"), plans=Path("plans"), **given)
