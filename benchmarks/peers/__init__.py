"""Other ways to run the same weights, measured beside ours: one file per peer, imported when it is asked for.

    model = DiffusersModel(folder, torch.bfloat16, threads=2)            # benchmarks/peers/diffusers_peer.py
    peer = model.peer(Workload("red apple", steps=4, batch=1, height=512, width=512), compiled=True)
    peer.step()       # one denoiser call, inputs prepared before
    peer.picture()    # prompt → (batch, height, width, 3) uint8

A model is loaded once and makes a peer per workload; drop both to free them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from engines.noise import noise


@dataclass(frozen=True)
class Workload:
    """One request, the same to every peer: `batch` pictures of one prompt, of `height` × `width` pixels."""

    prompt: str
    steps: int
    batch: int
    height: int
    width: int
    seed: int = 0

    def noise(self, channels: int, downscale: int) -> NDArray[np.float32]:
        """Starting noise `(batch, channels, H, W)`; picture number i has seed `seed + i`, alone or in a batch."""
        shape = (channels, self.height // downscale, self.width // downscale)
        return np.stack([noise(self.seed + number, shape) for number in range(self.batch)])

    def sigmas(self) -> list[float]:
        """linspace(1, 1/steps, steps), before the scheduler's shift: what diffusers' pipeline takes as `sigmas=`."""
        return [float(sigma) for sigma in np.linspace(1.0, 1.0 / self.steps, self.steps)]


@dataclass(frozen=True)
class Peer:
    """A loaded model that waits to be timed on one workload."""

    name: str
    step: Callable[[], None]
    """One call of the denoiser, at the workload's batch and size."""
    picture: Callable[[], NDArray[np.uint8]]
    """The whole request: `(batch, height, width, 3)`."""
