"""An order in, encoded pictures out: what every HTTP API stands on. Lives on the event loop.

service = Service(settings, engine)
async with service:
    answer = await service.generate(service.limits.order(request))
    answer.images[0].data                        # PNG bytes
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from math import inf
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from cdm_serve.admission import Permits
from cdm_serve.baselines import POLICIES
from cdm_serve.cost_cache import cost_file, read_costs, write_costs
from cdm_serve.costs import CostModel
from cdm_serve.embeddings import EmbeddingCache
from cdm_serve.errors import GenerationFailed, ServeError, Unavailable
from cdm_serve.images import encode_image
from cdm_serve.limits import Limits, Order
from cdm_serve.metrics import Metrics
from cdm_serve.picture import Picture, Spans
from cdm_serve.quota import charged
from cdm_serve.runner import Runner
from cdm_serve.safety import Safety
from cdm_serve.schemas import FORMATS
from cdm_serve.settings import ServeSettings
from cdm_serve.stages import Stages
from engines.base import Engine

log = logging.getLogger("cdm_serve.service")


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
    pixels: NDArray[np.uint8] | None = None


@dataclass(frozen=True)
class Preview:
    """What a picture would be if it ended after `step` steps: the file's bytes."""

    data: bytes
    seed: int
    step: int


Reply = Callable[[Picture, "NDArray[np.uint8] | ServeError"], None]
OnPreview = Callable[[Picture, "NDArray[np.uint8]"], None]


