"""Every metric, named once. Each app has its own registry, so that two in one process do not share counts.

Durations are recorded from real spans only, never derived.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Info, generate_latest
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.exposition import CONTENT_TYPE_LATEST
from prometheus_client.registry import Collector

from cdm_serve.costs import Bucket, Stage
from cdm_serve.picture import STAGES, Spans

__all__ = ["CONTENT_TYPE_LATEST", "Metrics"]

SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)
BATCHES = (1, 2, 4, 8, 16, 32, 64, 128, 256)

CostRow = tuple[Stage, Bucket, int, float]
"""What `CostModel.rows` yields: (stage, bucket, batch, seconds)."""


class _Costs(Collector):
    """The cost model as a gauge. Text has no size: `encode` has empty ones."""

    def __init__(self, rows: Callable[[], Iterable[CostRow]]) -> None:
        self._rows = rows

    def collect(self) -> Iterator[GaugeMetricFamily]:
        labels = ["stage", "width", "height", "batch"]
        family = GaugeMetricFamily("cdm_cost_seconds", "What one engine call is expected to take", labels=labels)
        for stage, bucket, batch, seconds in self._rows():
            width, height = bucket if isinstance(bucket, tuple) and bucket else ("", "")
            family.add_metric([stage, str(width), str(height), str(batch)], seconds)
        yield family


class Metrics:
    """The metrics of one app."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        self.requests = Counter(
            "cdm_requests",
            "Requests answered (or left by their client)",
            ["endpoint", "outcome"],
            registry=registry,
        )
        self.request_seconds = Histogram(
            "cdm_request_seconds",
            "From a request's head to its answer",
            ["endpoint"],
            buckets=SECONDS,
            registry=registry,
        )
        self.pictures = Counter(
            "cdm_pictures", "Pictures accepted, by how they ended", ["outcome"], registry=registry
        )
        self.queue_depth = Gauge(
            "cdm_queue_depth", "Pictures accepted and not yet in a batch", registry=registry
        )
        self.queue_time = Histogram(
            "cdm_queue_time_seconds", "From acceptance to the first batch", buckets=SECONDS, registry=registry
        )
        self.stage_seconds = Histogram(
            "cdm_stage_seconds",
            "Time of a finished picture in a stage",
            ["stage"],
            buckets=SECONDS,
            registry=registry,
        )
        self.step_seconds = Histogram(
            "cdm_step_seconds", "One denoising step of a batch", buckets=SECONDS, registry=registry
        )
        self.batch_size = Histogram(
            "cdm_batch_size", "Pictures in one call of a stage", ["stage"], buckets=BATCHES, registry=registry
        )
        self.cancelled_compute = Counter(
            "cdm_cancelled_compute_seconds",
            "Engine time (its share of each step) spent on pictures whose client then left",
            registry=registry,
        )
        self.cancelled_steps = Counter(
            "cdm_cancelled_steps", "Steps not run because the client had left", registry=registry
        )
        self.deadline_missed = Counter(
            "cdm_deadline_missed",
            "Pictures accepted with a deadline and finished after it",
            registry=registry,
        )
        self.cache_hits = Counter("cdm_cache_hits", "Look-ups a cache answered", ["cache"], registry=registry)
        self.cache_misses = Counter("cdm_cache_misses", "Look-ups it did not", ["cache"], registry=registry)
        self.key_requests = Counter(
            "cdm_key_requests", "Requests by API key", ["key", "outcome"], registry=registry
        )
        self.key_pictures = Counter(
            "cdm_key_pictures", "Pictures accepted by API key", ["key"], registry=registry
        )
        self.safety_refusals = Counter(
            "cdm_safety_refusals", "Prompts and pictures refused", ["check"], registry=registry
        )
        self.model = Info("cdm_model", "What is served, and on what", registry=registry)

    def show_costs(self, rows: Callable[[], Iterable[CostRow]]) -> None:
        """Let every scrape tell what `rows`, the scheduler's cost model, then says."""
        self.registry.register(_Costs(rows))

    def record(self, spans: Spans) -> None:
        """Count a finished picture's time in each stage that it went through (a cached embedding skips `encode`)."""
        for stage in STAGES:
            seconds = getattr(spans, stage)
            if stage != "queue" and seconds > 0:
                self.stage_seconds.labels(stage).observe(seconds)

    def exposition(self) -> bytes:
        """Everything in Prometheus' text format."""
        return generate_latest(self.registry)
