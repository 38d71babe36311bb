"""A quick look at a model while it trains: one PNG of fixed prompts and seeds."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from engines.families.base import Family
from training.sampling import decode, sample


def tile(images: NDArray[np.uint8], columns: int) -> Image.Image:
    """Pictures `(N, H, W, 3)` side by side, `columns` a row."""
    count, height, width, _ = images.shape
    rows = -(-count // columns)
    sheet = np.full((rows * height, columns * width, 3), 255, np.uint8)
    for index, picture in enumerate(images):
        top, left = index // columns * height, index % columns * width
        sheet[top : top + height, left : left + width] = picture
    return Image.fromarray(sheet)


@torch.no_grad()
def sample_grid(
    family: Family,
    prompts: Sequence[str],
    path: Path,
    steps: int = 25,
    guidance: float = 4.0,
    columns: int = 8,
) -> None:
    """Write a PNG of one picture per prompt, seeds 0, 1, 2 …"""
    latents = sample(
        family,
        family.encode(prompts),
        family.sigmas(steps),
        list(range(len(prompts))),
        guidance,
        family.encode([""]),
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    tile(decode(family, latents), columns).save(path)
