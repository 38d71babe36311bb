"""Pictures from a family: batched Euler sampling at any step count, with or without classifier-free guidance.

    latents = sample(family, family.encode(prompts), family.sigmas(4), seeds)          # scaled latents (B, C, H, W)
    pictures = decode(family, latents)                                                 # uint8 (B, height, width, 3)

A picture depends on its prompt, its seed and the schedule; in float32 not on what it shares a batch with.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from engines.families.base import Conditioning, Family
from engines.noise import noise
from training.draws import generator


def starting_noise(family: Family, seeds: Sequence[int]) -> Tensor:
    """float32 `(len(seeds), C, H, W)` on the transformer's device; a generator a picture, as the server draws it."""
    shape = (family.latent_channels, *family.latent_size)
    drawn = torch.from_numpy(np.stack([noise(seed, shape) for seed in seeds]))
    return drawn.to(next(family.transformer.parameters()).device)


@torch.no_grad()
def sample(
    family: Family,
    conditioning: Conditioning,
    sigmas: Sequence[float],
    seeds: Sequence[int],
    guidance: float = 1.0,
    uncond: Conditioning | None = None,
) -> Tensor:
    """Integrate dx/dσ = v from noise at `sigmas[0]` down to `sigmas[-1]` with Euler steps: x' = x + (σ' − σ)·v.

    With guidance g ≠ 1, v is `family.guided(v_c, v_∅, g)`: the diffusers pipeline's. Both halves are one forward.

    Args:
        conditioning: embeddings of B prompts.
        sigmas: after the scheduler's shift, from `family.sigmas(n)`.
        seeds: B seeds.
        uncond: embeddings of the empty prompt, for one row or B; needed with guidance.

    Returns:
        Scaled latents, float32 `(B, C, H, W)`.
    """
    x_BCHW = starting_noise(family, seeds)
    device = x_BCHW.device
    conditioning = {name: tensor.to(device) for name, tensor in conditioning.items()}
    guided = guidance != 1.0
    if guided:
        assert uncond is not None, "guidance needs the empty prompt's embeddings"
        conditioning = {
            name: torch.cat([uncond[name].to(device).expand(len(seeds), *tensor.shape[1:]), tensor])
            for name, tensor in conditioning.items()
        }
    for sigma, sigma_next in pairwise(sigmas):
        inputs = torch.cat([x_BCHW, x_BCHW]) if guided else x_BCHW
        sigma_B = torch.full((len(inputs),), sigma, device=device)
        v = family.velocity(family.transformer, inputs, sigma_B, conditioning)
        if guided:
            v_uncond, v_cond = v.chunk(2)
            v = family.guided(v_cond, v_uncond, guidance)
        x_BCHW = x_BCHW + (sigma_next - sigma) * v
    return x_BCHW


@torch.no_grad()
def sample_renoise(
    family: Family, conditioning: Conditioning, sigmas: Sequence[float], seeds: Sequence[int]
) -> Tensor:
    """Multistep consistency sampling (Song et al. 2023): x̂0 = x − σ·v, then x' = (1−σ')·x̂0 + σ'·ε with fresh noise.

    Arguments and result as `sample` has them; a step's ε depends on the seed and the step's number. (Euler steps of a
    consistency student lead off its trajectories: on the toy flow its error grows with each.)
    """
    x_BCHW = starting_noise(family, seeds)
    device = x_BCHW.device
    conditioning = {name: tensor.to(device) for name, tensor in conditioning.items()}
    for number, (sigma, sigma_next) in enumerate(pairwise(sigmas)):
        sigma_B = torch.full((len(seeds),), sigma, device=device)
        x_BCHW = x_BCHW - sigma * family.velocity(family.transformer, x_BCHW, sigma_B, conditioning)
        if sigma_next > 0:
            shape = x_BCHW.shape[1:]
            eps = torch.stack([torch.randn(shape, generator=generator(seed, number)) for seed in seeds])
            x_BCHW = (1 - sigma_next) * x_BCHW + sigma_next * eps.to(device)
    return x_BCHW


@torch.no_grad()
def decode(family: Family, latents_BCHW: Tensor) -> NDArray[np.uint8]:
    """Pictures `(B, height, width, 3)`, rounded as diffusers' image processor rounds."""
    return to_uint8(family.decode(latents_BCHW.to(next(family.vae.parameters()).device)))


@torch.no_grad()
def round_trip(family: Family, pictures_NHWC: NDArray[np.uint8], batch: int = 16) -> NDArray[np.uint8]:
    """Pictures through the family's autoencoder and back: the best that a generator in its latents can do."""
    dtype = next(family.vae.parameters()).dtype
    parts = []
    for at in range(0, len(pictures_NHWC), batch):
        pictures = torch.from_numpy(np.array(pictures_NHWC[at : at + batch])).permute(0, 3, 1, 2)
        encoded = family.vae.encode((pictures.float() / 127.5 - 1).to(dtype))  # type: ignore[operator]
        # A KL autoencoder gives a distribution, a tiny one the latents themselves.
        latents = encoded.latent_dist.mode() if hasattr(encoded, "latent_dist") else encoded.latents
        parts.append(to_uint8(family.vae.decode(latents).sample))  # type: ignore[operator]
    return np.concatenate(parts)


def to_uint8(pictures_BCHW: Tensor) -> NDArray[np.uint8]:
    """About [−1, 1] `(B, 3, height, width)` → uint8 `(B, height, width, 3)`."""
    unit = (pictures_BCHW.float() / 2 + 0.5).clamp(0, 1)
    result: NDArray[np.uint8] = (
        (unit * 255).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous().cpu().numpy()
    )
    return result


def generate(
    family: Family,
    prompts: Sequence[str],
    seeds: Sequence[int],
    steps: int,
    guidance: float = 1.0,
    batch: int = 16,
    progress: Callable[[int], None] | None = None,
    sigmas: Sequence[float] = (),
    renoise: bool = False,
) -> NDArray[np.uint8]:
    """One picture per prompt and seed, `batch` at a time: uint8 `(N, height, width, 3)`.

    Args:
        sigmas: a schedule other than the family's own of `steps`: after the shift, ending in 0.
        renoise: `sample_renoise` in the place of Euler steps; without guidance only.
        progress: told the number of pictures just finished, after every batch.
    """
    sigmas = sigmas or family.sigmas(steps)
    uncond = family.encode([""]) if guidance != 1.0 else None
    parts = []
    for at in range(0, len(prompts), batch):
        chosen = slice(at, at + batch)
        cond = family.encode(prompts[chosen])
        if renoise:
            latents = sample_renoise(family, cond, sigmas, seeds[chosen])
        else:
            latents = sample(family, cond, sigmas, seeds[chosen], guidance, uncond)
        parts.append(decode(family, latents))
        if progress is not None:
            progress(len(parts[-1]))
    return np.concatenate(parts)
