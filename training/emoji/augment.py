"""Pictures as a generator might have drawn them: moved, scaled, softened, tinted, noisy; never mirrored."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from training.evaluator import to_input


def augment(
    pictures_BHWC: NDArray[np.uint8], size: int, rng: np.random.Generator, random: torch.Generator
) -> Tensor:
    """`(B, 3, size, size)` in about [−1, 1]: one scale per batch, and per picture a shift, blur, tint and noise."""
    x = to_input(torch.from_numpy(pictures_BHWC), size)
    count = len(x)
    x = _moved(F.interpolate(x, round(size * rng.uniform(0.85, 1.1)), mode="bilinear"), size, rng)
    for factor, share in ((2, 0.4), (4, 0.1)):
        rows = torch.from_numpy(np.flatnonzero(rng.random(count) < share))
        if len(rows):
            soft = F.interpolate(F.avg_pool2d(x[rows], factor), x.shape[-2:], mode="bilinear")
            x[rows] = torch.lerp(x[rows], soft, float(rng.uniform(0.3, 1)))
    gain = torch.from_numpy(rng.uniform(0.94, 1.0, (count, 3, 1, 1)).astype(np.float32))
    x.sub_(1).mul_(gain).add_(1)  # around white: the background stays as it is
    rows = torch.from_numpy(np.flatnonzero(rng.random(count) < 0.5))
    if len(rows):
        amount = torch.from_numpy(rng.uniform(0, 0.1, (len(rows), 1, 1, 1)).astype(np.float32))
        x[rows] += amount * torch.randn(x[rows].shape, generator=random)
    return x


def _moved(x: Tensor, size: int, rng: np.random.Generator, reach: int = 6) -> Tensor:
    """Each picture put on (or cut out by) a white square, at most `reach` pixels beyond its edge."""
    side = x.shape[-1]
    low, high = min(0, size - side) - reach, max(0, size - side) + reach
    out = torch.ones((len(x), 3, size, size)).contiguous(memory_format=torch.channels_last)
    for row, (top, left) in enumerate(rng.integers(low, high + 1, (len(x), 2)).tolist()):
        t, b, l, r = max(0, top), min(size, top + side), max(0, left), min(size, left + side)  # noqa: E741
        out[row, :, t:b, l:r] = x[row, :, t - top : b - top, l - left : r - left]
    return out
