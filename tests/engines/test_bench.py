"""`cdm-bench engine` measures every contender and says so in one JSON line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.engine import EngineBenchSettings, run
from benchmarks.main import main
from engines.bundle import Bundle


def test_every_contender_is_timed_and_compared_in_one_json_line(
    bundle: Bundle, student: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = EngineBenchSettings(
        bundle=bundle.root, student=student, teacher=student, steps=[1, 4], rounds=3, teacher_rounds=1, threads=1,
        precision="f32", engine="openvino",
    )  # fmt: skip
    assert run(settings) == 0
    *table, line = capsys.readouterr().out.splitlines()
    document = json.loads(line)
    names = ("bundle openvino f32", "diffusers float32", "diffusers bfloat16")
    students = {(name, steps, steps, 3) for name in names for steps in (1, 4)}
    teachers = {("teacher float32", 50, 100, 1), ("teacher bfloat16", 50, 100, 1)}
    found = {(row["contender"], row["steps"], row["NFE"], row["n"]) for row in document["rows"]}
    assert found == students | teachers
    assert len(table) == 2 + len(found)
    for row in document["rows"]:
        base = next(
            other for other in document["rows"]
            if other["contender"] == names[0] and f"{other['steps']} steps" == row["to engine at"]
        )  # fmt: skip
        assert row["ratio"] == pytest.approx(row["p50 ms"] / base["p50 ms"], rel=0.02, abs=0.01)
    # The timed pictures are the same picture.
    assert all(difference <= 2 for difference in document["max_difference"].values())


def test_mistakes_end_in_one_sentence(
    bundle: Bundle, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    paths = ["--bundle", str(bundle.root), "--student", str(tmp_path)]
    assert main(["engine", *paths, "--steps", "99"]) == 2
    assert "--steps=99: the bundle has schedules for [1, 2, 3, 4, 5, 6, 7, 8]" in capsys.readouterr().err
    assert main(["engine", *paths]) == 2
    assert "is not a diffusers folder" in capsys.readouterr().err
