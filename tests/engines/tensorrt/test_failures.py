"""What is refused, and what a device that fails leaves behind."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cuda.bindings import runtime as real

import engines.tensorrt
from engines.base import EngineOptions
from engines.bundle import Bundle
from engines.cuda import Cuda
from engines.errors import ExecutionError, RuntimeUnavailable
from engines.tensorrt import TensorRTEngine, TensorRTRTXEngine
from engines.tensorrt_library import Library
from tests.engines.fake_cuda import FakeCuda
from tests.engines.fake_tensorrt import JOBS, OBLONG, FakeTensorRT, Load
from tests.engines.pictures import draw, starting_noise

COMPONENTS = ["text_encoder", "text_encoder_2", "denoiser", "decoder"]


def test_options_that_mean_nothing_are_refused(load: Load) -> None:
    with pytest.raises(RuntimeUnavailable, match="threads=4 means nothing to tensorrt-rtx"):
        load(threads=4)


def test_a_gpu_that_tensorrt_rtx_has_no_target_for_is_refused(load: Load) -> None:
    cuda = FakeCuda(capability=(9, 0))
    with pytest.raises(
        RuntimeUnavailable, match=r"capability 9\.0 is no target of TensorRT-RTX .* 7\.5, 8\.9, 12\.0;"
    ):
        load(trt=FakeTensorRT(cuda))
    assert not cuda.held()


def test_a_build_that_fails_is_told_in_one_sentence_and_leaves_nothing_on_the_device(
    load: Load, trt: FakeTensorRT, cuda: FakeCuda
) -> None:
    trt.refused = {"build_serialized_network"}
    with pytest.raises(RuntimeUnavailable) as error:
        load()
    assert str(error.value) == (
        "tensorrt-rtx cannot serve this bundle here: TensorRT-RTX 1.7.1.116 cannot build text_encoder in f32 for 8.9, "
        "batches up to 4: no tactics to implement the operation"
    )
    assert not cuda.held()


@pytest.mark.parametrize(
    ("refused", "told"),
    [
        ("deserialize_cuda_engine", "does not take the text_encoder that it has built"),
        ("create_execution_context", "made no execution context"),
    ],
)
def test_what_tensorrt_refuses_as_it_loads_is_told(
    load: Load, trt: FakeTensorRT, cuda: FakeCuda, refused: str, told: str
) -> None:
    trt.refused = {refused}
    with pytest.raises(RuntimeUnavailable, match=told):
        load()
    assert not cuda.held()


def test_a_device_without_the_memory_is_told_as_it_loads(load: Load, cuda: FakeCuda) -> None:
    cuda.fail("cudaMalloc", real.cudaError_t.cudaErrorMemoryAllocation)
    with pytest.raises(RuntimeUnavailable, match="could not allocate 4096 bytes: cudaErrorMemoryAllocation"):
        load()
    assert not cuda.held()


def test_an_engine_may_need_no_more_scratch_memory_than_the_device_has(load: Load, trt: FakeTensorRT) -> None:
    load(trt=FakeTensorRT(FakeCuda(free=12345)))
    load()
    assert trt.settings[0].pools == {"workspace": 1 << 34}


@pytest.mark.parametrize("function", ["cudaGraphLaunch", "cudaStreamSynchronize", "cudaMalloc"])
def test_a_call_that_fails_says_where_and_the_next_one_works(
    engine: TensorRTEngine, cuda: FakeCuda, reference: Any, function: str
) -> None:
    def call(engine: Any, conditioning: Any) -> Any:
        sample = engine.put(starting_noise(engine, JOBS[0]))
        return engine.denoise([sample], [1.0], [0.5], conditioning)[0]

    prompts = [[engine.tokenize(text)] for text in ("red apple", "green apple")]
    first, second = (engine.encode(tokens) for tokens in prompts)
    call(engine, first)
    sample = engine.put(starting_noise(engine, JOBS[0]))
    cuda.fail(function)
    if function == "cudaMalloc":  # no forgotten row will do
        engine._cuda._free.clear()
    with pytest.raises(
        ExecutionError, match=r"tensorrt-rtx failed in denoiser at batch 1: CUDA could not .* cudaError"
    ):
        engine.denoise([sample], [1.0], [0.5], second)
    expected = reference.decode(call(reference, reference.encode(prompts[1])))
    assert np.array_equal(engine.decode(call(engine, second)), expected)


def test_tensorrt_refusing_a_call_says_where(engine: TensorRTEngine, trt: FakeTensorRT) -> None:
    sample = engine.put(starting_noise(engine, JOBS[0]))
    for refused in ("set_tensor_address", "execute_async_v3"):
        trt.refused = {refused}
        with pytest.raises(
            ExecutionError, match=r"failed in decoder at batch 1: TensorRT-RTX .* did not accept"
        ):
            engine.decode([sample])
    trt.refused = set()
    assert engine.decode([sample]).shape == (1, 64, 64, 3)


def test_batches_beyond_the_profile_are_refused(engine: TensorRTEngine) -> None:
    sample = engine.put(starting_noise(engine, JOBS[0]))
    with pytest.raises(ExecutionError, match="decoder takes batches of 1 to 4, not of 5"):
        engine.decode([sample] * 5)


@pytest.mark.parametrize("shape", [(3, 8, 8), (8, 8), (8, 7, 7), (8, 8, 10)])
def test_a_latent_of_no_size_of_the_bundles_is_refused(
    engine: TensorRTEngine, shape: tuple[int, ...]
) -> None:
    with pytest.raises(ExecutionError, match="denoiser takes"):
        engine.put(np.zeros(shape, np.float32))


def test_pictures_of_two_sizes_are_no_batch(engine: TensorRTEngine) -> None:
    samples = [engine.put(starting_noise(engine, job)) for job in (JOBS[0], OBLONG[0])]
    with pytest.raises(
        ExecutionError, match=r"decoder takes x of one shape in a batch, not of \[\(8, 6, 10\), "
    ):
        engine.decode(samples)


def test_embeddings_of_another_length_are_refused(engine: TensorRTEngine) -> None:
    (states, *rest) = engine.encode([engine.tokenize("red apple")])[0]
    wrong = engine._cuda.row((7, states.shape[1]))
    sample = engine.put(starting_noise(engine, JOBS[0]))
    with pytest.raises(ExecutionError, match="denoiser takes clip_states of shape"):
        engine.denoise([sample], [1.0], [0.5], [(wrong, *rest)])


def test_close_frees_everything_and_may_be_called_twice(load: Load, cuda: FakeCuda) -> None:
    engine = load()
    held = engine.put(starting_noise(engine, JOBS[0]))
    draw(engine, JOBS[:1])
    assert cuda.held()
    engine.close()
    assert not cuda.held()
    engine.close()
    del held


def test_info_says_what_runs(engine: TensorRTEngine, load: Load) -> None:
    info = engine.info
    assert (info.runtime, info.version, info.device) == ("tensorrt-rtx", "1.7.1.116", "NVIDIA Fake 4090")
    assert (info.precision, info.max_batch, info.overlap) == ("f32", 4, False)
    package = FakeTensorRT(FakeCuda(), rtx=False, version="11.4.0")
    assert load(TensorRTEngine, trt=package).info.runtime == "tensorrt"


def test_the_engine_reports_what_was_fused_stored_or_not(load: Load, tmp_path: Path) -> None:
    reports = [load(cache_dir=tmp_path).fusion_report("denoiser") for _ in range(2)]
    assert reports[0] == reports[1]
    assert (reports[0].component, reports[0].scratch_bytes) == ("denoiser", 4096)


def test_tensorrt_draws_the_same_pictures(load: Load, reference: Any) -> None:
    engine = load(TensorRTEngine, trt=FakeTensorRT(FakeCuda(capability=(9, 0)), rtx=False))
    assert np.array_equal(draw(engine, JOBS), draw(reference, JOBS))


@pytest.mark.skipif(not int(real.cudaGetDeviceCount()[0]), reason="there is a GPU")
def test_without_a_gpu_the_real_packages_say_so(bundle: Bundle) -> None:
    pytest.importorskip("tensorrt_rtx")
    with pytest.raises(RuntimeUnavailable, match="no usable CUDA device here"):
        TensorRTRTXEngine(bundle, EngineOptions("tensorrt-rtx"))
    with pytest.raises(RuntimeUnavailable, match="no usable CUDA device here"):
        TensorRTRTXEngine.precisions(bundle)


@pytest.mark.parametrize(("capability", "precisions"), [((8, 9), ("f32",)), ((9, 0), None)])
def test_precisions_are_those_of_bundle_and_gpu(
    bundle: Bundle,
    monkeypatch: pytest.MonkeyPatch,
    capability: tuple[int, int],
    precisions: tuple[str, ...] | None,
) -> None:
    cuda = FakeCuda(capability)
    monkeypatch.setattr(engines.tensorrt, "Cuda", lambda: Cuda(cuda))
    monkeypatch.setattr(engines.tensorrt, "open_library", lambda name: Library(name, FakeTensorRT(cuda)))
    if precisions is None:
        with pytest.raises(RuntimeUnavailable, match=r"9\.0 is no target"):
            TensorRTRTXEngine.precisions(bundle)
    else:
        assert TensorRTRTXEngine.precisions(bundle) == precisions
    assert not cuda.held()
    assert cuda.calls[-1][0] == "cudaStreamDestroy"
