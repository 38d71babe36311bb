"""Peers run the same weights: random SD3 folders, diffusers' pipeline, OpenVINO GenAI's."""

from __future__ import annotations

import functools
import itertools
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline

from benchmarks.peers import Workload
from benchmarks.peers.diffusers_peer import DiffusersModel
from benchmarks.peers.genai import GenAIModel, genai_model
from benchmarks.peers.genai_folder import convert, is_conversion
from benchmarks.random_sd3 import SCALES, _transformer, build_random_sd3
from engines.families.base import FamilyError, load_family
from engines.noise import noise

WORKLOAD = Workload("a red apple", steps=3, batch=2, height=48, width=80)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_random_sd3(tmp_path_factory.mktemp("random") / "tiny", "tiny")


@pytest.fixture(scope="module")
def converted(folder: Path) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CI", "true")  # OpenVINO's telemetry takes longer than the conversion
        return convert(folder, folder.with_name("tiny-genai"), WORKLOAD.steps)


@pytest.fixture(scope="module")
def model(folder: Path) -> DiffusersModel:
    return DiffusersModel(folder, torch.float32)


# random weights


def test_a_random_folder_loads_everywhere_and_paints_something(folder: Path) -> None:
    pipeline: Any = StableDiffusion3Pipeline.from_pretrained(
        str(folder), use_safetensors=True, text_encoder_3=None, tokenizer_3=None
    )
    assert type(pipeline.vae).__name__ == "AutoencoderKL"
    assert pipeline.scheduler.config.shift == 3.0
    family = load_family(folder)
    conditioning = family.encode(["a red apple", "tears"])
    assert all(tensor.std() > 0.05 for tensor in conditioning.values())
    x = torch.from_numpy(WORKLOAD.noise(16, 8))
    velocity = family.velocity(family.transformer, x, torch.full((2,), 0.7), conditioning)
    picture = family.decode(x - velocity)
    for tensor in (velocity, picture):
        assert tensor.isfinite().all()
        assert tensor.std() > 0.1
    assert not torch.allclose(velocity[0], velocity[1], atol=0.1)


def test_weights_depend_on_the_seed_alone_and_are_stored_in_16_bits(folder: Path, tmp_path: Path) -> None:
    name = "transformer/diffusion_pytorch_model.safetensors"
    again = build_random_sd3(tmp_path / "again", "tiny")
    other = build_random_sd3(tmp_path / "other", "tiny", seed=1, layers=1)
    assert (again / name).read_bytes() == (folder / name).read_bytes()
    states = [
        SD3Transformer2DModel.from_pretrained(str(path / "transformer"), use_safetensors=True)
        for path in (folder, other)
    ]
    assert [len(state.transformer_blocks) for state in states] == [2, 1]
    assert not torch.equal(states[0].proj_out.weight, states[1].proj_out.weight)
    parameters = sum(parameter.numel() for parameter in states[0].state_dict().values())
    assert (folder / name).stat().st_size == pytest.approx(2 * parameters, rel=0.05)


@pytest.mark.parametrize(("scale", "millions"), [("75m", (75, 76)), ("medium", (2000, 2100))])
def test_scales_have_the_sizes_they_are_named_for(scale: str, millions: tuple[int, int]) -> None:
    size = SCALES[scale]
    with torch.device("meta"):
        count = sum(parameter.numel() for parameter in _transformer(size, size.layers).parameters())
    assert millions[0] <= count / 1e6 <= millions[1]
    assert sum(size.clip_widths) <= size.joint_dim


# workloads


def test_a_picture_has_its_noise_alone_or_in_a_batch() -> None:
    start = WORKLOAD.noise(4, 8)
    assert start.shape == (2, 4, 6, 10)
    np.testing.assert_array_equal(start[1], noise(WORKLOAD.seed + 1, (4, 6, 10)))


# diffusers


def test_a_step_is_one_call_of_the_transformer_as_the_pipeline_makes_it(model: DiffusersModel) -> None:
    peer = model.peer(WORKLOAD)
    calls: list[Any] = []
    hook = model.pipeline.transformer.register_forward_pre_hook(
        lambda _, arguments, keywords: calls.append(keywords), with_kwargs=True
    )
    try:
        peer.step()
        assert len(calls) == 1
        picture = peer.picture()
    finally:
        hook.remove()
    assert len(calls) == 1 + WORKLOAD.steps
    first, again = calls[:2]
    assert first.keys() == again.keys()
    for name in ("hidden_states", "encoder_hidden_states", "pooled_projections", "timestep"):
        torch.testing.assert_close(first[name], again[name])
    assert first["hidden_states"].shape == (2, 16, 6, 10)
    assert first["encoder_hidden_states"].shape == (2, 2 * 77, 64)
    assert picture.shape == (2, 48, 80, 3)
    assert picture.dtype == np.uint8
    assert peer.name == "diffusers float32"
    np.testing.assert_array_equal(peer.picture(), picture)


