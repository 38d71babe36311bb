"""`cdm-bench gpu-acceptance --device cpu`: a tiny SD3 is held to torch and timed on every runtime here.

The bundle is the one that all tests share, for an export takes a minute; how the command exports has a test of its own.
"""

from __future__ import annotations

import contextlib
import io
import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest

from benchmarks import acceptance_model, acceptance_parts, random_longcat
from benchmarks.acceptance_machine import describe
from benchmarks.acceptance_process import Operator, Process
from benchmarks.acceptance_report import REHEARSAL
from benchmarks.acceptance_worker import Worker
from benchmarks.gpu_acceptance import GpuAcceptanceSettings, accept
from engines.bundle import Bundle
from engines.export.export import ExportOptions
from engines.export.tolerance import Tolerance
from tests.engines.weights import with_weights

pytestmark = pytest.mark.slow

SIZES = [[64, 64], [80, 48]]


class Rehearsed(NamedTuple):
    code: int
    out: Path
    report: dict[str, Any]
    printed: str
    environments: dict[str, Mapping[str, str]]

    def part(self, name: str) -> dict[str, dict[str, Any]]:
        return {row["what"]: row for row in self.report["parts"][name]}


Rehearse = Callable[[Path, list[str]], Rehearsed]


class Exported:
    """Answers as the student and the export do, with a model that is there."""

    def __init__(self, bundle: Bundle, student: Path, out: Path) -> None:
        self._bundle, self._student, self._work = bundle, student, out / "work"

    def call(self, operation: str, **arguments: Any) -> Any:
        if operation == "student":
            shutil.copytree(self._student, arguments["folder"])
            return {}
        assert operation == "export"
        assert arguments["student"] == str(self._work / "student")
        with_weights(self._bundle, self._student, Path(arguments["out"]))
        return {"sizes": SIZES}

    def close(self) -> None:
        pass


@pytest.fixture(scope="module")
def rehearse(tiny_bundle: Bundle, tiny_student: Path) -> Rehearse:
    def rehearse(out: Path, only: list[str]) -> Rehearsed:
        environments: dict[str, Mapping[str, str]] = {}

        def start(name: str, environment: Mapping[str, str]) -> Operator:
            environments[name] = environment
            if name in ("student", "export"):
                return Exported(tiny_bundle, tiny_student, out)
            if name.split()[0] in ("torch", "references"):  # torch takes seconds to import: here it is
                return Worker()
            return Process(out / "logs" / name, {"OMP_NUM_THREADS": "1", **environment})

        settings = GpuAcceptanceSettings(
            out=out, device="cpu", size="tiny", only=only, precisions=["f32"], batches=[1, 2], rounds=2
        )
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            code = accept(settings, describe(), start)
        report = json.loads((out / "report.json").read_text(encoding="utf-8"))
        return Rehearsed(code, out, report, printed.getvalue(), environments)

    return rehearse


@pytest.fixture(scope="module")
def rehearsed(rehearse: Rehearse, tmp_path_factory: pytest.TempPathFactory) -> Rehearsed:
    only = ["openvino", "onnxruntime", "torch", "tensorrt-rtx", "tensorrt"]
    return rehearse(tmp_path_factory.mktemp("acceptance"), only)


def test_a_runtime_that_fails_is_a_row_and_the_others_run(rehearsed: Rehearsed) -> None:
    assert rehearsed.code == 1
    failed = [
        row["what"]
        for part in rehearsed.report["parts"].values()
        for row in part
        if "failed" in row["result"]
    ]
    assert failed == ["tensorrt-rtx"], "there is no GPU"
    rows = rehearsed.part("runtimes")
    assert rows["tensorrt-rtx"]["result"].startswith("failed: no usable CUDA device here")
    assert rows["tensorrt"]["result"].startswith("skipped: runtime 'tensorrt' needs the package 'tensorrt'")
    for name in ("openvino", "onnxruntime", "torch"):
        assert rows[f"{name} f32, built"]["build s"] > 0
        assert rows[f"{name} f32, in a second process"]["load s"] > 0
    assert "attention one node: 2 of 2" in rows["openvino f32, fusion"]["fusion"]
    assert rows["openvino f32, in a second process"]["cache MB"] > 0.1


def test_it_says_everywhere_that_it_is_a_rehearsal(rehearsed: Rehearsed) -> None:
    *table, line = rehearsed.printed.splitlines()
    printed = json.loads(line)
    assert printed["rehearsal"] == rehearsed.report["rehearsal"] == REHEARSAL
    assert REHEARSAL in next(row for row in table if row.startswith("|  "))
    assert f"**{REHEARSAL}.**" in (rehearsed.out / "report.md").read_text(encoding="utf-8")
    assert (printed["benchmark"], printed["failed"], rehearsed.report["finished"]) == (
        "gpu-acceptance",
        1,
        True,
    )
    assert rehearsed.report["commit"]
    assert rehearsed.part("machine")["torch"]["result"].startswith("2.")


