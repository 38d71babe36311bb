"""Rows and graphs: every picture is the graphs' own, whatever shares its batch, and nothing crosses needlessly."""

from __future__ import annotations

import gc
import logging
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from cuda.bindings import runtime as real

import engines.tensorrt_build
from engines.tensorrt import TensorRTEngine
from tests.engines.fake_cuda import FakeCuda
from tests.engines.fake_tensorrt import JOBS, OBLONG, SCRATCH, FakeTensorRT, Load
from tests.engines.pictures import Job, draw, starting_noise, worst

COMPONENTS = ["text_encoder", "text_encoder_2", "denoiser", "decoder"]


@pytest.mark.parametrize(
    "jobs", [JOBS, JOBS[:1], JOBS[::-1], OBLONG], ids=["mixed", "one", "reversed", "oblong"]
)
def test_pictures_are_those_of_the_graphs(engine: TensorRTEngine, reference: Any, jobs: list[Job]) -> None:
    mine, theirs = draw(engine, jobs), draw(reference, jobs)
    assert theirs.std() > 10
    assert np.array_equal(mine, theirs)


def test_batches_of_two_sizes_do_not_get_in_each_others_way(engine: TensorRTEngine, reference: Any) -> None:
    for jobs in (JOBS, OBLONG, JOBS[:2], OBLONG, JOBS):
        assert np.array_equal(draw(engine, jobs), draw(reference, jobs))


def test_no_step_copies_a_latent_or_an_embedding_to_or_from_the_host(
    engine: TensorRTEngine, cuda: FakeCuda
) -> None:
    conditioning = engine.encode([engine.tokenize(job.prompt) for job in JOBS])
    samples = [engine.put(starting_noise(engine, job)) for job in JOBS]
    for sigma, sigma_next in pairwise(engine.manifest.sigmas(4)):
        cuda.calls.clear()
        samples, _ = engine.denoise(samples, [sigma] * 4, [sigma_next] * 4, conditioning)
        crossing = [
            (arguments[3].name, arguments[2])
            for name, arguments in cuda.calls
            if name == "cudaMemcpyAsync" and "Host" in arguments[3].name
        ]
        assert crossing == [("cudaMemcpyHostToDevice", 16)] * 2, "σ and σ′ of four pictures, and nothing else"
        assert not cuda.pending, "a call's time is the device's"


def test_encoding_brings_nothing_down_and_decoding_only_pictures(
    engine: TensorRTEngine, cuda: FakeCuda
) -> None:
    cuda.calls.clear()
    engine.encode([engine.tokenize("red apple")])
    assert cuda.count()["DeviceToHost"] == 0
    sample = engine.put(starting_noise(engine, JOBS[0]))
    cuda.calls.clear()
    engine.decode([sample, sample])
    copied = [arguments for name, arguments in cuda.calls if name == "cudaMemcpyAsync"]
    assert [(a[3].name, a[2]) for a in copied if "Host" in a[3].name] == [
        ("cudaMemcpyDeviceToHost", 2 * 64 * 64 * 3)
    ]


def test_an_embedding_that_lies_in_its_place_is_not_copied_again(
    engine: TensorRTEngine, cuda: FakeCuda
) -> None:
    conditioning = engine.encode([engine.tokenize(job.prompt) for job in JOBS])
    samples = [engine.put(starting_noise(engine, job)) for job in JOBS]
    copies = []
    for order in ([0, 1, 2, 3], [0, 1, 2, 3], [0, 1, 3, 2], [0, 1]):
        cuda.calls.clear()
        engine.denoise(
            [samples[row] for row in order],
            [0.9] * len(order),
            [0.5] * len(order),
            [conditioning[row] for row in order],
        )
        copies.append(cuda.count()["DeviceToDevice"] - 3 * len(order))  # x, x′ and x̂0 always are
    tensors = len(engine.manifest.conditioning)
    assert copies == [4 * tensors, 0, 2 * tensors, 0]


def test_rows_that_nobody_holds_are_used_again(engine: TensorRTEngine, cuda: FakeCuda) -> None:
    for _ in range(2):  # the denoiser remembers which embeddings lie in it: those of one batch more
        draw(engine, JOBS)
        gc.collect()
    before = cuda.count()["cudaMalloc"]
    for _ in range(2):
        draw(engine, JOBS)
        gc.collect()
    assert cuda.count()["cudaMalloc"] == before


