"""What training asks of a family equals diffusers' pipeline: guided pictures, the empty prompt, gradients.

Without guidance `tests/engines/test_sd3.py`, `test_longcat.py` and `test_folders.py` compare text, packing, positions,
times, shifts and pictures, `test_export_hub.py` hub ids.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    LongCatImagePipeline,
    LongCatImageTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from torch import Tensor

from engines.families.base import Family, load_family
from engines.families.loading import quiet
from engines.families.longcat import pack, unpack
from tests.folders import FOLDERS
from tests.training.family_cases import inputs
from training.sampling import sample, starting_noise

GUIDANCE = 4.5
PROMPTS = ["red apple", "woman firefighter with tears of a flag and more than fits " * 3]
SIZE = (8, 12)
"""Of pictures, in latent pixels."""


@pytest.fixture(scope="module", params=["sd3-medium", "sd35-medium", "longcat"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return FOLDERS[request.param](tmp_path_factory.mktemp("teacher") / request.param)


@pytest.fixture(scope="module")
def family(folder: Path) -> Family:
    loaded = load_family(folder)
    loaded.latent_size = SIZE
    return loaded


@pytest.fixture(scope="module")
def pipeline(folder: Path, family: Family) -> Any:
    """As diffusers loads it, with nothing of ours in it."""
    with quiet():
        if family.name == "longcat":
            loaded = LongCatImagePipeline.from_pretrained(folder, text_processor=None)
        else:
            without = {} if family.has_t5 else {"text_encoder_3": None, "tokenizer_3": None}
            loaded = StableDiffusion3Pipeline.from_pretrained(folder, **without)
    loaded.set_progress_bar_config(disable=True)
    return loaded


def painted(
    family: Family, pipeline: Any, prompts: list[str], noise: Tensor, steps: int, **options: Any
) -> Tensor:
    """In [0, 1], by the pipeline with its defaults, but for the T5's zero rows that SD3 without one has."""
    common = {
        "height": 8 * SIZE[0], "width": 8 * SIZE[1], "num_inference_steps": steps, "output_type": "pt",
        "guidance_scale": GUIDANCE, **options,
    }  # fmt: skip
    if family.name == "longcat":  # guided, it takes one prompt at a time
        pictures = [
            pipeline(prompt, latents=pack(row[None]), enable_prompt_rewrite=False, **common).images
            for prompt, row in zip(prompts, noise, strict=True)
        ]
        return torch.cat(pictures)
    with quiet():  # it tells what is cut off a prompt
        images: Tensor = pipeline(
            prompts, latents=noise, sigmas=np.linspace(1, 1 / steps, steps).tolist(),
            max_sequence_length=family.t5_length, **common,
        ).images  # fmt: skip
    return images


@torch.no_grad()
def test_guided_pictures_are_the_pipelines(family: Family, pipeline: Any) -> None:
    seeds, steps = [1, 2], 3
    theirs = painted(family, pipeline, PROMPTS, starting_noise(family, seeds), steps)
    assert theirs.std() > 0.05
    latents = sample(
        family, family.encode(PROMPTS), family.sigmas(steps), seeds, GUIDANCE, family.encode([""])
    )
    torch.testing.assert_close((family.decode(latents) / 2 + 0.5).clamp(0, 1), theirs, atol=5e-5, rtol=0)
    other = {"enable_cfg_renorm": False} if family.name == "longcat" else {"guidance_scale": 1.0}
    plain = painted(family, pipeline, PROMPTS, starting_noise(family, seeds), steps, **other)
    assert (plain - theirs).abs().max() > 1e-2  # the default is what is compared


@torch.no_grad()
def test_empty_prompt_is_the_pipelines_negative_one(family: Family, pipeline: Any) -> None:
    mine = family.encode([""])
    if family.name == "longcat":
        theirs, _ = pipeline.encode_prompt("")
        torch.testing.assert_close(mine["encoder_hidden_states"], theirs, atol=1e-5, rtol=0)
        return
    with quiet():
        _, text, _, pooled = pipeline.encode_prompt(
            PROMPTS[:1], None, None, do_classifier_free_guidance=True, max_sequence_length=family.t5_length
        )
    torch.testing.assert_close(spread(family, mine["encoder_hidden_states"]), text, atol=1e-6, rtol=0)
    torch.testing.assert_close(mine["pooled_projections"], pooled, atol=1e-6, rtol=0)


def spread(family: Family, text: Tensor) -> Tensor:
    """SD3's text as the pipeline has it: the last token as often as it stands for."""
    return torch.cat([text[:, :-1], text[:, -1:].expand(-1, family.text_weight, -1)], dim=1)


def test_gradients_are_those_of_the_pipelines_own_call(folder: Path, family: Family) -> None:
    """Of x, and of every weight, through diffusers' transformer, its own attention and its units of time."""
    x, sigma, cond = inputs(family)
    weights = torch.randn(x.shape, generator=torch.Generator().manual_seed(8))
    height, width = x.shape[2:]
    text = cond["encoder_hidden_states"]

    def taken(transformer: torch.nn.Module, v: Tensor, at: Tensor) -> list[Tensor]:
        named = [parameter for _, parameter in sorted(transformer.named_parameters())]
        # In SD3's last block the text's queries are nobody's: diffusers takes a gradient of 0, we none.
        return list(torch.autograd.grad((v * weights).sum(), [at, *named], materialize_grads=True))

    mine = load_family(folder, only=("transformer",))
    mine.transformer.requires_grad_(True)
    at = x.clone().requires_grad_()
    found = taken(mine.transformer, mine.velocity(mine.transformer, at, sigma, cond), at)

    kind = LongCatImageTransformer2DModel if family.name == "longcat" else SD3Transformer2DModel
    theirs = kind.from_pretrained(folder / "transformer").requires_grad_(True)
    at = x.clone().requires_grad_()
    if family.name == "longcat":
        # As LongCatImagePipeline.__call__ prepares them.
        latents = LongCatImagePipeline._pack_latents(at, *x.shape)
        image_ids = pipeline_ids("image", 1, (512, 512), height=height // 2, width=width // 2)
        text_ids = pipeline_ids("text", 0, (0, 0), num_token=text.shape[1])
        tokens = theirs(
            hidden_states=latents, timestep=sigma * 1000 / 1000, guidance=None, encoder_hidden_states=text,
            txt_ids=text_ids, img_ids=image_ids, return_dict=False,
        )[0]  # fmt: skip
        v = unpack(tokens, height, width)
    else:
        v = theirs(
            hidden_states=at, timestep=sigma * 1000, encoder_hidden_states=spread(family, text),
            pooled_projections=cond["pooled_projections"], return_dict=False,
        )[0]  # fmt: skip
    wanted = taken(theirs, v, at)
    assert wanted[0].abs().max() > 1e-2
    for mine_of, theirs_of in zip(found, wanted, strict=True):
        torch.testing.assert_close(mine_of, theirs_of, atol=2e-5, rtol=2e-4)


def pipeline_ids(kind: str, modality: int, start: tuple[int, int], **size: int) -> Tensor:
    from diffusers.pipelines.longcat_image.pipeline_longcat_image import prepare_pos_ids

    ids: Tensor = prepare_pos_ids(modality_id=modality, type=kind, start=start, **size)
    return ids
