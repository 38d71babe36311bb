"""A server's batch sizes, read from its `/metrics`: a histogram with the sizes that its buckets tell apart."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import Self

from prometheus_client.parser import text_string_to_metric_families

NAME = "cdm_batch_size"
STAGE = "denoise"


@dataclass(frozen=True)
class BatchSizes:
    """Denoising calls so far: how many at most as large as each bucket's bound, and their pictures."""

    at_most: dict[float, float]
    calls: float
    pictures: float

    @classmethod
    def read(cls, text: str) -> Self:
        """From the text of `/metrics`; nothing has been run yet where it is not there."""
        samples: defaultdict[tuple[str, str], float] = defaultdict(float)  # of all models together
        for family in text_string_to_metric_families(text):
            for sample in family.samples if family.name == NAME else ():
                if sample.labels["stage"] == STAGE:
                    samples[sample.name, sample.labels.get("le", "")] += sample.value
        at_most = {float(le): value for (name, le), value in samples.items() if name == f"{NAME}_bucket"}
        return cls(at_most, samples.get((f"{NAME}_count", ""), 0.0), samples.get((f"{NAME}_sum", ""), 0.0))

    def since(self, before: BatchSizes) -> BatchSizes:
        """What happened after `before`."""
        at_most = {bound: n - before.at_most.get(bound, 0.0) for bound, n in self.at_most.items()}
        return BatchSizes(at_most, self.calls - before.calls, self.pictures - before.pictures)

    def plus(self, other: BatchSizes) -> BatchSizes:
        """Both together."""
        bounds = self.at_most.keys() | other.at_most.keys()
        at_most = {bound: self.at_most.get(bound, 0.0) + other.at_most.get(bound, 0.0) for bound in bounds}
        return BatchSizes(at_most, self.calls + other.calls, self.pictures + other.pictures)

    @property
    def mean(self) -> float | None:
        """Pictures per call."""
        return round(self.pictures / self.calls, 3) if self.calls else None

    def histogram(self) -> dict[str, int]:
        """Calls by size, as `{"1": 10, "2": 4, "3-4": 3}`."""
        found, below, low = {}, 0.0, 1
        for bound in sorted(self.at_most):
            name = f"{low}+" if bound == float("inf") else str(low) if bound == low else f"{low}-{bound:.0f}"
            if n := int(self.at_most[bound] - below):
                found[name] = n
            below = self.at_most[bound]
            low = low if bound == float("inf") else int(bound) + 1
        return found


NOTHING = BatchSizes({}, 0.0, 0.0)
