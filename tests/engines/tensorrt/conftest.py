"""The TensorRT runtime on doubles of CUDA and of TensorRT, with the bundled model inside."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from engines.base import EngineOptions, load_engine
from engines.bundle import Bundle, Size, load_bundle
from engines.tensorrt import TensorRTEngine, TensorRTRTXEngine
from tests.engines.fake_cuda import FakeCuda
from tests.engines.fake_tensorrt import FakeTensorRT, Load

EMOJI = Path(__file__).resolve().parents[3] / "cdm_serve" / "bundles" / "emoji"


@pytest.fixture(scope="module")
def bundle() -> Bundle:
    """The bundled model, at sizes small enough for many pictures."""
    whole = load_bundle(EMOJI)
    sizes = (Size(width=64, height=64), Size(width=80, height=48))
    manifest = whole.manifest.model_copy(update={"sizes": sizes, "default_size": sizes[0]})
    return Bundle(whole.root, manifest, whole.sha256)


@pytest.fixture
def cuda() -> FakeCuda:
    return FakeCuda()


@pytest.fixture
def trt(cuda: FakeCuda) -> FakeTensorRT:
    return FakeTensorRT(cuda)


@pytest.fixture
def load(bundle: Bundle, cuda: FakeCuda, trt: FakeTensorRT) -> Iterator[Load]:
    """Loads the engine on the doubles, or on those given; every one is closed at the end."""
    loaded: list[TensorRTEngine] = []

    def load(kind: type[TensorRTEngine] = TensorRTRTXEngine, **given: Any) -> TensorRTEngine:
        package = given.pop("trt", trt)
        options = EngineOptions("tensorrt-rtx", "f32", **{"max_batch": 4, **given})
        loaded.append(kind(bundle, options, trt=package, runtime=package.cuda))
        return loaded[-1]

    yield load
    for engine in loaded:
        engine.close()


@pytest.fixture
def engine(load: Load) -> TensorRTEngine:
    return load()


@pytest.fixture(scope="module")
def reference(bundle: Bundle) -> Iterator[Any]:
    engine = load_engine(bundle, EngineOptions("onnxruntime", "f32", threads=1, max_batch=4))
    yield engine
    engine.close()
