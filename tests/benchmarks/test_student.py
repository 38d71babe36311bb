"""`cdm-bench student`: the parts add up, the guidance is real, and whose weights were used is said."""

from __future__ import annotations

import json
from itertools import pairwise
from typing import Any

import numpy as np
import pytest

from benchmarks.main import main
from benchmarks.student import Stopwatch, drawing, guided, teacher_sigmas
from engines.base import EngineOptions, load_engine
from engines.bundle import Bundle


def measured(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, object]:
    assert main(["student", *arguments, "--rounds", "2", "--threads", "1", "--engine", "onnxruntime"]) == 0
    document: dict[str, object] = json.loads(capsys.readouterr().out.splitlines()[-1])
    return document


@pytest.mark.parametrize("own_teacher", [False, True])
def test_parts_and_whole_are_timed_and_their_ratios_are_of_the_medians(
    own_teacher: bool, tiny_bundle: Bundle, capsys: pytest.CaptureFixture[str]
) -> None:
    root = str(tiny_bundle.root)
    teacher = ["--teacher", root] if own_teacher else []
    found = measured(capsys, "--bundle", root, *teacher, "--steps", "2", "--teacher-steps", "10")
    assert found["evaluations"] == {"student": 2, "teacher": 20}
    assert (found["teacher_weights"] == "its own") == own_teacher
    student = "student, 2 steps, ms"
    mark = "" if own_teacher else ", student's weights"
    teacher_column = f"teacher, 10 steps, guided{mark}, ms"
    rows = found["rows"]
    assert isinstance(rows, list)
    assert [row["part"] for row in rows] == ["text", "denoiser", "decoder", "end to end"]
    for row in rows:
        assert row[student] > 0 < row[teacher_column]
        assert row["teacher / student"] == pytest.approx(row[teacher_column] / row[student])
    for column in (student, teacher_column):
        # Of two rounds the median is the mean, and means add up.
        assert sum(row[column] for row in rows[:3]) <= rows[3][column]


def test_guidance_is_that_of_the_velocities(tiny_bundle: Bundle) -> None:
    """x' of v_∅ + g·(v_c − v_∅), v by hand from x̂0 = x − σ·v."""
    engine = load_engine(tiny_bundle, EngineOptions("onnxruntime", "f32", 1))
    latent = tiny_bundle.manifest.latent
    x = np.random.default_rng(0).standard_normal((latent.channels, 8, 8), dtype=np.float32)
    uncond, cond = engine.encode([engine.tokenize(""), engine.tokenize("red apple")])
    rows, clean = engine.denoise([x, x], [0.8, 0.8], [0.3, 0.3], [uncond, cond])
    velocities = [(x - x0) / 0.8 for x0 in clean]
    velocity = velocities[0] + 3.0 * (velocities[1] - velocities[0])
    (found,) = guided(rows, 3.0)
    np.testing.assert_allclose(found, x + (0.3 - 0.8) * velocity, atol=1e-4)
    assert np.abs(found - rows[1]).max() > 1e-3
    engine.close()


def test_a_guided_picture_takes_twice_the_rows_and_is_the_student_s_where_both_prompts_are_one(
    tiny_bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = load_engine(tiny_bundle, EngineOptions("onnxruntime", "f32", 1))
    rows: list[int] = []
    denoise = engine.denoise

    def counted(samples: Any, *arguments: Any) -> Any:
        rows.append(len(samples))
        return denoise(samples, *arguments)

    monkeypatch.setattr(engine, "denoise", counted)
    latent = tiny_bundle.manifest.latent
    start = [np.random.default_rng(1).standard_normal((latent.channels, 8, 8), dtype=np.float32)]
    sigmas = tiny_bundle.manifest.sigmas(2)
    watches = [Stopwatch(), Stopwatch(), Stopwatch()]
    plain = drawing(engine, "", start, sigmas, watches[0])()
    same = drawing(engine, "", start, sigmas, watches[1], 5.0)()
    assert np.abs(plain.astype(int) - same.astype(int)).max() <= 1
    other = drawing(engine, "red apple", start, sigmas, watches[2], 5.0)()
    assert not np.array_equal(plain, other)
    assert rows == [1, 1, 2, 2, 2, 2]
    assert all(len(watch.parts[part]) == 1 for watch in watches for part in ("text", "denoiser", "decoder"))
    engine.close()


def test_a_teacher_s_schedule_is_the_bundle_s_or_even(tiny_bundle: Bundle) -> None:
    manifest = tiny_bundle.manifest
    assert teacher_sigmas(manifest, 4) == manifest.sigmas(4)
    even = teacher_sigmas(manifest, 28)
    assert (len(even), even[0], even[-1]) == (29, 1.0, 0.0)
    assert all(a > b for a, b in pairwise(even))


def test_wrong_input_is_one_sentence(tiny_bundle: Bundle, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, message in (
        (
            ["--bundle", str(tiny_bundle.root), "--steps", "99"],
            "--steps=99: the bundle has schedules for [1, 2",
        ),
        (["--bundle", "nowhere"], "nowhere is not a bundle"),
        (["--bundle", str(tiny_bundle.root), "--teacher", "nowhere"], "nowhere is not a bundle"),
    ):
        assert main(["student", *arguments]) == 2
        (sentence,) = [text for text in capsys.readouterr().err.splitlines() if "error:" in text]
        assert message in sentence
