"""`cdm-bench invariance` on the bundled model: grouped batches give equal bytes, and the command says so."""

from __future__ import annotations

import json

import pytest

from benchmarks.main import main

FLAGS = ["invariance", "--rounds", "1", "--steps", "2", "--batches", "1,3", "--groups", "2", "--threads", "1"]


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["onnxruntime", "openvino"])
def test_groups_give_equal_bytes(engine: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*FLAGS, "--engine", engine]) == 0
    line = json.loads(capsys.readouterr().out.splitlines()[-1])
    free, grouped = line["rows"]
    assert grouped["batches"] == "groups of 2"
    assert grouped["largest difference of 255"] == 0
    assert set(free) - set(grouped) == set()
    assert {key for key in grouped if "ratio" in key} == {"1, ratio", "3, ratio"}


def test_unknown_step_count_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*FLAGS, "--steps", "99"]) == 2
    assert "--steps=99" in capsys.readouterr().err
