"""Every real runtime makes the picture that diffusers makes, alone or in any batch."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import openvino as ov
import pytest
import torch
from diffusers import StableDiffusion3Pipeline
from numpy.typing import NDArray

from engines.base import Engine, EngineOptions, load_engine
from engines.bundle import Bundle
from engines.errors import ExecutionError, RuntimeUnavailable
from engines.openvino import OpenVINOEngine, choose_precision
from engines.openvino_report import FusionReport
from tests.engines.pictures import Job, draw, starting_noise, worst

JOBS = [
    Job("red apple", 1, 4),
    Job("woman firefighter with tears and a flag of japan", 2, 2),
    Job("", 3, 8),
    Job("Face", 4, 1),
    Job("🍎", 5, 4),
]
RUNTIMES = [("onnxruntime", "f32"), ("openvino", "f32"), ("openvino", "bf16")]

# Largest difference of any colour value, of 255, from diffusers in float32. Bfloat16 carries 8 bits through every
# layer; with these random weights, whose pictures are mostly edges, a step of an edge's value is the worst case.
FROM_DIFFUSERS = {"f32": 2, "bf16": 40}
ALONE_OR_BATCHED = {"f32": 1, "bf16": 20}


@pytest.fixture(scope="module", params=RUNTIMES, ids=lambda pair: "-".join(pair))
def engine(request: pytest.FixtureRequest, bundle: Bundle) -> Iterator[Engine]:
    runtime, precision = request.param
    loaded = load_engine(bundle, EngineOptions(runtime, precision, threads=1))
    yield loaded
    loaded.close()


@pytest.fixture(scope="module")
def pipeline(student: Path) -> StableDiffusion3Pipeline:
    loaded = StableDiffusion3Pipeline.from_pretrained(student, text_encoder_3=None, tokenizer_3=None)
    loaded.set_progress_bar_config(disable=True)
    return loaded


def diffusers_picture(pipeline: StableDiffusion3Pipeline, engine: Engine, job: Job) -> NDArray[np.uint8]:
    image = pipeline(
        job.prompt,
        guidance_scale=1.0,
        num_inference_steps=job.steps,
        sigmas=np.linspace(1, 1 / job.steps, job.steps).tolist(),
        latents=torch.from_numpy(starting_noise(engine, job)[None]),
        height=8 * job.size[0],
        width=8 * job.size[1],
        max_sequence_length=pipeline.tokenizer.model_max_length,
    ).images[0]
    return np.asarray(image)


@pytest.mark.parametrize("job", [*JOBS, Job("green apple", 6, 3, size=(6, 10))], ids=str)
def test_picture_equals_diffusers(engine: Engine, pipeline: StableDiffusion3Pipeline, job: Job) -> None:
    theirs = diffusers_picture(pipeline, engine, job)
    mine = draw(engine, [job])[0]
    assert theirs.std() > 20
    assert mine.shape == (8 * job.size[0], 8 * job.size[1], 3)
    assert worst(mine, theirs) <= FROM_DIFFUSERS[engine.info.precision]


def test_same_request_alone_or_in_a_batch_of_mixed_steps_is_the_same_picture(engine: Engine) -> None:
    together = draw(engine, JOBS)
    for row, job in enumerate(JOBS):
        assert worst(draw(engine, [job])[0], together[row]) <= ALONE_OR_BATCHED[engine.info.precision], job


@pytest.mark.parametrize("group", [1, 2, 3])
@pytest.mark.parametrize(("runtime", "precision"), RUNTIMES)
def test_invariant_batches_give_the_same_bytes_in_any_company(
    bundle: Bundle, runtime: str, precision: str, group: int
) -> None:
    options = EngineOptions(runtime, precision, threads=2, invariant_batch=group)
    engine = load_engine(bundle, options)
    together = draw(engine, JOBS)
    for row, job in enumerate(JOBS):
        assert np.array_equal(draw(engine, [job])[0], together[row]), job
    reversed_ = draw(engine, JOBS[::-1])[::-1]
    assert all(np.array_equal(mine, theirs) for mine, theirs in zip(reversed_, together, strict=True))
    engine.close()


def test_pictures_of_different_prompts_seeds_and_steps_differ(engine: Engine) -> None:
    jobs = [Job("red apple", 1, 4), Job("green apple", 1, 4), Job("red apple", 2, 4), Job("red apple", 1, 1)]
    assert len({picture.tobytes() for picture in draw(engine, jobs)}) == len(jobs)


def test_close_sigmas_are_different_times_in_any_precision(engine: Engine) -> None:
    # 1000·0.9 and 1000·0.9015 are the same bfloat16: a runtime that computes time in it cannot tell them apart.
    conditioning = engine.encode([engine.tokenize("red apple")]) * 2
    x = [engine.put(starting_noise(engine, JOBS[0]))] * 2
    _, x0 = engine.denoise(x, [0.9, 0.9015], [0.5, 0.5], conditioning)
    early, late = [(x[0] - x0[row]) / sigma for row, sigma in enumerate((0.9, 0.9015))]
    assert np.linalg.norm(early - late) / np.linalg.norm(early) > 1e-3


def test_last_step_lands_on_the_preview(engine: Engine) -> None:
    conditioning = engine.encode([engine.tokenize("red apple")])
    x, x0 = engine.denoise([engine.put(starting_noise(engine, JOBS[0]))], [0.5], [0.0], conditioning)
    np.testing.assert_allclose(x[0], x0[0], atol=1e-6)


def test_embeddings_do_not_keep_their_batch_alive(engine: Engine) -> None:
    rows = engine.encode([engine.tokenize(job.prompt) for job in JOBS])
    assert all(array.base is None for row in rows for array in row)


@pytest.mark.parametrize("shape", [(3, 8, 8), (8, 8), (8, 7, 7)])
def test_wrong_latent_is_an_execution_error_and_the_next_call_works(
    engine: Engine, shape: tuple[int, ...]
) -> None:
    conditioning = engine.encode([engine.tokenize("red apple")])
    with pytest.raises(ExecutionError, match="denoiser"):
        engine.denoise([engine.put(np.zeros(shape, np.float32))], [1.0], [0.5], conditioning)
    assert draw(engine, JOBS[:1]).shape == (1, 64, 64, 3)


def test_info_says_what_runs(engine: Engine) -> None:
    assert engine.info.version
    assert engine.info.device
    assert (engine.info.threads, engine.info.max_batch) == (1, 8)


def test_compiled_cache_gives_the_same_picture(bundle: Bundle, tmp_path: Path) -> None:
    options = EngineOptions("openvino", "f32", threads=1, cache_dir=tmp_path)
    pictures = [draw(load_engine(bundle, options), JOBS[:2]) for _ in range(2)]
    blobs = sorted(tmp_path.rglob("*.blob"), key=lambda blob: blob.stem)
    assert [blob.stem for blob in blobs] == [
        "decoder",
        "decoder-1x8x8",
        "denoiser-1x8x8",
        "denoiser-2x8x8",
        "text_encoder",
        "text_encoder-1",
        "text_encoder_2",
        "text_encoder_2-1",
    ]
    blobs[0].write_bytes(blobs[0].read_bytes()[:-1])  # a damaged file is compiled anew
    pictures.append(draw(load_engine(bundle, options), JOBS[:2]))
    assert pictures[0].tobytes() == pictures[1].tobytes() == pictures[2].tobytes()


@pytest.mark.parametrize(
    ("options", "memory", "batches"),
    [
        (EngineOptions("openvino", max_batch=6), 10**12, {1, 2, 4}),
        (EngineOptions("openvino", max_batch=8, invariant_batch=3), 10**12, {3}),
        (EngineOptions("openvino"), 0, set()),
    ],
)
def test_static_shapes_are_those_that_serving_asks_for_and_memory_has_room_for(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch, options: EngineOptions, memory: int, batches: set[int]
) -> None:
    """Whether a shape is static or not, a picture is the same but for rounding."""
    monkeypatch.setattr("engines.processor.memory_bytes", lambda: memory)
    engine = load_engine(bundle, replace(options, precision="f32", threads=1))
    assert isinstance(engine, OpenVINOEngine)
    assert {static.batch for static in engine._wanted if static.component == "denoiser"} == batches
    assert {static.batch for static in engine._wanted if static.component != "denoiser"} == (
        {min(batches)} if batches else set()
    )
    dynamic = load_engine(bundle, EngineOptions("openvino", "f32", threads=1, max_batch=8))
    assert np.abs(draw(engine, JOBS[:2]).astype(int) - draw(dynamic, JOBS[:2])).max() <= 1


@pytest.mark.parametrize(
    ("flags", "precision"),
    [
        ("flags : fpu avx512f amx_bf16", "bf16"),
        ("flags : avx512_bf16", "bf16"),
        ("flags : avx2 avx512f", "f32"),
    ],
)
def test_auto_precision_is_bf16_only_where_the_cpu_has_it(flags: str, precision: str, tmp_path: Path) -> None:
    (tmp_path / "cpuinfo").write_text(flags, encoding="utf-8")
    assert choose_precision("auto", tmp_path / "cpuinfo") == precision
    assert choose_precision("auto", tmp_path / "absent") == "f32"
    assert choose_precision("f32", tmp_path / "cpuinfo") == "f32"


@pytest.mark.parametrize("runtime", ["openvino", "onnxruntime"])
def test_unknown_precision_is_refused_with_those_there_are(bundle: Bundle, runtime: str) -> None:
    with pytest.raises(RuntimeUnavailable, match=r"precision='int3' .*: auto, f32"):
        load_engine(bundle, EngineOptions(runtime, "int3"))


@pytest.mark.parametrize("runtime", ["openvino", "onnxruntime"])
def test_graph_that_a_runtime_cannot_load_is_told_in_a_sentence(
    bundle: Bundle, tmp_path: Path, runtime: str
) -> None:
    """Their packages raise errors of their own, which share no base; `auto` goes on to the next."""
    graph = onnx.load(bundle.path("decoder"))
    graph.graph.node[0].op_type = "NoSuchOperator"
    folder = tmp_path / "bundle"
    shutil.copytree(bundle.root, folder)
    onnx.save(graph, folder / bundle.path("decoder").relative_to(bundle.root))
    broken = replace(bundle, root=folder)
    with pytest.raises(
        RuntimeUnavailable, match=f"{runtime} cannot load the decoder here .*; choose another --engine"
    ):
        load_engine(broken, EngineOptions(runtime, threads=1))
    with pytest.raises(
        RuntimeUnavailable, match=r"no runtime works here: openvino cannot .*; onnxruntime cannot"
    ):
        load_engine(broken, EngineOptions("auto", threads=1))


def test_openvinos_report_is_of_the_worst_graph_that_serves(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = load_engine(bundle, EngineOptions("openvino", threads=1, max_batch=3))
    assert isinstance(engine, OpenVINOEngine)
    good, seen = engine.fusion_report("denoiser"), []
    conditioning = engine.encode([engine.tokenize("red apple")]) * 3
    x = [engine.put(starting_noise(engine, JOBS[0]))] * 3
    for batch in (2, 3):
        engine.denoise(x[:batch], [1.0] * batch, [0.5] * batch, conditioning[:batch])

    def one_apart(compiled: ov.CompiledModel, source: ov.Model) -> FusionReport:
        batch = compiled.input("x").get_partial_shape()[0]
        seen.append(batch.is_static and batch.get_length())
        return replace(good, attentions_fused=good.attentions - (batch.is_static and batch.get_length() == 2))

    monkeypatch.setattr("engines.openvino.fusion_report", one_apart)
    assert engine.fusion_report("denoiser").attentions_fused == good.attentions - 1
    assert seen == [1, 2, False]


def test_graphs_are_compiled_when_a_call_first_needs_them(bundle: Bundle) -> None:
    """A single picture's at once; the engine is ready for it before the others are there."""
    engine = load_engine(bundle, EngineOptions("openvino", "f32", threads=1))
    assert isinstance(engine, OpenVINOEngine)
    assert {static.batch for static in engine._static} == {1}
    assert engine._dynamic == {}
    assert engine.fusion_report("denoiser").attentions > 0
    draw(engine, JOBS[:1])
    assert engine._dynamic == {}
    conditioning = engine.encode([engine.tokenize("red apple")]) * 3
    x = [engine.put(starting_noise(engine, JOBS[0]))] * 3
    engine.denoise(x, [1.0] * 3, [0.5] * 3, conditioning)
    assert set(engine._dynamic) == {"denoiser"}
    engine.denoise(x[:2], [1.0] * 2, [0.5] * 2, conditioning[:2])
    assert {static.batch for static in engine._static if static.component == "denoiser"} == {1, 2}
