"""Every metric, named once. Each app has its own registry, so that two in one process do not share counts.

    metrics = Metrics()
    metrics.requests.labels("/generate", "ok").inc()
    metrics.of("emoji").queue_depth.inc()            # what is about one model carries its name

Durations are recorded from real spans only, never derived.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from typing import Generic, TypeVar

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.exposition import CONTENT_TYPE_LATEST
from prometheus_client.metrics import MetricWrapperBase
from prometheus_client.registry import Collector

from cdm_serve.costs import Bucket, Stage
from cdm_serve.picture import STAGES, Picture

__all__ = ["CONTENT_TYPE_LATEST", "Metrics", "ModelMetrics"]

SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)
BATCHES = (1, 2, 4, 8, 16, 32, 64, 128, 256)
STEPS = (1, 2, 3, 4, 5, 6, 8, 12, 16, 32, 64)

CostRow = tuple[Stage, Bucket, int, float]
"""What `CostModel.rows` yields: (stage, bucket, batch, seconds)."""

Metric = TypeVar("Metric", bound=MetricWrapperBase)


class _Costs(Collector):
    """The cost models as a gauge. Text has no size: `encode` has empty ones."""

    def __init__(self) -> None:
        self.rows: dict[str, Callable[[], Iterable[CostRow]]] = {}

    def collect(self) -> Iterator[GaugeMetricFamily]:
        labels = ["model", "stage", "width", "height", "batch"]
        family = GaugeMetricFamily(
            "cdm_cost_seconds", "What one engine call is expected to take", labels=labels
        )
        for model, rows in list(self.rows.items()):
            for stage, bucket, batch, seconds in rows():
                width, height = bucket if isinstance(bucket, tuple) and bucket else ("", "")
                family.add_metric([model, stage, str(width), str(height), str(batch)], seconds)
        yield family


class Metrics:
    """The metrics of one app."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(name, text, labels, registry=registry)

        def gauge(name: str, text: str, *labels: str) -> Gauge:
            return Gauge(name, text, labels, registry=registry)

        def histogram(name: str, text: str, *labels: str, buckets: tuple[float, ...] = SECONDS) -> Histogram:
            return Histogram(name, text, labels, buckets=buckets, registry=registry)

        self.requests = counter(
            "cdm_requests", "Requests answered (or left by their client)", "endpoint", "outcome"
        )
        self.request_seconds = histogram(
            "cdm_request_seconds", "From a request's head to its answer", "endpoint"
        )
        self.key_requests = counter("cdm_key_requests", "Requests by API key", "key", "outcome")
        self.key_pictures = counter("cdm_key_pictures", "Pictures accepted by API key", "key")
        self.safety_refusals = counter("cdm_safety_refusals", "Prompts and pictures refused", "check")

        self.model_info = gauge(
            "cdm_model_info", "1: what is served, and on what", "model", "runtime", "precision", "device"
        )
        self.pictures = counter("cdm_pictures", "Pictures accepted, by how they ended", "model", "outcome")
        self.in_work = gauge("cdm_pictures_in_work", "Pictures accepted and unfinished", "model")
        self.queue_depth = gauge("cdm_queue_depth", "Pictures accepted and not yet in a batch", "model")
        self.queue_time = histogram("cdm_queue_time_seconds", "From acceptance to the first batch", "model")
        self.stage_seconds = histogram(
            "cdm_stage_seconds", "Time of a finished picture in a stage", "model", "stage"
        )
        self.step_seconds = histogram("cdm_step_seconds", "One denoising step of a batch", "model")
        self.steps = histogram(
            "cdm_steps", "Steps that a finished picture has really run", "model", buckets=STEPS
        )
        self.batch_size = histogram(
            "cdm_batch_size", "Pictures in one call of a stage", "model", "stage", buckets=BATCHES
        )
        self.cancelled_compute = counter(
            "cdm_cancelled_compute_seconds",
            "Engine time (its share of each step) spent on pictures whose client then left",
            "model",
        )
        self.cancelled_steps = counter(
            "cdm_cancelled_steps", "Steps not run because the client had left", "model"
        )
        self.deadline_missed = counter(
            "cdm_deadline_missed", "Pictures accepted with a deadline and finished after it", "model"
        )
        self.cache_hits = counter("cdm_cache_hits", "Look-ups a cache answered", "model", "cache")
        self.cache_misses = counter("cdm_cache_misses", "Look-ups it did not", "model", "cache")
        ProcessCollector(registry=registry)
        self._costs = _Costs()
        registry.register(self._costs)

    def of(self, model: str) -> ModelMetrics:
        """The metrics of one model. Two engines of the same name, one replacing the other, share them."""
        return ModelMetrics(self, model)

    def show_costs(self, model: str, rows: Callable[[], Iterable[CostRow]]) -> None:
        """Let every scrape tell what `rows`, that model's cost model, then says."""
        self._costs.rows[model] = rows

    def forget(self, model: str) -> None:
        """`model` is served no more: what it is and has now goes, what it counted stays."""
        self._costs.rows.pop(model, None)
        self.in_work.remove_by_labels({"model": model})
        self.model_info.remove_by_labels({"model": model})

    def exposition(self) -> bytes:
        """Everything in Prometheus' text format."""
        return generate_latest(self.registry)


class _Bound(Generic[Metric]):
    """A metric whose first label, the model, is set. Children are kept: looking one up takes a lock."""

    def __init__(self, metric: Metric, model: str) -> None:
        self._metric, self._model = metric, model
        self._children: dict[str, Metric] = {}

    def labels(self, value: str) -> Metric:
        """The child with this value of the other label."""
        child = self._children.get(value)
        if child is None:
            child = self._children[value] = self._metric.labels(self._model, value)
        return child


class ModelMetrics:
    """What is counted about one model."""

    def __init__(self, metrics: Metrics, model: str) -> None:
        self.pictures = _Bound(metrics.pictures, model)
        self.stage_seconds = _Bound(metrics.stage_seconds, model)
        self.batch_size = _Bound(metrics.batch_size, model)
        self.cache_hits = _Bound(metrics.cache_hits, model)
        self.cache_misses = _Bound(metrics.cache_misses, model)
        self.queue_depth = metrics.queue_depth.labels(model)
        self.queue_time = metrics.queue_time.labels(model)
        self.step_seconds = metrics.step_seconds.labels(model)
        self.steps = metrics.steps.labels(model)
        self.cancelled_compute = metrics.cancelled_compute.labels(model)
        self.cancelled_steps = metrics.cancelled_steps.labels(model)
        self.deadline_missed = metrics.deadline_missed.labels(model)

    def record(self, picture: Picture) -> None:
        """Count a finished picture's time in each stage that it went through (a cached embedding skips `encode`)."""
        for stage in STAGES:
            seconds = getattr(picture.spans, stage)
            if stage != "queue" and seconds > 0:
                self.stage_seconds.labels(stage).observe(seconds)
        if picture.source == "made":
            self.steps.observe(picture.step)
        if time.perf_counter() > picture.deadline:
            self.deadline_missed.inc()