def test_the_model_is_exported_in_both_precisions_with_its_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[ExportOptions] = []

    def exported(student: Path, out: Path, options: ExportOptions, progress: Any) -> Any:
        asked.append(options)
        manifest = SimpleNamespace(sizes=options.sizes, family="sd3")
        return SimpleNamespace(manifest=manifest, bytes=12_300_000)

    monkeypatch.setattr(acceptance_model, "export_bundle", exported)
    student = str(tmp_path / "student")
    assert Worker().call("student", folder=student, scale="tiny")["MB"] > 1
    arguments = {"student": student, "out": str(tmp_path / "bundle"), "batches": [1, 2], "steps": 4}
    row = Worker().call("export", sizes=[], **arguments)
    assert (row["MB"], row["sizes"], row["family"]) == (12.3, [[64, 64], [32, 32]], "sd3")
    assert row["peak MB"] > 100
    assert (asked[0].precisions, asked[0].weights, asked[0].batches) == (
        ("float32", "bfloat16"),
        True,
        (1, 2),
    )
    assert Worker().call("export", sizes=[[96, 64]], **arguments)["sizes"] == [[96, 64]]


def test_the_model_of_random_weights_may_be_a_longcat(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of its real size it takes minutes; here it is narrow."""
    monkeypatch.setattr(acceptance_model, "LONGCAT_LAYERS", 2)
    monkeypatch.setattr(
        random_longcat,
        "build_random_longcat",
        partial(
            random_longcat.build_random_longcat, heads=1, text=random_longcat.TINY_TEXT, vae_channels=(8, 8)
        ),
    )
    settings = GpuAcceptanceSettings(size="longcat")
    student = tmp_path / "student"
    assert Worker().call("student", folder=str(student), scale=settings.size)["MB"] > 1
    assert "LongCatImagePipeline" in (student / "model_index.json").read_text(encoding="utf-8")


def test_parity_is_measured_and_no_constant(rehearsed: Rehearsed) -> None:
    rows = rehearsed.part("parity")
    errors = {}
    for name in ("openvino", "onnxruntime"):
        for component in ("text_encoder", "text_encoder_2", "denoiser", "decoder"):
            row = rows[f"{name} f32: {component}"]
            errors[name, component] = row["rel L2, stored weights"], row["max abs"]
            assert row["shapes"] == (2 if component.startswith("text") else 4)
        for size in ("64x64", "80x48"):
            assert 50 < rows[f"{name} f32: pictures of {size}"]["PSNR dB"] <= 99
    assert all(1e-9 < errors[name, part][0] <= 1e-5 for name, part in errors if part != "decoder")
    assert len(set(errors.values())) > 4, "each of its own"
    assert rows["torch f32: denoiser"]["rel L2, original weights"] <= 1e-6


def test_claims_hold_and_times_are_taken(rehearsed: Rehearsed) -> None:
    claims, times = rehearsed.part("claims"), rehearsed.report["parts"]["times"]
    for name in ("openvino", "onnxruntime", "torch"):
        assert claims[f"{name} f32: invariant batches give the same bytes in any company"]["pictures"] == 2
        assert claims[f"{name} f32: a second process draws the same pictures"]["least PSNR dB"] >= 40
    assert claims["openvino f32: a second process compiles nothing anew"]["files"] >= 4
    assert not [what for what in claims if "host" in what or "graphs" in what], "not of a CPU"
    shapes = [("64x64", 1), ("64x64", 2), ("80x48", 1), ("80x48", 2)]
    for name in ("torch", "onnxruntime", "openvino"):
        rows = [row for row in times if row["what"] == f"{name} f32"]
        assert [(row["size"], row["batch"]) for row in rows] == shapes
        assert all((len(row["all"]["step"]), row["n"]) == (6, 2) for row in rows)
        assert all(row["step ms p50"] > 0 and row["step, × over torch f32"] > 0 for row in rows)


def test_every_contender_compiles_into_folders_of_its_own(rehearsed: Rehearsed) -> None:
    labels = [name for name in rehearsed.environments if name.endswith(" f32")]
    folders = [rehearsed.environments[label]["TRITON_CACHE_DIR"] for label in labels]
    assert len(set(folders)) == len(labels) == 3
    assert not list((rehearsed.out / "work" / "cache").iterdir())


def test_a_tolerance_that_is_missed_fails_the_command(
    rehearse: Rehearse, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert rehearse(tmp_path / "ok", ["onnxruntime"]).code == 0
    task = acceptance_parts.Task
    strict = replace(Tolerance(), stored=1e-12)
    monkeypatch.setattr("benchmarks.gpu_acceptance.Task", lambda **given: task(**given, tolerance=strict))
    missed = rehearse(tmp_path / "missed", ["onnxruntime"])
    assert missed.code == 1
    row = missed.part("parity")["onnxruntime f32: denoiser"]
    assert row["result"].startswith(
        "failed: denoiser at batch 1 on onnxruntime f32 against torch with stored weights"
    )
    assert missed.part("parity")["onnxruntime f32: decoder"]["result"] == "ok", (
        "it is held to one level of 255"
    )
    assert missed.part("times"), "the others go on"


def test_a_student_that_cannot_be_exported_leaves_nothing_to_run(tmp_path: Path) -> None:
    (tmp_path / "student").mkdir()
    settings = GpuAcceptanceSettings(
        out=tmp_path / "out", device="cpu", student=tmp_path / "student", only=["onnxruntime", "openvino"]
    )
    with contextlib.redirect_stdout(io.StringIO()):
        assert accept(settings, describe(), lambda name, environment: Worker()) == 1
    report = json.loads((tmp_path / "out" / "report.json").read_text(encoding="utf-8"))
    assert [row["result"].split(":")[0] for row in report["parts"]["export"]] == ["ok", "failed"]
    assert [row["result"] for row in report["parts"]["runtimes"]] == [
        "failed: there is nothing to run: bundle in float32 and bfloat16, with the weights"
    ] * 2