class Service:
    """Admission, runner and image encoders of one engine. Used as an async context manager; leaving it drains."""

    def __init__(self, settings: ServeSettings, engine: Engine, costs: CostModel | None = None) -> None:
        self.settings = settings
        self.engine = engine
        self.limits = Limits.of(settings, engine.manifest)
        self.metrics = Metrics()
        self.metrics.model.info(
            {"name": engine.manifest.name, "runtime": engine.info.runtime, "precision": engine.info.precision}
        )
        self.safety = Safety(settings.block_list, settings.safety_hook, self.metrics)
        self.costs = CostModel() if costs is None else costs
        self._cost_file = cost_file(engine)
        if self._cost_file is not None:
            read_costs(self._cost_file, self.costs)
        self.metrics.show_costs(self.costs.rows)
        stages = Stages(engine, self.metrics, self.costs, EmbeddingCache(settings.embedding_cache))
        scheduler = POLICIES[settings.policy](self.costs, engine.info.max_batch, settings.aging_s)
        self.runner = Runner(stages, scheduler, self.metrics, self._keep_costs)
        self.permits = Permits(settings.queue_limit, self.runner.wait_for)
        self.draining = False
        self._pool = ThreadPoolExecutor(settings.image_workers, thread_name_prefix="cdm-image")
        self._loop: asyncio.AbstractEventLoop

    async def __aenter__(self) -> Self:
        self._loop = asyncio.get_running_loop()
        for format in FORMATS:  # an encoder loads on its first picture, which should be nobody's
            encode_image(np.zeros((8, 8, 3), np.uint8), format, {})
        self.runner.start()  # last: a start that fails leaves no thread behind
        return self

    async def __aexit__(self, *_: object) -> None:
        self.drain()
        await asyncio.to_thread(self.runner.join)
        self._pool.shutdown()
        if self.runner.ready.is_set():
            self._keep_costs()

    def _keep_costs(self) -> None:
        if self._cost_file is not None:
            write_costs(self._cost_file, self.costs)

    @property
    def unavailable(self) -> str | None:
        """Why no request can be served now, if none can."""
        return (
            "the server is stopping; send the request again elsewhere"
            if self.draining
            else self.runner.failure
        )

    def drain(self) -> None:
        """Refuse newcomers from now on and let the runner finish what was accepted."""
        if not self.draining:
            self.draining = True
            log.info("stopping: finishing %d pictures", self.permits.in_use)
            self.runner.stop(self.settings.drain_timeout_s)

    def drain_soon(self) -> None:
        """`drain`, from a signal handler or another thread: it must not fall between a check and a submit."""
        self._loop.call_soon_threadsafe(self.drain)

    async def generate(self, order: Order) -> list[Made]:
        """Make every picture of `order`: `generate_all` of one."""
        return await self.generate_all([order])

    async def generate_all(self, orders: Sequence[Order]) -> list[Made]:
        """Make every picture of `orders`, taken in together or not at all, in their order.

        When cancelled, the pictures are dropped at the next step edge.

        Raises:
            ContentRefused, SafetyFailed: `safety.py` refuses a prompt or a picture, or cannot judge it.
            QueueFull: there are not enough permits.
            Forbidden, InvalidRequest, KeyBusy, RateLimited: the caller's key does not allow it (`quota.py`).
            DeadlineInfeasible: one of the deadlines could not be met.
            Unavailable: the server is stopping, or its engine is broken.
            GenerationFailed: the engine failed on one of the pictures.
        """
        futures: list[asyncio.Future[Made]] = []
        replies: list[Reply] = []
        for order in orders:
            for _ in order.seeds:
                futures.append(self._loop.create_future())
                replies.append(partial(self._finish, order, partial(self._tell, _resolve, futures[-1])))
        with self._accepted(orders, replies):
            return await asyncio.gather(*futures)

    async def stream(self, order: Order, previews: int) -> AsyncGenerator[Preview | Made, None]:
        """Make the one picture of `order`: up to `previews` previews, then the picture. Raises as `generate` does."""
        assert len(order.seeds) == 1
        events: asyncio.Queue[Future[Preview] | Made | ServeError] = asyncio.Queue()

        def preview(picture: Picture, pixels: NDArray[np.uint8]) -> None:
            # The queue keeps their order, whichever is encoded first.
            self._tell(
                events.put_nowait, self._pool.submit(self._preview, order, picture.seed, picture.step, pixels)
            )

        reply = partial(self._finish, order, partial(self._tell, events.put_nowait))
        with self._accepted([order], [reply], preview, previews):
            while True:
                event: Any = await events.get()
                if isinstance(event, Future):
                    event = await asyncio.wrap_future(event)
                if isinstance(event, ServeError):
                    raise event
                yield event
                if isinstance(event, Made):
                    return

    @contextlib.contextmanager
    def _accepted(
        self,
        orders: Sequence[Order],
        replies: Sequence[Reply],
        preview: OnPreview | None = None,
        previews: int = 0,
    ) -> Iterator[None]:
        """Submit the pictures of `orders`, hold their permits, drop them if the caller does not wait for the end."""
        if reason := self.unavailable:
            raise Unavailable(reason)
        for order in orders:
            if self.settings.log_prompts:
                log.info("prompt %r", order.prompt, extra={"fields": {"prompt": order.prompt}})
            self.safety.check_prompt(order.prompt)
        arrival = time.perf_counter()
        priority = max(order.priority for order in orders)
        # The caller's rate last: what the server itself refuses uses up none of it.
        with self.permits.take(len(replies)), charged(len(replies), priority, self.runner.wait_for):
            wishes = [
                (order, tokens, seed)
                for order in orders
                for tokens in (self.engine.tokenize(order.prompt),)
                for seed in order.seeds
            ]
            pictures = [
                Picture(
                    tokens, seed, self.engine.manifest.sigmas(order.steps), order.width, order.height, reply,
                    preview=preview, previews=previews, arrival=arrival,
                    deadline=inf if order.deadline_s is None else arrival + order.deadline_s,
                    priority=order.priority, min_steps=order.min_steps,
                )
                for (order, tokens, seed), reply in zip(wishes, replies, strict=True)
            ]  # fmt: skip
            self.runner.submit(pictures)
            try:
                yield
            except BaseException:
                self.runner.cancel(pictures)
                raise

    def parameters(self, order: Order, seed: int, steps: int) -> dict[str, Any]:
        """What is written into a picture: all it takes to make it again."""
        return {
            "prompt": order.prompt,
            "seed": seed,
            "steps": steps,
            "width": order.width,
            "height": order.height,
            "model": self.engine.manifest.name,
        }

    # The runner's threads reply, the pool encodes, the loop hears of it once.

    def _finish(
        self,
        order: Order,
        tell: Callable[[Made | ServeError], None],
        picture: Picture,
        outcome: NDArray[np.uint8] | ServeError,
    ) -> None:
        if isinstance(outcome, ServeError):
            tell(outcome)
        else:
            self._pool.submit(self._encode, order, tell, picture, outcome)

    def _encode(
        self,
        order: Order,
        tell: Callable[[Made | ServeError], None],
        picture: Picture,
        pixels: NDArray[np.uint8],
    ) -> None:
        started = time.perf_counter()
        try:
            parameters = self.parameters(order, picture.seed, picture.step)
            self.safety.check_picture(pixels, parameters)
            data = encode_image(pixels, order.format, parameters, order.quality) if order.file else b""
        except ServeError as refusal:
            tell(refusal)
            return
        except Exception as error:
            log.exception("encoding a picture as %s failed", order.format)
            tell(GenerationFailed(f"the picture could not be encoded as {order.format}: {error}"))
            return
        if order.file:
            picture.spans.image_encode = time.perf_counter() - started
        self.metrics.record(picture.spans)
        if time.perf_counter() > picture.deadline:
            self.metrics.deadline_missed.inc()
        kept = pixels if order.pixels else None
        tell(Made(data, picture.seed, order.steps, picture.step, picture.spans, kept))

    def _preview(self, order: Order, seed: int, step: int, pixels: NDArray[np.uint8]) -> Preview:
        parameters = self.parameters(order, seed, step)
        self.safety.check_picture(pixels, parameters)
        return Preview(encode_image(pixels, order.format, parameters, order.quality), seed, step)

    def _tell(self, callback: Callable[..., object], *args: object) -> None:
        with contextlib.suppress(RuntimeError):  # a loop that was stopped by force has nobody to tell
            self._loop.call_soon_threadsafe(callback, *args)


def _resolve(future: asyncio.Future[Made], result: Made | ServeError) -> None:
    if future.done():  # its request was cancelled
        return
    if isinstance(result, ServeError):
        future.set_exception(result)
    else:
        future.set_result(result)
