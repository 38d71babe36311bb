"""Means over micro-batches of what an iteration logs."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

Values = dict[str, float]


class Means:
    """Running means of named scalars, weighted by how many samples each came from."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._count = 0

    def add(self, info: Mapping[str, Tensor], count: int) -> None:
        """Scalars of a micro-batch of `count` samples; the names are the same every time."""
        for name, value in info.items():
            self._sums[name] = self._sums.get(name, 0.0) + value.detach().float() * count
        self._count += count

    def values(self) -> Values:
        """Means over all samples."""
        return {name: float(total) / self._count for name, total in self._sums.items()}
