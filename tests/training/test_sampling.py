"""Laws of the sampler."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

from engines.families.base import Family, load_family
from engines.noise import noise
from training.sampling import decode, generate, round_trip, sample, starting_noise, to_uint8

PROMPTS = ["red apple", "woman firefighter", "flag of japan"]


@pytest.fixture(scope="module")
def family(tiny_model: Path) -> Family:
    return load_family(tiny_model)


def test_noise_is_each_seeds_own(family):
    x = starting_noise(family, [5, 9])
    assert torch.equal(x[1], torch.from_numpy(noise(9, (8, 8, 8))))
    assert torch.equal(starting_noise(family, [9])[0], x[1])


def test_a_picture_is_the_same_alone_or_batched(family):
    cond = family.encode(PROMPTS)
    whole = sample(family, cond, family.sigmas(3), [1, 2, 3], 4.0, family.encode([""]))
    alone = sample(family, family.encode(PROMPTS[1:2]), family.sigmas(3), [2], 4.0, family.encode([""]))
    assert torch.allclose(whole[1:2], alone, atol=1e-4)
    assert np.abs(decode(family, whole[1:2]).astype(int) - decode(family, alone)).max() <= 1


def test_one_step_goes_from_noise_to_the_predicted_picture(family):
    """x̂0 = ε − v(ε, 1)."""
    cond = family.encode(PROMPTS)
    x = starting_noise(family, [1, 2, 3])
    v = family.velocity(family.transformer, x, torch.ones(3), cond)
    assert torch.allclose(sample(family, cond, family.sigmas(1), [1, 2, 3]), x - v, atol=1e-6)


def test_steps_follow_the_schedule_given(family):
    """Euler by hand, at sigmas of no scheduler."""
    cond, sigmas = family.encode(PROMPTS[:1]), (1.0, 0.6, 0.1, 0.0)
    x = starting_noise(family, [4])
    for sigma, after in pairwise(sigmas):
        x = x + (after - sigma) * family.velocity(family.transformer, x, torch.tensor([sigma]), cond)
    assert torch.allclose(sample(family, cond, sigmas, [4]), x, atol=1e-6)


def test_guidance_extrapolates_from_the_empty_prompt(family):
    cond, uncond, sigmas = family.encode(PROMPTS[:1]), family.encode([""]), family.sigmas(1)
    plain, empty = sample(family, cond, sigmas, [7]), sample(family, uncond, sigmas, [7])
    guided = sample(family, cond, sigmas, [7], 3.0, uncond)
    # One Euler step is linear in v.
    assert torch.allclose(guided, empty + 3 * (plain - empty), atol=1e-5)
    assert not torch.allclose(guided, plain, atol=1e-3)


def test_guidance_zero_is_the_empty_prompt(family):
    cond, uncond, sigmas = family.encode(PROMPTS[:1]), family.encode([""]), family.sigmas(2)
    assert torch.allclose(
        sample(family, cond, sigmas, [7], 0.0, uncond), sample(family, uncond, sigmas, [7]), atol=1e-5
    )


def test_generate_does_not_depend_on_the_batch_size_and_reports_every_picture(family):
    told = []
    small = generate(family, PROMPTS, [1, 2, 3], 2, guidance=2.0, batch=2, progress=told.append)
    whole = generate(family, PROMPTS, [1, 2, 3], 2, guidance=2.0, batch=3)
    assert told == [2, 1]
    assert small.shape == (3, 64, 64, 3)
    assert small.dtype == np.uint8
    assert np.abs(small.astype(int) - whole).max() <= 1
    assert len({picture.tobytes() for picture in whole}) == 3


def test_a_transformer_in_bfloat16_keeps_latents_in_float32(tiny_model):
    family = load_family(tiny_model)
    exact = sample(family, family.encode(PROMPTS), family.sigmas(2), [1, 2, 3])
    family.transformer.to(torch.bfloat16)
    rounded = sample(family, family.encode(PROMPTS), family.sigmas(2), [1, 2, 3])
    assert rounded.dtype == torch.float32
    assert 0 < float((rounded - exact).norm() / exact.norm()) < 0.05


def test_round_trip_is_decode_of_encode(family):
    pictures = np.random.default_rng(0).integers(0, 256, (3, 64, 64, 3), dtype=np.uint8)
    x = torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 127.5 - 1
    with torch.no_grad():
        expected = to_uint8(family.vae.decode(family.vae.encode(x).latents).sample)
    got = round_trip(family, pictures, batch=2)
    assert got.shape == pictures.shape
    assert np.abs(got.astype(int) - expected).max() <= 1


def test_pictures_are_clamped_and_rounded():
    x = torch.tensor([-2.0, -1.0, 0.0, 1.0, 7.0]).view(1, 1, 1, 5).expand(1, 3, 1, 5)
    assert to_uint8(x)[0, 0, :, 0].tolist() == [0, 0, 128, 255, 255]
