"""The SD3 family computes what `StableDiffusion3Pipeline` computes."""

from __future__ import annotations

import json
import shutil
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import StableDiffusion3Pipeline
from huggingface_hub.errors import LocalEntryNotFoundError

from engines.families.base import FamilyError, load_family
from engines.families.sd3 import SD3Family

PROMPTS = ["red apple", "woman firefighter with tears of ÅJapan's flag xyz and more than fits", ""]


@pytest.fixture(scope="module")
def family(student: Path) -> SD3Family:
    loaded = load_family(student)
    assert isinstance(loaded, SD3Family)
    return loaded


@pytest.fixture(scope="module")
def pipeline(student: Path) -> StableDiffusion3Pipeline:
    loaded = StableDiffusion3Pipeline.from_pretrained(student, text_encoder_3=None, tokenizer_3=None)
    loaded.set_progress_bar_config(disable=True)
    return loaded


@torch.no_grad()
def test_embeddings_equal_the_pipelines(family: SD3Family, pipeline: StableDiffusion3Pipeline) -> None:
    mine = family.encode(PROMPTS)
    embeds, _, pooled, _ = pipeline.encode_prompt(
        PROMPTS, None, None, do_classifier_free_guidance=False, max_sequence_length=family.t5_length
    )
    text = mine["encoder_hidden_states"]
    assert text.shape[1] == family.clip_length + 1
    last = text[:, -1:].expand(-1, family.text_weight, -1)
    assert torch.equal(torch.cat([text[:, :-1], last], dim=1), embeds)
    assert torch.equal(mine["pooled_projections"], pooled)
    assert not torch.equal(mine["encoder_hidden_states"][0], mine["encoder_hidden_states"][2])


@torch.no_grad()
@pytest.mark.parametrize("steps", [1, 4, 7])
def test_sampling_by_hand_equals_the_pipelines_picture(
    family: SD3Family, pipeline: StableDiffusion3Pipeline, steps: int
) -> None:
    noise = torch.randn((3, 8, *family.latent_size), generator=torch.Generator().manual_seed(1))
    conditioning, x = family.encode(PROMPTS), noise.clone()
    sigmas = family.sigmas(steps)
    for sigma, sigma_next in pairwise(sigmas):
        velocity = family.velocity(family.transformer, x, torch.full((3,), sigma), conditioning)
        x = x + (sigma_next - sigma) * velocity
    theirs = pipeline(
        PROMPTS, guidance_scale=1.0, num_inference_steps=steps, sigmas=np.linspace(1, 1 / steps, steps).tolist(),
        latents=noise, output_type="pt", max_sequence_length=family.t5_length,
    ).images  # fmt: skip
    assert theirs.std() > 0.1
    torch.testing.assert_close((family.decode(x) / 2 + 0.5).clamp(0, 1), theirs, atol=1e-5, rtol=0)


@pytest.mark.parametrize("shift", [1.0, 1.1, 3.0])
def test_sigmas_are_shifted_and_fall_from_exactly_one_to_zero(family: SD3Family, shift: float) -> None:
    family.scheduler = type(family.scheduler).from_config(family.pipeline.scheduler.config, shift=shift)
    try:
        for steps in range(1, 9):
            plain = np.linspace(1, 1 / steps, steps)
            expected = [*(shift * plain / (1 + (shift - 1) * plain)), 0.0]
            np.testing.assert_allclose(family.sigmas(steps), expected, atol=1e-6)
            assert family.sigmas(steps)[0] == 1.0
    finally:
        family.scheduler = family.pipeline.scheduler


def test_saved_folder_is_the_same_model_with_the_given_transformer(family: SD3Family, tmp_path: Path) -> None:
    other = type(family.transformer).from_config(family.transformer.config)
    family.save(tmp_path / "saved", transformer=other)
    again = load_family(tmp_path / "saved")
    for name, weights in again.transformer.state_dict().items():
        assert torch.equal(weights, other.state_dict()[name]), name
    assert torch.equal(
        again.encode(PROMPTS)["pooled_projections"], family.encode(PROMPTS)["pooled_projections"]
    )
    assert not list((tmp_path / "saved").rglob("*.bin"))


def test_velocity_keeps_the_samples_dtype_and_tells_close_times_apart(student: Path) -> None:
    half = load_family(student, torch.bfloat16)
    x, conditioning = torch.randn((1, 8, 8, 8)), half.encode(["red apple"])
    with torch.no_grad():
        # 1000·0.9 and 1000·0.9015 are the same bfloat16.
        early, late = [
            half.velocity(half.transformer, x, torch.tensor([s]), conditioning) for s in (0.9, 0.9015)
        ]
    assert early.dtype == torch.float32
    assert not torch.equal(early, late)


def test_missing_component_is_named(student: Path, tmp_path: Path) -> None:
    broken = shutil.copytree(student, tmp_path / "broken")
    shutil.rmtree(broken / "vae")
    with pytest.raises(FamilyError, match="vae"):
        load_family(broken)


def test_pickled_weights_are_not_loaded(student: Path, tmp_path: Path) -> None:
    pickled = shutil.copytree(student, tmp_path / "pickled")
    weights = pickled / "transformer" / "diffusion_pytorch_model.safetensors"
    torch.save({}, weights.with_suffix(".bin"))
    weights.unlink()
    with pytest.raises(FamilyError, match="safetensors"):
        load_family(pickled)


def test_unknown_pipeline_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "OtherPipeline"}), encoding="utf-8")
    with pytest.raises(FamilyError, match="'OtherPipeline'; families known here: StableDiffusion3Pipeline"):
        load_family(tmp_path)


def test_id_of_no_folder_is_asked_of_the_hub(
    student: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The download and diffusers' own loader are stood in for by a local folder: no test has a network."""
    monkeypatch.chdir(tmp_path)
    asked: list[tuple[str, object]] = []

    def download(repo: str, file: str) -> str:
        asked.append((repo, file))
        return str(student / file)

    load_config, from_pretrained = (
        StableDiffusion3Pipeline.load_config, StableDiffusion3Pipeline.from_pretrained
    )  # fmt: skip

    def resolved(load: Any) -> Any:
        def call(source: str, **options: Any) -> Any:
            if source != "someone/a-model":  # diffusers' own calls from within
                return load(source, **options)
            asked.append((source, options.pop("local_files_only")))
            return load(str(student), **options)

        return call

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    monkeypatch.setattr(StableDiffusion3Pipeline, "load_config", resolved(load_config))
    monkeypatch.setattr(StableDiffusion3Pipeline, "from_pretrained", resolved(from_pretrained))
    family = load_family(Path("someone/a-model"))
    assert asked == [("someone/a-model", "model_index.json"), *[("someone/a-model", False)] * 2]
    assert isinstance(family, SD3Family)

    asked.clear()
    shutil.copytree(student, tmp_path / "someone" / "a-model")
    load_family(Path("someone/a-model"))
    assert asked == [("someone/a-model", True)] * 2  # a folder of that name is local, and asks nobody


def test_hub_that_cannot_be_reached_is_told_with_the_remedy(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def offline(*_: object) -> str:
        raise LocalEntryNotFoundError("Cannot find the requested files in the disk cache.\nMore.")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", offline)
    with pytest.raises(FamilyError, match=r"no folder a/b, and the hub's model 'a/b' .*name a local") as told:
        load_family(Path("a/b"))
    assert "\n" not in str(told.value)
