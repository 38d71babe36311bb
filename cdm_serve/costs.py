"""The cost model c(stage, shape, batch): seconds of one engine call, as measured on this machine.

    costs = CostModel()
    costs.record("denoise", (128, 128), 4, 0.0091)             # the warm-up, then every real span
    costs.seconds("denoise", (128, 128), 3)                    # between its measured neighbours
    costs.best_batch("denoise", (128, 128), waiting=9, limit=8)

The runner's thread writes; others may read: a curve is replaced, never changed in place.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping
from typing import Literal, get_args

Stage = Literal["encode", "denoise", "decode"]
STAGES: tuple[Stage, ...] = get_args(Stage)
Bucket = Hashable
"""What must be equal for two pictures to share a call. Text has no shape: `encode` is recorded under `TEXT`."""
TEXT: Bucket = ()

NEWEST = 0.1
"""Weight of the newest span: a change of load shows within some calls, what is rarely called stays promising."""
EQUAL = 1.05
"""Means that differ by less are equal: spans vary by more."""
OUTLIER = 2.0
"""A span counts as at most so many times what was expected: a pause is no cost of the call that it fell into."""


class CostModel:
    """Moving averages of real spans by stage, bucket and batch. 0 where nothing was measured."""

    def __init__(self) -> None:
        self._curves: dict[tuple[Stage, Bucket], dict[int, float]] = {}
        self._between: dict[tuple[Stage, Bucket, int], float] = {}
        self._each: dict[tuple[Stage, Bucket, int], float] = {}

    def record(
        self, stage: Stage, bucket: Bucket, batch: int, seconds: float, undisturbed: bool = False
    ) -> None:
        """Take one measured call in.

        `undisturbed`: measured while nothing else ran, as the warm-up does. What is known counts no more if that was
        slower: it holds a compilation, or a load that real calls will soon show again.
        """
        assert batch >= 1
        curve = dict(self._curves.get((stage, bucket), {}))
        known = curve.get(batch, 0.0)
        if not known or (undisturbed and seconds < known):
            curve[batch] = seconds
        else:
            curve[batch] = known + NEWEST * (min(seconds, OUTLIER * known) - known)
        self._curves[stage, bucket] = curve
        self._between, self._each = {}, {}

    def seconds(self, stage: Stage, bucket: Bucket, batch: int) -> float:
        """Of one call: measured, or on the line between the nearest batches; outside of them, per picture as there."""
        between = self._between  # first: what is derived from an old curve goes to the old values
        curve = self._curves.get((stage, bucket))
        if curve is None:
            return 0.0
        known = curve.get(batch)
        if known is None:
            known = between.get((stage, bucket, batch))
            if known is None:
                known = between[stage, bucket, batch] = _interpolated(curve, batch)
        return known

    def best_batch(self, stage: Stage, bucket: Bucket, waiting: float, limit: int) -> int:
        """The batch b ≤ min(waiting, limit) under which `waiting` pictures leave the stage soonest on average.

        In batches of b, the k-th batch ends after k·c(b): the mean is (n·c(b)/b + c(b))/2. The first term is
        throughput, the second what the members of a batch wait for each other. A batch grows while that falls; where
        more than four times `limit` wait, also where it is as good as equal. No batch is larger than what was measured.
        """
        assert waiting >= 1
        assert limit >= 1
        most = max(self._curves.get((stage, bucket), {}), default=1)
        means = []
        for batch in range(1, min(int(waiting), limit, most) + 1):
            seconds = self.seconds(stage, bucket, batch)
            means.append(waiting * seconds / batch + seconds)
        best = min(means)
        if waiting <= 4 * limit:
            return means.index(best) + 1
        return max(batch for batch, mean in enumerate(means, 1) if mean <= EQUAL * best)

    def each(self, stage: Stage, bucket: Bucket, limit: int) -> float:
        """Seconds per picture in a queue of `limit` or more: what everybody ahead costs whoever waits."""
        known = self._each.get((stage, bucket, limit))
        if known is None:
            batch = self.best_batch(stage, bucket, limit, limit)
            known = self._each[stage, bucket, limit] = self.seconds(stage, bucket, batch) / batch
        return known

    def rows(self) -> list[tuple[Stage, Bucket, int, float]]:
        """Everything measured: (stage, bucket, batch, seconds), sorted."""
        found = [
            (stage, bucket, batch, seconds)
            for (stage, bucket), curve in list(self._curves.items())  # the runner may add one meanwhile
            for batch, seconds in curve.items()
        ]
        return sorted(found, key=lambda row: (STAGES.index(row[0]), repr(row[1]), row[2]))

    @classmethod
    def of(cls, rows: Iterable[tuple[Stage, Bucket, int, float]]) -> CostModel:
        """From measured or given rows, as `rows` returns them."""
        costs = cls()
        for stage, bucket, batch, seconds in rows:
            costs.record(stage, bucket, batch, seconds)
        return costs


def _interpolated(curve: Mapping[int, float], batch: int) -> float:
    below = [size for size in curve if size <= batch]
    above = [size for size in curve if size >= batch]
    if not (below and above):  # outside of what was measured
        nearest = max(below) if below else min(above)
        return curve[nearest] * batch / nearest
    low, high = max(below), min(above)
    return curve[low] + (curve[high] - curve[low]) * (batch - low) / (high - low)
