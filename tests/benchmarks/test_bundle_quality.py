"""`cdm-bench bundle`: of the same noise come the same pictures, and the scores say so; with data and without."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.bundle_quality import psnr
from benchmarks.main import main
from engines.bundle import Bundle
from engines.export.verify import EQUAL_DB

DATA = Path(__file__).resolve().parents[2] / "data" / "emoji"


def measured(capsys: pytest.CaptureFixture[str], bundle: Bundle, student: Path, *more: str) -> dict[str, Any]:
    arguments = ["--bundle", str(bundle.root), "--student", str(student), "--prompts", "6", "--threads", "1"]
    assert main(["bundle", *arguments, "--steps", "2", "--batch", "4", *more]) == 0
    document: dict[str, Any] = json.loads(capsys.readouterr().out.splitlines()[-1])
    return document


@pytest.mark.slow
def test_a_bundle_paints_its_student_s_pictures(
    tiny_bundle: Bundle, tiny_student: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    engines = "openvino:bf16,onnxruntime:f32,tensorrt:bf16"
    found = measured(
        capsys, tiny_bundle, tiny_student, "--engines", engines, "--data", str(tmp_path / "none")
    )
    torch, bf16, f32 = found["rows"]
    assert [row["pictures of"] for row in found["rows"]] == [
        "torch float32",
        "openvino bf16",
        "onnxruntime f32",
    ]
    assert 40 < f32["PSNR min"] <= f32["PSNR mean"]
    assert 20 < bf16["PSNR min"] < f32["PSNR min"]
    assert torch["Fréchet to torch's"] == pytest.approx(0, abs=1e-3)
    assert 0 <= f32["Fréchet to torch's"] < bf16["Fréchet to torch's"]
    assert f32["own caption"] == pytest.approx(torch["own caption"], abs=0.01)
    assert (found["data"], found["steps"], found["prompts"]) == (False, 2, 6)
    assert list(found["scores_left_out"]) == ["alignment", "Fréchet"]
    assert "alignment" not in torch
    assert list(found["absent"]) == ["tensorrt:bf16"]


@pytest.mark.skipif(not DATA.is_dir(), reason="no dataset here: cdm-train emoji-data makes it")
def test_with_data_the_scores_are_those_of_an_evaluation(
    tiny_bundle: Bundle, tiny_student: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = measured(capsys, tiny_bundle, tiny_student, "--engines", "onnxruntime:f32", "--data", str(DATA))
    torch, f32 = found["rows"]
    assert (found["data"], found["scores_left_out"], found["choices"]) == (True, {}, 100)
    assert f32["alignment"] == torch["alignment"]
    assert f32["Fréchet"] == pytest.approx(torch["Fréchet"], rel=0.01)
    assert f32["Fréchet"] > 1  # random pictures, real ones


def test_psnr_is_of_one_picture_and_finite() -> None:
    black = np.zeros((4, 4, 3), np.uint8)
    assert psnr(black, black) == EQUAL_DB
    assert psnr(black + 255, black) == 0
    assert psnr(black + 1, black) == pytest.approx(48.13, abs=0.01)


def test_wrong_input_is_one_sentence(
    tiny_bundle: Bundle, tiny_student: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own = [
        "--bundle",
        str(tiny_bundle.root),
        "--student",
        str(tiny_student),
        "--data",
        str(tmp_path / "none"),
    ]
    for arguments, message in (
        ([*own, "--steps", "99"], "--steps=99: the bundle has schedules for"),
        ([*own, "--student", str(tmp_path)], "is not a diffusers folder"),
        ([*own, "--evaluator", str(tmp_path)], "is no readable evaluator"),
        ([*own, "--engines", "f32"], "'f32' is no engine"),
        ([*own, "--engines", "openvino:int8", "--prompts", "4"], "none of them runs here"),
        (["--bundle", "nowhere", "--student", str(tiny_student)], "nowhere is not a bundle"),
    ):
        assert main(["bundle", *arguments]) == 2
        (sentence,) = [text for text in capsys.readouterr().err.splitlines() if "error:" in text]
        assert message in sentence
