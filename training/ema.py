"""Exponential moving average of weights, with the warm-up of the CDM authors: min((1 + n) / (10 + n), decay)."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from training.checkpoint import require_same_tensors


class EMA:
    """A float32 average of the tensors in `source` (a state dict whose tensors are updated in place)."""

    def __init__(self, source: Mapping[str, Tensor], decay: float) -> None:
        self.decay = decay
        self.updates = 0
        self.average = {name: tensor.detach().float().clone() for name, tensor in source.items()}

    @torch.no_grad()
    def update(self, source: Mapping[str, Tensor]) -> None:
        """Move the average towards `source`."""
        self.updates += 1
        decay = min((1 + self.updates) / (10 + self.updates), self.decay)
        names = list(self.average)
        averages = [self.average[name] for name in names]
        current = [source[name].detach().float() for name in names]
        torch._foreach_lerp_(averages, current, 1 - decay)

    def load(self, tensors: Mapping[str, Tensor], updates: int) -> None:
        """Put back a saved average.

        Raises:
            TrainingError: it is another model's.
        """
        require_same_tensors(tensors, self.average, "averages")
        for name, tensor in tensors.items():
            self.average[name].copy_(tensor)
        self.updates = updates