def test_a_sample_stays_what_it_was(engine: TensorRTEngine) -> None:
    conditioning = engine.encode([engine.tokenize("red apple")])
    start = engine.put(starting_noise(engine, JOBS[0]))
    before = engine.decode([start])
    moved, preview = engine.denoise([start], [1.0], [0.5], conditioning)
    for _ in range(3):
        engine.denoise(moved, [0.5], [0.2], conditioning)
    assert np.array_equal(engine.decode([start]), before)
    assert not np.array_equal(engine.decode(moved), engine.decode(preview))


def test_run_is_the_graph_on_whole_batches(engine: TensorRTEngine, reference: Any) -> None:
    x = np.stack([starting_noise(engine, job) for job in JOBS])
    mine, theirs = engine.run("decoder", {"x": x}), reference.run("decoder", {"x": x})
    assert np.array_equal(mine["image"], theirs["image"])
    ids = engine._text.batch([engine.tokenize(job.prompt) for job in JOBS])
    (name,) = engine.manifest.components["text_encoder"].inputs
    for key, array in reference.run("text_encoder", {name: ids[name]}).items():
        assert np.array_equal(engine.run("text_encoder", {name: ids[name]})[key], array)


@pytest.mark.parametrize("group", [1, 2, 3])
def test_invariant_batches_give_the_same_bytes_in_any_company(
    load: Load, trt: FakeTensorRT, group: int
) -> None:
    engine = load(invariant_batch=group)
    together = draw(engine, JOBS)
    ran = [
        context.get_tensor_shape("x")[0]
        for context in trt.contexts
        if context.warm and "x" in context._shapes
    ]
    assert len(ran) == 2
    assert set(ran) == {group}
    for row, job in enumerate(JOBS):
        assert np.array_equal(draw(engine, [job])[0], together[row]), job
    assert np.array_equal(draw(engine, JOBS[::-1])[::-1], together)


def test_a_decoder_that_takes_fewer_pictures_is_called_more_often(
    load: Load, reference: Any, trt: FakeTensorRT, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engines.tensorrt_build, "DECODED_PIXELS", 2 * 64 * 64 + 1)
    engine = load()
    assert trt.settings[COMPONENTS.index("decoder")].profiles[0]["x"][2][0] == 2
    assert trt.settings[COMPONENTS.index("denoiser")].profiles[0]["x"][2][0] == 4
    mine = draw(engine, JOBS[:3])
    assert mine.shape == (3, 64, 64, 3)
    assert worst(mine, draw(reference, JOBS[:3])) <= 1


def test_each_batch_and_size_is_captured_once_and_replayed_after(
    engine: TensorRTEngine, trt: FakeTensorRT, cuda: FakeCuda
) -> None:
    draw(engine, JOBS[:2])
    assert trt.calls["captured"] == trt.calls["execute_async_v3"] / 2 == 5, (
        "four components, the denoiser at 1 and 2"
    )
    for _ in range(2):
        draw(engine, JOBS[:2])
    assert trt.calls["captured"] == 5
    assert trt.calls["execute_async_v3"] == 10, "once before each capture and once in it, never after"
    draw(engine, OBLONG)
    assert trt.calls["captured"] == 7, "text is no longer or shorter"
    assert cuda.count()["cudaGraphDestroy"] == 7


def test_each_graph_has_its_context_and_all_share_one_scratch_memory(
    engine: TensorRTEngine, trt: FakeTensorRT
) -> None:
    draw(engine, JOBS[:2])
    captured = [context for context in trt.contexts if context.warm]
    assert len(captured) == 5
    assert len({context.scratch for context in trt.contexts}) == 1
    assert trt.contexts[0].scratch[1] == SCRATCH


@pytest.mark.parametrize("how", ["says so", "fails"])
def test_an_engine_that_cannot_be_captured_runs_without_a_graph(
    load: Load, trt: FakeTensorRT, cuda: FakeCuda, reference: Any, how: str, caplog: pytest.LogCaptureFixture
) -> None:
    engine = load()
    trt.capturable = how != "says so"
    with caplog.at_level(logging.WARNING, "engines.tensorrt"):
        for job in JOBS[:2]:
            if how == "fails":
                cuda.fail("cudaStreamEndCapture", real.cudaError_t.cudaErrorStreamCaptureUnsupported)
            assert np.array_equal(draw(engine, [job]), draw(reference, [job]))
    assert "text_encoder at {'input_ids': (1, 12)} runs without a CUDA graph" in caplog.text
    if how == "says so":
        assert cuda.count()["cudaGraphLaunch"] == trt.calls["captured"] == 0
