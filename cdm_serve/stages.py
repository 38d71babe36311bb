"""What an engine call does to the pictures in it: no policy, no threads. Spans are recorded here."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial
from threading import Lock
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from cdm_serve.costs import TEXT, Bucket, CostModel, Stage
from cdm_serve.embeddings import EmbeddingCache
from cdm_serve.metrics import ModelMetrics
from cdm_serve.picture import Picture
from cdm_serve.replan import replan
from cdm_serve.tasks import Call
from cdm_serve.tracing import remember
from engines.base import Conditioning, Engine, Sample, TokenIds
from engines.errors import ExecutionError
from engines.noise import noise

T = TypeVar("T")

MEASURED = 2
"""Calls of each kind that the warm-up measures."""


class Stages:
    """The engine's three components over pictures. Calls of one stage come from one thread at a time."""

    def __init__(
        self, engine: Engine, metrics: ModelMetrics, costs: CostModel, embeddings: EmbeddingCache
    ) -> None:
        self.engine = engine
        self.costs = costs
        self._metrics = metrics
        self._embeddings = embeddings
        self._lock = Lock()
        self._decoding = Lock()
        self._warm: list[Conditioning] = []

    def embedded(self, picture: Picture) -> bool:
        """Give `picture` its embedding if it is cached. Any thread may ask."""
        with self._lock:
            picture.conditioning = self._embeddings.get(picture.tokens)
        if picture.conditioning is not None:
            self._metrics.cache_hits.labels("embedding").inc()
        return picture.conditioning is not None

    def run(self, call: Call, pictures: Sequence[Picture]) -> list[NDArray[np.uint8]]:
        """Run `call` for its pictures; decoding returns images `(height, width, 3)`. Raises what the engine does."""
        if call.stage == "encode":
            self._encode(pictures)
        elif call.stage == "denoise":
            self._denoise(call, pictures)
        else:
            return self._decode(call, pictures)
        return []

    def _encode(self, pictures: Sequence[Picture]) -> None:
        missing: dict[TokenIds, list[Picture]] = {}
        for picture in pictures:
            if not self.embedded(picture):  # else a batch before it had the same text
                missing.setdefault(picture.tokens, []).append(picture)
        if not missing:
            return
        self._metrics.cache_misses.labels("embedding").inc(sum(map(len, missing.values())))
        members = [picture for same in missing.values() for picture in same]
        texts = list(missing)
        encode = partial(self.engine.encode, texts)
        embeddings, span = self._timed("encode", TEXT, len(texts), members, encode)
        for (tokens, same), conditioning in zip(missing.items(), embeddings, strict=True):
            with self._lock:
                self._embeddings.put(tokens, conditioning)
            for picture in same:
                picture.conditioning = conditioning
                picture.spans.encode = span

    def _denoise(self, call: Call, pictures: Sequence[Picture]) -> None:
        for picture, left in zip(pictures, call.left, strict=True):
            if picture.sample is None:
                shape = self.latent_shape(picture.width, picture.height)
                picture.sample = self.engine.put(noise(picture.seed, shape))
            if len(picture.remaining) != left + 1:  # the scheduler has changed its steps
                picture.remaining = replan(self.engine.manifest.schedules, picture.remaining[0], left)
        step = partial(
            self.engine.denoise,
            [picture.sample for picture in pictures],
            [picture.remaining[0] for picture in pictures],
            [picture.remaining[1] for picture in pictures],
            [picture.conditioning for picture in pictures],
        )
        (samples, estimates), span = self._timed("denoise", call.bucket, len(pictures), pictures, step)
        self._metrics.step_seconds.observe(span)
        for picture, sample, estimate in zip(pictures, samples, estimates, strict=True):
            picture.sample, picture.estimate = sample, estimate
            picture.path += picture.remaining[:1]
            picture.remaining = picture.remaining[1:]
            picture.spans.denoise += span
            picture.compute += span / len(pictures)

    def _decode(self, call: Call, pictures: Sequence[Picture]) -> list[NDArray[np.uint8]]:
        images, span = self._decoded(call.bucket, pictures, [picture.sample for picture in pictures])
        for picture in pictures:
            picture.spans.decode = span
        return images

    def previews(self, bucket: Bucket, pictures: Sequence[Picture]) -> list[NDArray[np.uint8]]:
        """What `pictures`, of one shape, would be if they ended here: x̂0 of their last step, decoded."""
        estimates = [picture.estimate for picture in pictures]
        images, span = self._decoded(bucket, pictures, estimates, preview=True)
        for picture in pictures:
            picture.spans.preview += span
        return images

    def _decoded(
        self, bucket: Bucket, pictures: Sequence[Picture], samples: list[Sample], preview: bool = False
    ) -> tuple[list[NDArray[np.uint8]], float]:
        decode = partial(self.engine.decode, samples)
        with self._decoding:  # previews come from the denoising thread
            images, span = self._timed("decode", bucket, len(samples), pictures, decode, preview)
        if len(images) != len(samples):
            raise ExecutionError(f"decoding {len(samples)} pictures gave {len(images)}")
        return list(images), span

    def warm_up(self, stage: Stage, bucket: Bucket, batch: int) -> None:
        """Run `stage` on made-up pictures: whatever it compiles or allocates is there then, and what it costs is known.

        The first call is not measured, for no request will pay it; of the others the fastest counts, for whatever else
        the machine does is no cost of the call. Denoising uses the embeddings of an encoding of that batch or a larger
        one, made before.
        """
        engine = self.engine
        call: Callable[[], object]
        if stage == "encode":
            tokens = [engine.tokenize("")] * batch
            self._warm = engine.encode(tokens)
            call = partial(engine.encode, tokens)
        else:
            assert isinstance(bucket, tuple)
            shape = self.latent_shape(*bucket)
            samples = [engine.put(noise(seed, shape)) for seed in range(batch)]
            if stage == "denoise":
                call = partial(engine.denoise, samples, [1.0] * batch, [0.0] * batch, self._warm[:batch])
            else:
                call = partial(engine.decode, samples)
            with self._decoding:
                call()
        seconds = []
        for _ in range(MEASURED):
            with self._decoding:
                started = time.perf_counter()
                call()
                seconds.append(time.perf_counter() - started)
        self.costs.record(stage, bucket, batch, min(seconds), undisturbed=True)

    def latent_shape(self, width: int, height: int) -> tuple[int, int, int]:
        """(channels, height, width) in latent pixels of a picture in pixels."""
        latent = self.engine.manifest.latent
        return (latent.channels, height // latent.downscale, width // latent.downscale)

    def _timed(
        self,
        stage: Stage,
        bucket: Bucket,
        batch: int,
        pictures: Sequence[Picture],
        call: Callable[[], T],
        preview: bool = False,
    ) -> tuple[T, float]:
        """What the engine's `call` for `pictures` returns, and its seconds: counted, learnt from and traced."""
        started = time.perf_counter()
        try:
            result = call()
        except Exception as error:
            remember(pictures, stage, batch, started, preview, error)
            raise
        span = remember(pictures, stage, batch, started, preview)
        self._metrics.batch_size.labels(stage).observe(batch)
        self.costs.record(stage, bucket, batch, span)
        return result, span