def test_a_compiled_transformer_is_one_graph_compiled_once(
    model: DiffusersModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else a compilation, or a break in the graph, would be timed as a step. (Code is not generated here.)"""
    runs: list[Any] = []

    def backend(graph: Any, examples: Any) -> Any:
        return lambda *arguments: runs.append(examples) or graph.forward(*arguments)  # type: ignore[func-returns-value]

    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=backend))
    torch.compiler.reset()
    with torch._dynamo.config.patch(error_on_recompile=True):
        peer = model.peer(WORKLOAD, compiled=True)
        peer.step()
        assert len(runs) == 1
        picture = peer.picture()
    assert len(runs) == 1 + WORKLOAD.steps
    assert peer.name == "torch.compile float32"
    eager = model.peer(WORKLOAD)
    eager.step()
    assert np.abs(picture.astype(int) - eager.picture()).max() <= 1
    assert len(runs) == 1 + WORKLOAD.steps, "eager runs the compiled transformer"


def test_diffusers_paints_what_the_family_paints(model: DiffusersModel, folder: Path) -> None:
    """The engines' model: one zero row for the T5's, the family's sigmas."""
    family = load_family(folder)
    x = torch.from_numpy(WORKLOAD.noise(16, 8))
    sigmas = family.sigmas(WORKLOAD.steps)
    conditioning = family.encode([WORKLOAD.prompt] * 2)
    with torch.no_grad():
        for sigma, sigma_next in itertools.pairwise(sigmas):
            x = x + (sigma_next - sigma) * family.velocity(
                family.transformer, x, torch.full((2,), sigma), conditioning
            )
        picture = family.decode(x).permute(0, 2, 3, 1).numpy()
    expected = np.clip(np.round((picture + 1) * 127.5), 0, 255)
    assert np.abs(model.peer(WORKLOAD).picture() - expected).max() <= 1


# OpenVINO GenAI


@pytest.mark.parametrize(("height", "width", "batch"), [(48, 80, 2), (64, 64, 1)])
def test_genai_paints_the_same_picture(
    model: DiffusersModel, converted: Path, height: int, width: int, batch: int
) -> None:
    workload = Workload(WORKLOAD.prompt, WORKLOAD.steps, batch, height, width, seed=5)
    peer = GenAIModel(converted, threads=1, precision="f32").peer(workload)
    peer.step()
    picture = peer.picture()
    expected = model.peer(workload).picture()
    assert expected.std() > 20
    # GenAI cuts colours off where diffusers rounds them: one of 255.
    assert np.abs(picture.astype(int) - expected).max() <= 1
    # Compiled for `batch`, it could not run the twice as many of guidance.
    assert len(peer.steps_ms()) == workload.steps
    assert all(milliseconds > 0 for milliseconds in peer.steps_ms())


def test_a_conversion_leaves_torch_as_it_was(converted: Path) -> None:
    """OpenVINO's frontend patches torch for good: a softmax's gradient would be float32 from then on."""
    scores = torch.randn(1, 3, 3, dtype=torch.float64, requires_grad=True)
    torch.softmax(scores.bmm(scores), -1).sum().backward()
    assert scores.grad is not None
    assert scores.grad.dtype == torch.float64
    assert torch.bmm(scores, scores).dtype == torch.float64


def test_genai_has_the_pipelines_schedule(model: DiffusersModel, converted: Path) -> None:
    """GenAI's scheduler is diffusers' own default path, without sigmas."""
    config = json.loads((converted / "scheduler" / "scheduler_config.json").read_text())
    scheduler: Any = FlowMatchEulerDiscreteScheduler.from_config(config)
    scheduler.set_timesteps(WORKLOAD.steps)
    ours: Any = model.pipeline.scheduler
    ours.set_timesteps(sigmas=WORKLOAD.sigmas())
    torch.testing.assert_close(scheduler.sigmas, ours.sigmas)


def test_a_conversion_is_kept_until_its_source_changes(folder: Path, converted: Path, tmp_path: Path) -> None:
    steps = WORKLOAD.steps
    written = (converted / "transformer" / "openvino_model.xml").stat().st_mtime_ns
    assert genai_model(folder, converted, steps, threads=1).name == "openvino genai bf16"
    assert (converted / "transformer" / "openvino_model.xml").stat().st_mtime_ns == written
    assert not is_conversion(folder, converted, steps + 1)
    assert not is_conversion(folder, tmp_path / "nothing", steps)
    moved = shutil.copytree(folder, tmp_path / "moved")
    assert is_conversion(moved, converted, steps)
    os.utime(moved / "vae" / "config.json")
    assert not is_conversion(moved, converted, steps)


def test_what_cannot_be_converted_ends_in_one_sentence(folder: Path, tmp_path: Path) -> None:
    source = shutil.copytree(folder, tmp_path / "source")
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.txt").write_text("years of work")
    with pytest.raises(FamilyError, match="mine is there and was not made by this conversion"):
        convert(source, mine, 4)
    assert (mine / "thesis.txt").exists()
    index = json.loads((source / "model_index.json").read_text())
    for change, message in (
        ({"text_encoder_3": ["transformers", "T5EncoderModel"]}, "has a T5"),
        ({"_class_name": "FluxPipeline"}, "is a FluxPipeline"),
    ):
        (source / "model_index.json").write_text(json.dumps({**index, **change}))
        with pytest.raises(FamilyError, match=message):
            convert(source, tmp_path / "out", 4)
    with pytest.raises(FamilyError, match=r"model_index.json is missing or unreadable"):
        convert(tmp_path / "nowhere", tmp_path / "out", 4)
    assert not (tmp_path / "out").exists()


def test_genai_is_imported_only_when_it_is_used() -> None:
    code = "import benchmarks.peers.genai, sys; print(*sys.modules)"
    loaded = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout.split()
    assert "benchmarks.peers.genai" in loaded
    assert not {"openvino", "openvino_genai", "openvino_tokenizers", "torch", "diffusers"} & set(loaded)
