"""`cdm-bench steps`: every contender at every batch, ratios to ours, and pictures that show that all are one model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.main import main
from engines.bundle import Bundle


def measured(bundle: Bundle, student: Path, capsys: pytest.CaptureFixture[str], *more: str) -> dict[str, Any]:
    paths = ["--bundle", str(bundle.root), "--student", str(student), "--batches", "1,2", "--rounds", "2"]
    assert (
        main(["steps", *paths, "--threads", "1", "--contenders", "ours,onnxruntime-f32,diffusers-f32", *more])
        == 0
    )
    document: dict[str, Any] = json.loads(capsys.readouterr().out.splitlines()[-1])
    return document


@pytest.mark.parametrize("apart", [False, True])
def test_contenders_are_timed_at_every_batch(
    tiny_bundle: Bundle, tiny_student: Path, capsys: pytest.CaptureFixture[str], apart: bool
) -> None:
    found = measured(tiny_bundle, tiny_student, capsys, *(["--apart"] if apart else []))
    rows = found["rows"]
    assert [row["batch"] for row in rows] == [1, 1, 1, 2, 2, 2]
    for batch in (1, 2):
        ours, *others = [row for row in rows if row["batch"] == batch]
        assert ours["contender"].startswith("ours: ")
        assert ours["step, to ours"] == ours["request, to ours"] == 1
        for row in others:
            assert row["step, to ours"] == pytest.approx(row["step ms"] / ours["step ms"])
            assert row["request, to ours"] == pytest.approx(row["request ms"] / ours["request ms"])
        assert all(row["n"] == 2 for row in (ours, *others))
    # Of 255, in the mean: ours may be in bfloat16.
    assert set(found["max_difference"]) == {
        f"{name} at {batch}" for name in ("ours", "onnxruntime-f32", "diffusers-f32") for batch in (1, 2)
    }
    assert found["max_difference"]["onnxruntime-f32 at 2"] < 0.5
    assert found["max_difference"]["ours at 1"] < 5


def test_steps_alone_and_another_size(
    tiny_bundle: Bundle, tiny_student: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = measured(tiny_bundle, tiny_student, capsys, "--size", "80x48", "--no-pictures")
    assert found["size"] == {"width": 80, "height": 48}
    assert all("request ms" not in row for row in found["rows"])
    assert found["max_difference"] == {}


def test_wrong_input_is_one_sentence(
    tiny_bundle: Bundle, tiny_student: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    paths = ["--bundle", str(tiny_bundle.root), "--student", str(tiny_student)]
    for flag, told in (
        ("--size=7x7", "--size=7x7: the bundle makes 64x64, 80x48"),
        ("--steps=99", "--steps=99: the bundle has schedules for"),
        ("--contenders=genai", "ours must be among the contenders"),
    ):
        assert main(["steps", *paths, flag]) == 2
        assert told in capsys.readouterr().err
