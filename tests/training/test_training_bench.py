"""`cdm-bench training`: what its ways compute and hold. Times are no test's."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.main import main


def rows(capsys: pytest.CaptureFixture[str], teacher: Path, *flags: str) -> dict[str, dict[str, Any]]:
    small = ["--teacher", str(teacher), "--batch", "2", "--n-max", "4", "--rounds", "2"]
    assert main(["training", *small, *flags]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert all(len(taken) == 2 for taken in found["seconds"].values())  # the first pair warms up
    return {row["way"]: row for row in found["rows"]}


def test_the_authors_schedule_has_more_passes_and_a_shared_rollout_fewer(tiny_model, capsys):
    found = rows(capsys, tiny_model)
    passes = {way: row["passes per sample and student step"] for way, row in found.items()}
    assert passes["ours, shared rollout"] < passes["ours"] < passes["authors' passes"]
    assert passes["authors' passes"] == passes["authors' passes, torch's kernels"]
    assert {row["total time, to ours"] for way, row in found.items() if way == "ours"} == {1}


def test_each_saving_is_taken_back_alone(tiny_model, capsys):
    found = rows(capsys, tiny_model, "--savings")
    passes = {way: row["passes per sample and student step"] for way, row in found.items()}
    held = {way: row["networks and state, MB"] for way, row in found.items()}
    ours = passes.pop("ours")
    assert passes.pop("a student forward for each term") == ours + 3  # one more pass with gradient
    assert passes.pop("rollouts to their end") > ours
    assert set(passes.values()) == {ours}  # the others make a pass cheaper, not rarer
    lora = held.pop("LoRA roles of rank 16 on one base")
    assert len(set(held.values())) == 1
    assert lora < held["ours"] / 3
