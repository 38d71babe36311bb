"""The acceptance's own judgement: what it makes of figures, crashes and missing packages. No model is exported here."""

from __future__ import annotations

import ctypes
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks import acceptance_machine
from benchmarks.acceptance_contenders import CONTENDERS
from benchmarks.acceptance_parts import CASES, examine_kernels
from benchmarks.acceptance_process import Process
from benchmarks.acceptance_report import REHEARSAL, Acceptance, Missed, Skipped
from benchmarks.acceptance_worker import Worker
from benchmarks.gpu_acceptance import GpuAcceptanceSettings, accept, contenders, run
from engines.base import RUNTIMES
from engines.cli import UsageError
from engines.errors import RuntimeUnavailable
from engines.export.tolerance import Tolerance

EMOJI = Path(__file__).resolve().parents[2] / "cdm_serve" / "bundles" / "emoji"


# the machine


def test_what_nvidia_smi_says_is_read() -> None:
    text = "NVIDIA H100 80GB HBM3, 9.0, 580.159.04, 81559, 512\nNVIDIA GB10, 12.1, 580.95, [N/A], [N/A]\n\n"
    first, second = acceptance_machine.parse_smi(text)
    assert first["name"] == "NVIDIA H100 80GB HBM3"
    assert (first["capability"], first["driver"]) == ("9.0", "580.159.04")
    assert (first["memory MiB"], first["used MiB"], second["used MiB"]) == (81559, 512, None)
    assert acceptance_machine.parse_smi("NVIDIA-SMI has failed because it couldn't communicate\n") == []


class Driver:
    """As much of `libcuda.so.1` as is asked."""

    def cuInit(self, flags: int) -> int:
        return 0

    def cuDeviceGetCount(self, count: Any) -> int:
        count._obj.value = 1
        return 0

    def cuDeviceGetName(self, name: Any, length: int, device: int) -> int:
        name.value = b"NVIDIA H200"[:length]
        return 0

    def cuDeviceGetAttribute(self, value: Any, attribute: int, device: int) -> int:
        value._obj.value = {75: 9, 76: 0}[attribute]
        return 0

    def cuDriverGetVersion(self, version: Any) -> int:
        version._obj.value = 13010
        return 0


def test_without_nvidia_smi_the_driver_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(acceptance_machine, "_smi", lambda: "")
    monkeypatch.setattr(ctypes, "CDLL", lambda name: Driver())
    assert acceptance_machine.gpus() == [{"name": "NVIDIA H200", "capability": "9.0"}]
    assert acceptance_machine.cuda_version() == "13.1"
    assert acceptance_machine.used_bytes() is None


def test_the_commit_is_named_with_a_mark_where_files_differ(tmp_path: Path) -> None:
    def git(*command: str) -> str:
        identity = ["-c", "user.name=a", "-c", "user.email=a@b.c"]
        return subprocess.run(
            ["git", "-C", str(tmp_path), *identity, *command], check=True, capture_output=True, text=True
        ).stdout.strip()

    assert acceptance_machine.commit(tmp_path / "none").startswith("no repository, version ")
    git("init", "--quiet")
    (tmp_path / "file").write_text("1")
    git("add", "file")
    git("commit", "--quiet", "-m", "one")
    assert acceptance_machine.commit(tmp_path) == git("rev-parse", "HEAD")
    (tmp_path / "file").write_text("2")
    assert acceptance_machine.commit(tmp_path) == git("rev-parse", "HEAD") + "+"


# the command


