"""Bare engines of TensorRT, as Triton's backend takes them, built on doubles of TensorRT and of CUDA."""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path

import pytest

pytest.importorskip("cuda.bindings.runtime")

from benchmarks.main import main as cdm_bench
from engines.bundle import Bundle
from engines.errors import ExportError, RuntimeUnavailable
from engines.export.main import main as cdm_export
from engines.tensorrt_plans import write_plans
from tests.engines.fake_cuda import FakeCuda
from tests.engines.fake_tensorrt import FakeTensorRT
from tests.engines.triton_bundle import COMPONENTS, known_bundle, read_config, tree


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    return known_bundle(tmp_path / "bundle")


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> FakeCuda:
    double = FakeCuda()
    monkeypatch.setitem(sys.modules, "cuda.bindings.runtime", double)
    return double


@pytest.fixture
def trt(cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> FakeTensorRT:
    double = FakeTensorRT(cuda, rtx=False, version="10.9.0.34")
    monkeypatch.setitem(sys.modules, "tensorrt", double)
    return double


def test_the_command_writes_plans_and_the_command_that_takes_them(
    bundle: Bundle, tmp_path: Path, trt: FakeTensorRT, cuda: FakeCuda, capsys: pytest.CaptureFixture[str]
) -> None:
    plans, out = tmp_path / "plans", tmp_path / "repository"
    flags = ["--precisions", "bf16", "--max-batch", "4"]
    assert cdm_bench(["tensorrt", "--bundle", str(bundle.root), "--plans", str(plans), *flags]) == 0
    assert sorted(tree(plans)) == sorted(f"{name}.plan" for name in COMPONENTS)
    assert cuda.held() == 0
    for settings in trt.settings:
        assert settings.path.endswith(".bf16.onnx")
        assert {shapes[2][0] for shapes in settings.profiles[0].values()} == {4}
    printed = capsys.readouterr()
    line = json.loads(printed.out.splitlines()[-1])
    assert line["library"] == "TensorRT 10.9.0.34"
    assert line["rows"][0]["target"] == "NVIDIA Fake 4090 (8.9)"

    command = shlex.split(printed.err.splitlines()[-1])
    assert (command[0], command[-2:]) == ("cdm-export", ["--out", "REPOSITORY"])
    assert cdm_export([*command[1:-1], str(out)]) == 0
    files = tree(out)
    for name in COMPONENTS:
        assert files[f"emoji-{name}/1/model.plan"] == (plans / f"{name}.plan").read_bytes()
    config = read_config(out, "denoiser")
    assert (config.backend, config.max_batch_size) == ("tensorrt", 4)
    assert config.parameters["cdm_precision"].string_value == "bf16"


def test_the_decoder_s_plan_takes_whole_batches_of_the_largest_pictures(
    bundle: Bundle, tmp_path: Path, trt: FakeTensorRT, cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One model of Triton has one limit, and it refuses a plan for less than what its configuration says."""
    monkeypatch.setattr("engines.tensorrt_build.DECODED_PIXELS", 1)
    write_plans(bundle, tmp_path / "plans", max_batch=8, trt=trt, runtime=cuda)
    assert trt.settings[-1].profiles[0]["x"][2] == (8, 4, 16, 16)


def test_a_build_that_fails_leaves_the_plans_that_were_there(
    bundle: Bundle, tmp_path: Path, trt: FakeTensorRT, cuda: FakeCuda
) -> None:
    plans = tmp_path / "plans"
    write_plans(bundle, plans, precision="f32", trt=trt, runtime=cuda)
    before = tree(plans)
    trt.refused.add("build_serialized_network")
    with pytest.raises(ExportError, match=r"TensorRT 10\.9\.0\.34 cannot build text_encoder in bf16"):
        write_plans(bundle, plans, precision="bf16", trt=trt, runtime=cuda)
    assert tree(plans) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bundle", "plans"]
    assert cuda.held() == 0


def test_what_is_no_folder_of_plans_is_not_replaced(
    bundle: Bundle, tmp_path: Path, trt: FakeTensorRT, cuda: FakeCuda
) -> None:
    with pytest.raises(
        ExportError, match=r"bundle holds bundle\.json, and is replaced as a whole; give another"
    ):
        write_plans(bundle, bundle.root, trt=trt, runtime=cuda)
    assert not trt.settings


def test_without_a_gpu_it_is_one_sentence(
    bundle: Bundle, tmp_path: Path, trt: FakeTensorRT, cuda: FakeCuda
) -> None:
    cuda.fail("cudaGetDeviceCount")
    with pytest.raises(RuntimeUnavailable, match=r"no usable CUDA device here"):
        write_plans(bundle, tmp_path / "plans", trt=trt, runtime=cuda)
    assert not (tmp_path / "plans").exists()
