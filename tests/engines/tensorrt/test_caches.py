"""What is kept between starts, and for whom."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import engines.tensorrt_build
from engines.bundle import Bundle
from engines.tensorrt import TensorRTEngine, TensorRTRTXEngine
from engines.tensorrt_build import build_engines
from tests.engines.fake_cuda import FakeCuda
from tests.engines.fake_tensorrt import JOBS, FakeTensorRT, Load
from tests.engines.pictures import draw

COMPONENTS = ["text_encoder", "text_encoder_2", "denoiser", "decoder"]


def test_a_second_start_builds_and_compiles_nothing(
    load: Load, reference: Any, tmp_path: Path, cuda: FakeCuda
) -> None:
    first = FakeTensorRT(cuda)
    draw(load(trt=first, cache_dir=tmp_path), JOBS)
    assert (first.calls["build_serialized_network"], first.calls["compiled"]) == (4, 7)
    second = FakeTensorRT(FakeCuda())
    engine = load(trt=second, cache_dir=tmp_path)
    assert np.array_equal(draw(engine, JOBS), draw(reference, JOBS))
    assert (second.calls["build_serialized_network"], second.calls["compiled"]) == (0, 0)


@pytest.mark.parametrize("other", [{"name": "NVIDIA Fake 4060"}, {"driver": 13020}], ids=["gpu", "driver"])
def test_another_gpu_of_the_capability_finds_the_engines_and_compiles_its_own_kernels(
    load: Load, tmp_path: Path, cuda: FakeCuda, other: dict[str, Any]
) -> None:
    folder = load(trt=FakeTensorRT(cuda), cache_dir=tmp_path).cache_folder
    second = FakeTensorRT(FakeCuda(**other))
    engine = load(trt=second, cache_dir=tmp_path)
    draw(engine, JOBS[:1])
    assert second.calls["build_serialized_network"] == 0
    assert second.calls["compiled"] == 4
    assert engine.cache_folder != folder, "what was measured on one is not the other's"


@pytest.mark.parametrize(
    "change",
    [
        {"max_batch": 3},
        {"cuda": FakeCuda(capability=(12, 0))},
        {"version": "1.8.0"},
        {"classic": True},
    ],
    ids=lambda change: next(iter(change)),
)
def test_what_shapes_an_engine_is_in_its_key(load: Load, tmp_path: Path, change: dict[str, Any]) -> None:
    load(cache_dir=tmp_path)
    classic = "classic" in change
    package = FakeTensorRT(
        change.get("cuda", FakeCuda()), rtx=not classic, version=change.get("version", "1.7.1.116")
    )
    kind = TensorRTEngine if classic else TensorRTRTXEngine
    load(kind, trt=package, cache_dir=tmp_path, max_batch=change.get("max_batch", 4))
    assert package.calls["build_serialized_network"] == 4


def test_tensorrts_engines_are_of_one_gpu_only(load: Load, tmp_path: Path) -> None:
    for name, built in (("NVIDIA H100", 4), ("NVIDIA H100", 0), ("NVIDIA H200", 4)):
        package = FakeTensorRT(FakeCuda(capability=(9, 0), name=name), rtx=False)
        load(TensorRTEngine, trt=package, cache_dir=tmp_path)
        assert package.calls["build_serialized_network"] == built


def test_engines_built_ahead_for_a_capability_are_found_by_its_gpus(
    bundle: Bundle, load: Load, tmp_path: Path
) -> None:
    ahead = FakeTensorRT(FakeCuda())
    arguments = {"capability": "8.9", "cache_dir": tmp_path, "max_batch": 4, "precision": "f32", "trt": ahead}
    reports = build_engines(bundle, **arguments)  # type: ignore[arg-type]
    assert [report.component for report in reports] == COMPONENTS
    assert build_engines(bundle, **arguments) == reports  # type: ignore[arg-type]
    assert ahead.calls["build_serialized_network"] == 4
    package = FakeTensorRT(FakeCuda())
    load(trt=package, cache_dir=tmp_path)
    assert package.calls["build_serialized_network"] == 0
    other = FakeTensorRT(FakeCuda(capability=(12, 0)))
    load(trt=other, cache_dir=tmp_path)
    assert other.calls["build_serialized_network"] == 4


@pytest.mark.parametrize("name", ["denoiser", "denoiser.report", "kernels"])
def test_a_damaged_cache_is_made_anew_and_says_so(
    load: Load, reference: Any, tmp_path: Path, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    draw(load(cache_dir=tmp_path), JOBS[:1])
    (blob,) = tmp_path.rglob(f"{name}.blob")
    blob.write_bytes(blob.read_bytes()[:-3])
    package = FakeTensorRT(FakeCuda())
    engine = load(trt=package, cache_dir=tmp_path)
    assert f"{name}.blob is damaged" in caplog.text
    assert np.array_equal(draw(engine, JOBS[:1]), draw(reference, JOBS[:1]))
    assert package.calls["build_serialized_network"] == (name != "kernels")
    assert package.calls["compiled"] == (4 if name == "kernels" else 0)


def test_stored_kernels_that_the_device_does_not_take_are_compiled_anew(
    load: Load, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    draw(load(cache_dir=tmp_path), JOBS[:1])
    package = FakeTensorRT(FakeCuda())
    package.refused = {"deserialize"}
    draw(load(trt=package, cache_dir=tmp_path), JOBS[:1])
    assert "the stored kernels cannot be used" in caplog.text
    assert package.calls["compiled"] == 4


def test_a_stored_engine_that_the_device_does_not_take_is_built_anew(
    load: Load, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    engine = load(cache_dir=tmp_path)
    (blob,) = tmp_path.rglob("denoiser.blob")
    store = engines.tensorrt_build.CompiledCache(blob.parent)
    store.store("denoiser", b"an engine of another world")
    package = FakeTensorRT(FakeCuda())
    engine = load(trt=package, cache_dir=tmp_path)
    assert "the stored denoiser cannot be used, it is compiled anew: TensorRT-RTX" in caplog.text
    assert "The engine plan file is not compat" in caplog.text
    assert package.calls["build_serialized_network"] == 1
    draw(engine, JOBS[:1])


def test_without_a_cache_folder_nothing_is_kept(load: Load, tmp_path: Path) -> None:
    engine = load()
    draw(engine, JOBS[:1])
    assert engine.cache_folder is None