def test_without_a_gpu_one_sentence_says_what_to_do(tmp_path: Path) -> None:
    settings = GpuAcceptanceSettings(out=tmp_path / "out")
    machine = {"gpus": [], "cuda": "", "packages": {}, "commit": "c"}
    with pytest.raises(
        UsageError, match=r"there is no NVIDIA GPU here, .*; run this .* or rehearse it with --dev"
    ):
        accept(settings, machine, start=lambda name, environment: pytest.fail("nothing is to be started"))
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(bool(acceptance_machine.gpus()), reason="there is a GPU")
def test_here_it_refuses(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no NVIDIA GPU"):
        run(GpuAcceptanceSettings(out=tmp_path))


def test_only_takes_parts_and_runtimes_and_nothing_else(tmp_path: Path) -> None:
    some = GpuAcceptanceSettings(out=tmp_path, only=["kernels", "torch+kernels", "torch"])
    assert [item.name for item in contenders(some)] == ["torch", "torch+kernels"]
    assert contenders(GpuAcceptanceSettings(out=tmp_path, only=["kernels"])) == []
    with pytest.raises(ValueError, match=r"'tensorrtx' is none of .*did you mean tensorrt"):
        GpuAcceptanceSettings(out=tmp_path, only=["tensorrtx"])
    with pytest.raises(ValueError, match="'512' is not a size"):
        GpuAcceptanceSettings(out=tmp_path, sizes=["512"])
    with pytest.raises(ValueError, match="0 is not a batch size"):
        GpuAcceptanceSettings(out=tmp_path, batches=[0])


def test_every_runtime_of_a_gpu_takes_part_and_torch_compile_comes_first() -> None:
    everything = contenders(GpuAcceptanceSettings())
    assert {item.runtime for item in everything} == set(RUNTIMES) - {"openvino", "fake"}
    assert everything[0] == CONTENDERS["torch-compile"]
    here = contenders(GpuAcceptanceSettings(device="cpu"))
    assert {item.runtime for item in here} == {"openvino", "onnxruntime", "torch", "aotinductor"}


# the report


def test_what_is_found_is_on_disk_at_once_and_a_failure_is_a_row(tmp_path: Path) -> None:
    report = Acceptance(tmp_path / "new", rehearsal=True, device="CPU")

    def saved() -> Any:
        return json.loads((tmp_path / "new" / "report.json").read_text())

    assert (saved()["rehearsal"], saved()["finished"], saved()["failed"]) == (REHEARSAL, False, 0)
    report.add("kernels", "one", figure=1.5, many=[1, 2])
    assert saved()["parts"]["kernels"] == [{"what": "one", "result": "ok", "figure": 1.5, "many": [1, 2]}]

    def raising(error: BaseException) -> Any:
        def call() -> None:
            raise error

        return call

    report.attempt("kernels", "ours", raising(RuntimeUnavailable("no device | here\nand more")))
    report.attempt("kernels", "theirs", raising(ZeroDivisionError("division by zero")))
    report.attempt("kernels", "missing", raising(ModuleNotFoundError("No module named 'x'", name="x")))
    report.attempt("kernels", "our own bug", raising(ModuleNotFoundError("No module", name="engines.x")))
    report.attempt("kernels", "skipped", raising(Skipped("not installed")))
    report.attempt("kernels", "nothing to say", lambda: None)
    assert [row["result"] for row in saved()["parts"]["kernels"][1:]] == [
        "failed: no device | here",
        "failed: ZeroDivisionError: division by zero",
        "skipped: ModuleNotFoundError: No module named 'x'",
        "failed: ModuleNotFoundError: No module",
        "skipped: not installed",
    ]
    assert (saved()["failed"], len(report.failed)) == (3, 3)
    text = (tmp_path / "new" / "report.md").read_text()
    assert f"**{REHEARSAL}.**" in text
    assert "Not finished; 3 rows failed" in text
    assert "failed: no device \\| here" in text
    assert report.summary()[0]["what"] == REHEARSAL
    assert report.summary()[1]["figures"] == "figure 1.5"


def test_a_report_of_a_gpu_is_no_rehearsal(tmp_path: Path) -> None:
    report = Acceptance(tmp_path, rehearsal=False)
    assert REHEARSAL not in (tmp_path / "report.md").read_text()
    assert json.loads((tmp_path / "report.json").read_text())["rehearsal"] is None
    assert report.summary() == []


# processes


def test_a_process_answers_and_its_output_is_in_the_log(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    process = Process(tmp_path / "logs" / "one.log")
    with process:
        assert process.call("warnings") == []
        with pytest.raises(Missed, match=r"AttributeError: .* no attribute 'dance'"):
            process.call("dance")
        with pytest.raises(Missed, match="bundle"):
            process.call("precisions", bundle=str(tmp_path), runtime="onnxruntime", device="cpu")
        assert process.call("warnings") == [], "it goes on"
    assert "Traceback" in (tmp_path / "logs" / "one.log").read_text()


def test_a_process_that_dies_is_told_with_what_it_said_last(tmp_path: Path) -> None:
    with Process(tmp_path / "log") as process:
        process.call("warnings")
        os.kill(process._process.pid, signal.SIGSEGV)
        with pytest.raises(Missed, match="the process of warnings ended with signal 11"):
            process.call("warnings")
        with pytest.raises(Missed, match="ended with signal 11"):
            process.call("warnings")


def test_a_process_that_hangs_is_given_up(tmp_path: Path) -> None:
    with Process(tmp_path / "log", silent_s=0.0) as process:  # no interpreter starts in no time
        with pytest.raises(Missed, match="warnings had not ended after 0 s"):
            process.call("warnings")
        assert process._process.wait() == -signal.SIGKILL


def test_packages_that_are_not_there_are_skipped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    with pytest.raises(Skipped, match="'tensorrt'"):
        Worker().call("load", bundle=str(EMOJI), options={"runtime": "tensorrt"}, device="cuda")
    monkeypatch.setitem(sys.modules, "triton", None)
    for module in [
        name for name in sys.modules if name.startswith(("engines.kernels", "benchmarks.acceptance_k"))
    ]:
        monkeypatch.delitem(sys.modules, module)
    with pytest.raises(Skipped, match="triton"):
        Worker().call("kernel", case=CASES[0], precision="f32", device="cuda", rounds=1)


def test_what_would_run_on_the_cpu_unseen_is_not_examined() -> None:
    torch = pytest.importorskip("torch")
    if torch.version.cuda is not None:
        pytest.skip("torch is made for CUDA")
    for runtime, told in (
        ("torch", "without CUDA"),
        ("aotinductor", "without CUDA"),
        ("onnxruntime", "onnxruntime-gpu"),
    ):
        with pytest.raises(Skipped, match=told):
            Worker().call("load", bundle="b", options={"runtime": runtime}, device="cuda")


# kernels


def test_the_names_of_the_kernels_are_those_of_the_cases() -> None:
    pytest.importorskip("triton")
    from benchmarks.acceptance_kernels import CASES as KERNELS

    assert tuple(KERNELS) == CASES


@pytest.fixture(scope="module")
def interpreter(tmp_path_factory: pytest.TempPathFactory) -> Any:
    pytest.importorskip("triton")
    with Process(
        tmp_path_factory.mktemp("k") / "log", {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    ) as process:
        yield process


@pytest.mark.parametrize("case", [case for case in CASES if case.endswith("batch 1")])
def test_kernels_are_held_to_float64(interpreter: Process, case: str) -> None:
    row = interpreter.call("kernel", case=case, precision="f32", device="cpu", rounds=1)
    assert 0 < row["rel L2"] < 1e-6
    assert 0 < row["beyond rounding"] <= Tolerance.stored


def test_a_kernel_that_rounds_wrongly_is_found(interpreter: Process) -> None:
    """The interpreter truncates bfloat16 where a GPU rounds."""
    with pytest.raises(
        Missed, match=r"off from float64 by .* beyond its rounding to torch\.bfloat16; at most 1e-05"
    ):
        interpreter.call("kernel", case=CASES[0], precision="bf16", device="cpu", rounds=1)


def test_a_kernel_that_fails_leaves_a_row_and_gets_a_new_process(tmp_path: Path) -> None:
    started: list[str] = []

    class Operator:
        def call(self, operation: str, **arguments: Any) -> Any:
            if "LongCat, batch 4" in arguments["case"]:
                raise Missed("an illegal memory access was encountered")
            return {"rel L2": 1e-7}

        def close(self) -> None:
            started.append("closed")

    def start(name: str, environment: Any) -> Operator:
        started.append("interpreted" if environment.get("TRITON_INTERPRET") else "started")
        return Operator()

    report = Acceptance(tmp_path, rehearsal=False)
    examine_kernels(report, start, tmp_path, "cuda", ["bf16"], 1)
    assert len(report.parts["kernels"]) == len(CASES)
    assert len(report.failed) == 3
    assert started == ["started", "closed"] * 4
    started.clear()
    examine_kernels(Acceptance(tmp_path, rehearsal=True), start, tmp_path, "cpu", ["bf16"], 1)
    assert started == []


def test_modules_can_be_imported_without_any_runtime() -> None:
    """A machine that has only torch must get its rows, not an import error."""
    program = (
        "import sys\n"
        "for name in ('torch', 'triton', 'onnxruntime', 'openvino', 'tensorrt', 'cuda', 'diffusers', 'tritonclient',\n"
        "             'tokenizers', 'transformers', 'onnx', 'fastapi', 'PIL', 'aiohttp', 'matplotlib', 'locust'):\n"
        "    sys.modules[name] = None\n"
        "import benchmarks.gpu_acceptance, benchmarks.acceptance_worker\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
