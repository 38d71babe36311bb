"""Pixels in, files out, in a pool of threads beside the engine: safety check, PNG, JPEG or WebP with the parameters."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cdm_serve.errors import GenerationFailed, ServeError
from cdm_serve.images import encode_image
from cdm_serve.limits import Order
from cdm_serve.metrics import ModelMetrics
from cdm_serve.picture import Picture, Source, Spans
from cdm_serve.safety import Safety
from cdm_serve.schemas import FORMATS
from engines.bundle import Manifest

log = logging.getLogger("cdm_serve.delivery")


@dataclass(frozen=True)
class Made:
    """One finished picture: its file's bytes, its seed, the steps asked for and really run, where its time went.

    Without `order.file`, `data` is empty; without `order.pixels`, `pixels` (uint8, `(height, width, 3)`) is None.
    """

    data: bytes
    seed: int
    planned_steps: int
    steps: int
    spans: Spans
    source: Source
    pixels: NDArray[np.uint8] | None = None


@dataclass(frozen=True)
class Preview:
    """What a picture would be if it ended after `step` steps: the file's bytes."""

    data: bytes
    seed: int
    step: int


class Delivery:
    """Encodes the pictures of one model. Any thread may call it."""

    def __init__(self, workers: int, manifest: Manifest, safety: Safety, counts: ModelMetrics) -> None:
        self._pool = ThreadPoolExecutor(workers, thread_name_prefix="cdm-image")
        self._manifest = manifest
        self._safety = safety
        self._counts = counts

    def warm_up(self) -> None:
        """An encoder loads on its first picture, which should be nobody's."""
        for format in FORMATS:
            encode_image(np.zeros((8, 8, 3), np.uint8), format, {})

    def close(self) -> None:
        """Finish what was handed in."""
        self._pool.shutdown()

    def finish(
        self,
        order: Order,
        tell: Callable[[Made | ServeError], None],
        picture: Picture,
        outcome: NDArray[np.uint8] | ServeError,
    ) -> None:
        """Encode `outcome` and `tell` the result, from a thread of the pool; an error is told at once."""
        if isinstance(outcome, ServeError):
            _end(picture, outcome)
            tell(outcome)
        else:
            self._pool.submit(picture.context.copy().run, self._encode, order, tell, picture, outcome)

    def preview(self, order: Order, picture: Picture, pixels: NDArray[np.uint8]) -> Future[Preview]:
        """Encode x̂0 of the step that `picture` has just run."""
        path = picture.path  # by the time a thread is free it may have run another
        return self._pool.submit(picture.context.copy().run, self._preview, order, picture, path, pixels)

    def parameters(self, order: Order, picture: Picture, path: tuple[float, ...]) -> dict[str, Any]:
        """What is written into a picture that went along `path`, the sigma of each step.

        It is all it takes to make it again. One whose steps were changed on its way ("auto", under load) went along no
        schedule of the bundle, so its sigmas are written too; of a preview, that it is one.
        """
        steps = len(path)
        sigmas = self._manifest.schedules.get(steps, ())
        return {
            "prompt": order.prompt,
            "seed": picture.seed,
            "steps": steps,
            "width": order.width,
            "height": order.height,
            "model": self._manifest.name,
            **({} if sigmas[:-1] == path else {"sigmas": path}),
        }

    def _encode(
        self,
        order: Order,
        tell: Callable[[Made | ServeError], None],
        picture: Picture,
        pixels: NDArray[np.uint8],
    ) -> None:
        started = time.perf_counter()
        try:
            parameters = self.parameters(order, picture, picture.path)
            self._safety.check_picture(pixels, parameters)
            data = encode_image(pixels, order.format, parameters, order.quality) if order.file else b""
        except ServeError as refusal:
            _end(picture, refusal)
            tell(refusal)
            return
        except Exception as error:
            log.exception("encoding a picture as %s failed", order.format)
            _end(picture, error)
            tell(GenerationFailed(f"the picture could not be encoded as {order.format}: {error}"))
            return
        if order.file:
            picture.spans.image_encode = time.perf_counter() - started
            if picture.trail is not None:
                picture.trail.encoded(started)
        _end(picture)
        self._counts.record(picture)
        kept = pixels if order.pixels else None
        tell(Made(data, picture.seed, order.steps, picture.step, picture.spans, picture.source, kept))

    def _preview(
        self, order: Order, picture: Picture, path: tuple[float, ...], pixels: NDArray[np.uint8]
    ) -> Preview:
        started = time.perf_counter()
        parameters = self.parameters(order, picture, path) | {"preview": True}
        self._safety.check_picture(pixels, parameters)
        data = encode_image(pixels, order.format, parameters, order.quality)
        if picture.trail is not None:
            picture.trail.encoded(started, preview=True)
        return Preview(data, picture.seed, len(path))


def _end(picture: Picture, error: Exception | None = None) -> None:
    if picture.trail is not None:
        picture.trail.end(error)
