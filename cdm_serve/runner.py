"""The one thread that owns scheduler and engine. Everybody else sends it messages and gets replies.

Its loop is three verbs: the policy's `schedule`, the engine's step (`_advance`), and `_retire`, where what is finished
goes through the decoder. Pictures join and leave at every step edge, each at its own σ; a lone picture never waits for
company. An engine call that fails fails the pictures in that call, and the loop goes on.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from cdm_serve.admission import Costs
from cdm_serve.embeddings import EmbeddingCache
from cdm_serve.errors import GenerationFailed, ServeError, Unavailable
from cdm_serve.metrics import Metrics
from cdm_serve.picture import Picture
from cdm_serve.scheduler import Batch, Scheduler, Task
from engines.base import Engine, TokenIds
from engines.errors import ExecutionError
from engines.noise import noise

log = logging.getLogger("cdm_serve.runner")


@dataclass(frozen=True)
class _Submit:
    pictures: tuple[Picture, ...]


@dataclass(frozen=True)
class _Cancel:
    pictures: tuple[Picture, ...]


@dataclass(frozen=True)
class _Stop:
    deadline: float


class Runner:
    """Start it, submit pictures, stop it. `ready` is set once every batch size has been run."""

    def __init__(self, engine: Engine, metrics: Metrics, costs: Costs, embedding_cache: int) -> None:
        self.ready = threading.Event()
        self.failure: str | None = None
        self._engine = engine
        self._metrics = metrics
        self._costs = costs
        self._scheduler = Scheduler(engine.info.max_batch)
        self._embeddings = EmbeddingCache(embedding_cache)
        self._pictures: dict[int, Picture] = {}
        self._inbox: queue.SimpleQueue[_Submit | _Cancel | _Stop] = queue.SimpleQueue()
        self._deadline: float | None = None
        self._thread = threading.Thread(target=self._run, name="cdm-runner", daemon=True)

    # What other threads call.

    def start(self) -> None:
        """Warm up, then work."""
        self._thread.start()

    def submit(self, pictures: Sequence[Picture]) -> None:
        """Take pictures in together, so that they can share their first batch. Each gets one reply."""
        self._metrics.queue_depth.inc(len(pictures))
        self._inbox.put(_Submit(tuple(pictures)))

    def cancel(self, pictures: Sequence[Picture]) -> None:
        """Drop pictures at the next step edge, without a reply. Those already finished are left alone."""
        self._inbox.put(_Cancel(tuple(pictures)))

    def stop(self, drain_s: float) -> None:
        """Finish what was accepted, for at most `drain_s` seconds; the rest is answered `Unavailable`.

        Nothing may be submitted afterwards.
        """
        self._inbox.put(_Stop(time.perf_counter() + drain_s))

    def join(self) -> None:
        """Wait until the thread has ended."""
        self._thread.join()

    # What only its own thread calls.

    def _run(self) -> None:
        try:
            for _ in self._warm_up():  # whoever asks meanwhile is served between two batch sizes
                if not self._work(wait=False):
                    return
            self.ready.set()
            self._work(wait=True)
        except Exception as error:
            log.exception("the runner stopped working")
            self.failure = f"the engine stopped working: {error}; the server must be restarted"
            self._refuse_until_stopped(Unavailable(self.failure))

    def _work(self, wait: bool) -> bool:
        """Step by step until stopping is done (False) or, unless it shall `wait`, until nothing is left (True)."""
        while self._receive(wait):
            batch = self._scheduler.schedule(time.perf_counter())
            if batch is None:
                return True
            pictures = self._start([self._pictures[id] for id in batch.ids])
            if pictures and self._advance(pictures):
                self._retire(batch)
        return False

    def _receive(self, wait: bool) -> bool:
        """Take in every message; without any work, wait for one if asked to. False when stopping is done."""
        while True:
            if self._deadline is not None:
                if time.perf_counter() > self._deadline:
                    error = Unavailable(
                        "the server stopped before this picture was finished; send it again elsewhere"
                    )
                    self._fail(list(self._pictures.values()), error)
                if not self._pictures:
                    return False
            try:
                message = self._inbox.get(block=wait and not self._pictures)
            except queue.Empty:
                return True
            match message:
                case _Submit(pictures):
                    self._accept(pictures)
                case _Cancel(pictures):
                    self._cancel(pictures)
                case _Stop(deadline):
                    self._deadline = deadline

    def _accept(self, pictures: Sequence[Picture]) -> None:
        for picture in pictures:
            self._pictures[picture.id] = picture
            self._scheduler.add(Task(picture.id, picture.bucket, len(picture.sigmas) - 1, picture.arrival))

    def _cancel(self, pictures: Sequence[Picture]) -> None:
        for picture in pictures:
            if self._pictures.pop(picture.id, None) is None:
                continue
            self._metrics.cancelled_steps.inc(self._scheduler.cancel(picture.id))
            self._metrics.cancelled_compute.inc(picture.compute)
            self._leave(picture, "cancelled")

    def _start(self, pictures: list[Picture]) -> list[Picture]:
        """Give newcomers their embeddings and noise; returns those that can take the step."""
        newcomers = [picture for picture in pictures if not picture.started]
        if not newcomers:
            return pictures
        now = time.perf_counter()
        for picture in newcomers:
            picture.started = True
            picture.spans.queue = now - picture.arrival
            self._metrics.queue_depth.dec()
            self._metrics.queue_time.observe(picture.spans.queue)
        try:
            for picture in newcomers:
                picture.sample = self._engine.put(
                    noise(picture.seed, self._latent_shape(picture.width, picture.height))
                )
            self._encode(newcomers)
        except Exception as error:
            unprepared = [picture for picture in newcomers if picture.conditioning is None]
            self._fail(unprepared, _failed("encode", error))
        return [picture for picture in pictures if picture.id in self._pictures]

    def _encode(self, newcomers: list[Picture]) -> None:
        missing: dict[TokenIds, list[Picture]] = {}
        for picture in newcomers:
            picture.conditioning = self._embeddings.get(picture.tokens)
            if picture.conditioning is None:
                missing.setdefault(picture.tokens, []).append(picture)
        misses = sum(map(len, missing.values()))
        self._metrics.cache_misses.labels("embedding").inc(misses)
        self._metrics.cache_hits.labels("embedding").inc(len(newcomers) - misses)
        if not missing:
            return
        started = time.perf_counter()
        embeddings = self._engine.encode(list(missing))
        span = self._spent("encode", len(missing), started)
        for (tokens, pictures), conditioning in zip(missing.items(), embeddings, strict=True):
            self._embeddings.put(tokens, conditioning)
            for picture in pictures:
                picture.conditioning = conditioning
                picture.spans.encode = span

    def _advance(self, pictures: list[Picture]) -> bool:
        """One step for every picture, each at its own σ. False when the engine failed."""
        started = time.perf_counter()
        try:
            samples, _ = self._engine.denoise(
                [picture.sample for picture in pictures],
                [picture.sigmas[picture.step] for picture in pictures],
                [picture.sigmas[picture.step + 1] for picture in pictures],
                [picture.conditioning for picture in pictures],
            )
        except Exception as error:
            self._fail(pictures, _failed("denoise", error))
            return False
        span = self._spent("denoise", len(pictures), started)
        self._metrics.step_seconds.observe(span)
        for picture, sample in zip(pictures, samples, strict=True):
            picture.sample = sample
            picture.step += 1
            picture.spans.denoise += span
            picture.compute += span / len(pictures)
        return True

    def _retire(self, batch: Batch) -> None:
        """Decode what has run its last step, and reply."""
        finished = [self._pictures[id] for id in self._scheduler.postprocess(batch)]
        if not finished:
            return
        started = time.perf_counter()
        try:
            images = self._engine.decode([picture.sample for picture in finished])
        except Exception as error:
            self._fail(finished, _failed("decode", error))
            return
        span = self._spent("decode", len(finished), started)
        for picture, image in zip(finished, images, strict=True):
            del self._pictures[picture.id]
            picture.spans.decode = span
            self._leave(picture, "finished")
            picture.reply(picture, image)

    def _fail(self, pictures: Sequence[Picture], error: ServeError) -> None:
        for picture in pictures:
            self._scheduler.cancel(picture.id)
            del self._pictures[picture.id]
            self._leave(picture, "failed")
            picture.reply(picture, error)

    def _leave(self, picture: Picture, outcome: str) -> None:
        if not picture.started:
            self._metrics.queue_depth.dec()
        self._metrics.pictures.labels(outcome).inc()

    def _spent(self, stage: str, batch: int, started: float) -> float:
        span = time.perf_counter() - started
        self._metrics.batch_size.labels(stage).observe(batch)
        self._costs.record(stage, span)
        return span

    def _warm_up(self) -> Iterator[int]:
        """Run every component at every batch size and picture size that requests can lead to; yields batch sizes."""
        engine = self._engine
        ids = engine.tokenize("")
        for batch in range(1, engine.info.max_batch + 1):
            started = time.perf_counter()
            conditioning = engine.encode([ids] * batch)
            self._costs.record("encode", time.perf_counter() - started)
            for size in engine.manifest.sizes:
                shape = self._latent_shape(size.width, size.height)
                samples = [engine.put(noise(seed, shape)) for seed in range(batch)]
                started = time.perf_counter()
                samples, _ = engine.denoise(samples, [1.0] * batch, [0.0] * batch, conditioning)
                stepped = time.perf_counter()
                self._costs.record("denoise", stepped - started)
                engine.decode(samples)
                self._costs.record("decode", time.perf_counter() - stepped)
            yield batch

    def _latent_shape(self, width: int, height: int) -> tuple[int, int, int]:
        latent = self._engine.manifest.latent
        return (latent.channels, height // latent.downscale, width // latent.downscale)

    def _refuse_until_stopped(self, error: Unavailable) -> None:
        self._fail(list(self._pictures.values()), error)
        while (
            self._deadline is None
        ):  # a stop that was taken in before the failure is the only one there will be
            match self._inbox.get():
                case _Submit(pictures):
                    self._accept(pictures)
                    self._fail(pictures, error)
                case _Stop(deadline):
                    self._deadline = deadline


def _failed(stage: str, error: Exception) -> GenerationFailed:
    expected = isinstance(error, ExecutionError)
    log.error("the engine failed to %s: %s", stage, error, exc_info=None if expected else error)
    return GenerationFailed(
        f"the engine failed to {stage} this picture's batch: {error}; the request can be sent again"
    )
