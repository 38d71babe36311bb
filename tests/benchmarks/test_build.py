"""`cdm-bench build`: an export watched from outside, engines built and loaded in fresh processes, bytes counted."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest

from benchmarks.build import export_rows, goal, largest_component, phase_of
from benchmarks.child_memory import Watched, run_watched
from benchmarks.main import main
from engines.bundle import load_bundle

WATCHED = Watched(
    "verification",
    seconds=9.0,
    began_s={"start": 0.0, "stages": 2.0, "verification": 6.0},
    peak_mb={"start": 100.0, "stages": 390.0, "verification": 520.0},
    own_mb={"start": 60.0, "stages": 320.0, "verification": 300.0},
)


@pytest.mark.slow
def test_an_export_its_engines_and_its_bytes_are_measured(
    tiny_student: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "bundle"
    arguments = ["build", "--student", str(tiny_student), "--out", str(out), "--runs", "1", "--threads", "1"]
    arguments += ["--batches", "1", "--verify", "openvino:f32", "--engines", "openvino:f32,onnxruntime:f32"]
    assert main(arguments) == 0
    document = json.loads(capsys.readouterr().out.splitlines()[-1])
    rows = {row["what"]: row for row in document["rows"]}
    assert list(rows)[:6] == [
        "export, imports",
        "export, without verification",
        "export, whole",
        "openvino f32, empty cache",
        "openvino f32, its cache",
        "onnxruntime f32, no cache",
    ]
    stages, whole = rows["export, without verification"], rows["export, whole"]
    assert 0 < rows["export, imports"]["s"] < stages["s"] < whole["s"]
    assert 0 < stages["own MB"] < stages["peak MB"] <= whole["peak MB"]
    largest = document["largest_component"]
    assert largest["name"] == "transformer"
    assert whole["peak / largest component"] == pytest.approx(whole["peak MB"] / largest["MB"], rel=0.2)
    for name in list(rows)[3:6]:
        for time in ("load ms", "first picture ms", "next ms", "import ms"):
            assert rows[name][time] > 0
        assert rows[name]["n"] == 1
    cached = [name for name in rows if "MB" in rows[name] and name.startswith(("openvino", "onnxruntime"))]
    assert cached == ["openvino f32, its cache"]
    size = sum(path.stat().st_size for path in out.rglob("*") if path.is_file()) / 1e6
    kinds = [row["MB"] for name, row in rows.items() if name.startswith("bundle, ")]
    assert sum(kinds) == pytest.approx(size)
    assert document["bundle"] == load_bundle(out).manifest.name


def test_peaks_are_told_by_phase_and_held_to_the_goal() -> None:
    rows = export_rows(WATCHED, 300_000_000)
    assert [(row["s"], row["peak MB"], row["own MB"]) for row in rows] == [
        (2.0, 100.0, 60.0), (6.0, 390.0, 320.0), (9.0, 520.0, 320.0),
    ]  # fmt: skip
    found = goal(WATCHED, 300_000_000)
    assert list(found["ratios"].values()) == [1.733, 1.3, 0.867]
    assert list(found["met"].values()) == [False, True, True]


def test_a_child_s_own_memory_is_seen_in_its_phase() -> None:
    code = (
        "import sys, time; time.sleep(0.2); print('big', file=sys.stderr, flush=True); "
        "time.sleep(0.3); x = bytearray(60_000_000); time.sleep(0.3); print('done')"
    )
    found = run_watched([sys.executable, "-c", code], lambda text: text.strip(), "small")
    assert (found.code, found.output, found.messages) == (0, "done\n", ["big"])
    assert found.own_mb["big"] - found.own_mb["small"] == pytest.approx(60, abs=5)
    assert found.peak_mb["big"] > found.own_mb["big"]
    assert 0 < found.began_s["big"] < found.seconds


@pytest.mark.parametrize(
    ("message", "phase"),
    [
        ("… text_encoder_2: float32", "stages"),
        ("… denoiser: float32, bfloat16", "stages"),
        ("… parity: openvino bf16", "verification"),
        ("… denoiser on openvino f32: attention fused", ""),
        ("a warning", ""),
    ],
)
def test_what_an_export_says_begins_a_phase(message: str, phase: str) -> None:
    assert phase_of(message) == phase


def test_the_largest_component_counts_in_float32_whatever_is_stored(tiny_student: Path) -> None:
    from engines.families.base import load_family

    size, name = largest_component(tiny_student)
    transformer = load_family(tiny_student, only=("transformer",)).transformer
    assert (size, name) == (4 * sum(p.numel() for p in transformer.state_dict().values()), "transformer")


def test_wrong_input_is_one_sentence(
    tiny_student: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = shutil.copytree(tiny_student, tmp_path / "broken")
    weights = next(broken.glob("transformer/*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:50])
    for arguments, message in (
        (["--student", str(tmp_path)], "there is no model_index.json in it"),
        (["--student", str(broken)], "is no whole safetensors file"),
        (["--student", str(tiny_student), "--engines", "openvino"], "'openvino' is no engine"),
        (["--student", str(tiny_student), "--sizes", "60x60", "--batches", "1"], "must be multiples of"),
    ):
        assert main(["build", *arguments]) == 2
        (sentence,) = [text for text in capsys.readouterr().err.splitlines() if "error:" in text]
        assert message in sentence
