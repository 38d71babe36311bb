"""Starting noise: one counter-based generator per picture, so a seed draws the same noise alone or in any batch."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

MAX_SEED = 2**63 - 1


def noise(seed: int, shape: tuple[int, ...]) -> NDArray[np.float32]:
    """Standard normal float32 of `shape` (one picture's latent), drawn by Philox keyed with `seed` in [0, MAX_SEED]."""
    generator = np.random.Generator(np.random.Philox(key=seed))
    return generator.standard_normal(shape, dtype=np.float32)
