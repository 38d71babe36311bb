"""Random numbers of an iteration: sample i's come from (seed, step, stream, i) alone.

So a sample draws the same in whatever process, micro-batch or resumed run it is computed.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor


def generator(*key: int) -> torch.Generator:
    """Torch randomness of a key of whole numbers ≥ 0: equal keys draw equal numbers, in whatever process."""
    return _seeded(np.random.SeedSequence(key).generate_state(1, np.uint64)[0])


def _seeded(state: np.uint64) -> torch.Generator:
    return torch.Generator().manual_seed(int(state) & (2**63 - 1))


class Draws:
    """Draws of R samples of one stream of one iteration, on the CPU so that they do not depend on the device."""

    def __init__(self, seed: int, step: int, stream: int, rows: Sequence[int], device: torch.device) -> None:
        """`rows`: the samples' numbers within the whole batch."""
        # One hash for all: its i-th word does not depend on how many words are asked for.
        states = np.random.SeedSequence([seed, step, stream]).generate_state(max(rows) + 1, np.uint64)
        self.generators = [_seeded(states[row]) for row in rows]
        self.device = device

    def uniform(self) -> Tensor:
        """U[0, 1) per sample, `(R,)` float32."""
        return torch.stack([torch.rand((), generator=each) for each in self.generators]).to(self.device)

    def uniform_between(self, low: float | Tensor, high: float | Tensor) -> Tensor:
        """U[low, high) per sample, `(R,)` float32; bounds are numbers or `(R,)`."""
        return low + (high - low) * self.uniform()

    def normal(self, shape: Sequence[int]) -> Tensor:
        """N(0, 1), `(R, *shape)` float32."""
        drawn = [torch.randn(tuple(shape), generator=each) for each in self.generators]
        return torch.stack(drawn).to(self.device)

    def integers(self, below: int) -> Tensor:
        """U{0…below − 1} per sample, `(R,)` int64."""
        drawn = [torch.randint(below, (), generator=each) for each in self.generators]
        return torch.stack(drawn).to(self.device)
