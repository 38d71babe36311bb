"""ONNX Runtime beyond float32 on the CPU: int8 graphs, and what is asked of a CUDA device."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
from numpy.typing import NDArray

import engines.onnxruntime
import engines.quantize
from engines.base import EngineOptions
from engines.bundle import Bundle
from engines.errors import RuntimeUnavailable
from engines.onnxruntime import OnnxRuntimeEngine
from tests.engines.pictures import Job, draw

JOBS = [Job("red apple", 1, 4), Job("green face", 2, 2)]
Arrays = dict[str, NDArray[Any]]


def mean_difference(a: NDArray[np.uint8], b: NDArray[np.uint8]) -> float:
    return float(np.abs(a.astype(np.int16) - b.astype(np.int16)).mean())


def test_int8_draws_about_the_same_and_is_made_once(
    bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    exact = draw(OnnxRuntimeEngine(bundle, EngineOptions("onnxruntime", threads=1)), JOBS)
    options = EngineOptions("onnxruntime", "int8", threads=1, cache_dir=tmp_path)
    engine = OnnxRuntimeEngine(bundle, options)
    assert engine.info.precision == "int8"
    pictures = draw(engine, JOBS)
    assert 0 < mean_difference(pictures, exact) < 5 < exact.std()
    sizes = {path.stem: path.stat().st_size for path in tmp_path.rglob("*.blob")}
    assert set(sizes) == {"text_encoder", "text_encoder_2", "denoiser"}  # the decoder has no matrix products
    assert sizes["denoiser"] < bundle.path("denoiser").stat().st_size  # which has float16

    def never(path: Path) -> bytes:
        raise AssertionError(path)

    monkeypatch.setattr(engines.quantize, "quantize", never)
    assert draw(OnnxRuntimeEngine(bundle, options), JOBS).tobytes() == pictures.tobytes()


def test_float32_keeps_nothing_and_refuses_a_cache(bundle: Bundle, tmp_path: Path) -> None:
    with pytest.raises(
        RuntimeUnavailable, match=r"cache_dir=.* means nothing to onnxruntime in f32.*leave it out"
    ):
        OnnxRuntimeEngine(bundle, EngineOptions("onnxruntime", cache_dir=tmp_path))


def test_graph_too_large_for_a_protobuf_is_refused_with_both_sizes(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engines.quantize, "LIMIT_BYTES", 1000)
    with pytest.raises(
        RuntimeUnavailable, match=r"text_encoder\.onnx has 0\.0 GB in float32, and int8 takes up to"
    ):
        OnnxRuntimeEngine(bundle, EngineOptions("onnxruntime", "int8"))


class RecordedBinding:
    """Stands in for a device: remembers what was bound where, and computes on the CPU."""

    def __init__(self, session: RecordedSession) -> None:
        self.session = session
        self.inputs: Arrays = {}
        self.outputs: list[str] = []

    def bind_ortvalue_input(self, name: str, value: tuple[NDArray[Any], str, int]) -> None:
        array, device, index = value
        assert (device, index) == ("cuda", 0)
        self.inputs[name] = array

    def bind_output(self, name: str, device: str) -> None:
        assert device == "cuda"
        self.outputs.append(name)

    def copy_outputs_to_cpu(self) -> list[NDArray[Any]]:
        return self.session.real.run(self.outputs, self.inputs)


class RecordedSession:
    """An `InferenceSession` that takes CUDA among its providers."""

    made: list[RecordedSession]

    loads_cuda = True

    def __init__(self, path: str, options: ort.SessionOptions, providers: Sequence[object]) -> None:
        assert list(providers) == [("CUDAExecutionProvider", {"use_tf32": "0"}), "CPUExecutionProvider"]
        self.real = REAL(path, options, providers=["CPUExecutionProvider"])
        self.runs: list[RecordedBinding] = []
        self.get_outputs = self.real.get_outputs

    def get_providers(self) -> list[str]:
        return ["CUDAExecutionProvider"] * self.loads_cuda + ["CPUExecutionProvider"]

    def run(self, *arguments: Any) -> Any:
        return self.real.run(*arguments)

    def io_binding(self) -> RecordedBinding:
        return RecordedBinding(self)

    def run_with_iobinding(self, binding: RecordedBinding) -> None:
        assert sorted(binding.inputs) == sorted(value.name for value in self.real.get_inputs())
        self.runs.append(binding)


REAL = ort.InferenceSession


def test_cuda_provider_is_used_with_everything_bound_to_the_device(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = draw(OnnxRuntimeEngine(bundle, EngineOptions("onnxruntime", threads=1)), JOBS)
    monkeypatch.setattr(
        ort, "get_available_providers", lambda: ["CUDAExecutionProvider", "CPUExecutionProvider"]
    )
    monkeypatch.setattr(ort, "InferenceSession", RecordedSession)
    monkeypatch.setattr(
        ort.OrtValue, "ortvalue_from_numpy", staticmethod(lambda array, device, index: (array, device, index))
    )
    engine = OnnxRuntimeEngine(bundle, EngineOptions("onnxruntime", threads=1))
    assert engine.info.device == "CUDA"
    assert draw(engine, JOBS).tobytes() == plain.tobytes()
    assert len(engine._sessions["denoiser"].runs) == 4


def test_int8_runs_on_the_cpu_where_cuda_is_there(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        ort, "get_available_providers", lambda: ["CUDAExecutionProvider", "CPUExecutionProvider"]
    )
    engine = OnnxRuntimeEngine(bundle, EngineOptions("onnxruntime", "int8", threads=1))
    assert engine.info.device == "CPU"
    draw(engine, JOBS[:1])


def test_cuda_that_does_not_load_is_the_cpu_and_says_so(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """ONNX Runtime itself falls back without a word."""
    monkeypatch.setattr(
        ort, "get_available_providers", lambda: ["CUDAExecutionProvider", "CPUExecutionProvider"]
    )
    monkeypatch.setattr(ort, "InferenceSession", RecordedSession)
    monkeypatch.setattr(RecordedSession, "loads_cuda", False)
    engine = OnnxRuntimeEngine(bundle, EngineOptions("onnxruntime", threads=1))
    assert engine.info.device == "CPU"
    assert "so it runs on the CPU" in caplog.text
    draw(engine, JOBS)
