"""An order in, encoded pictures out: one model, as every HTTP API stands on it. Lives on the event loop.

service = Service(settings, engine, metrics, Safety(None, None, metrics))
async with service:
    made = await service.generate(service.limits.order(request))
    made[0].data                                 # PNG bytes
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import AbstractContextManager, ExitStack
from functools import partial
from math import inf
from typing import TYPE_CHECKING, Any, Self

import numpy as np
from numpy.typing import NDArray

from cdm_serve.admission import Permits
from cdm_serve.baselines import POLICIES
from cdm_serve.cost_cache import cost_file, read_costs, write_costs
from cdm_serve.costs import CostModel
from cdm_serve.delivery import Delivery, Made, Preview
from cdm_serve.embeddings import EmbeddingCache
from cdm_serve.errors import ServeError, Unavailable
from cdm_serve.limits import Limits, Order
from cdm_serve.metrics import Metrics
from cdm_serve.picture import Picture
from cdm_serve.quota import charged
from cdm_serve.results import Results
from cdm_serve.runner import Runner
from cdm_serve.safety import Safety
from cdm_serve.settings import ServeSettings
from cdm_serve.stages import Stages
from engines.base import Engine

if TYPE_CHECKING:
    from cdm_serve.otel import Tracing

log = logging.getLogger("cdm_serve.service")

LATE_S = 1.0
"""Beyond `--drain-timeout-s`: what the engine call that runs then may take to end."""

Reply = Callable[[Picture, "NDArray[np.uint8] | ServeError"], None]
OnPreview = Callable[[Picture, "NDArray[np.uint8]"], None]


class Service:
    """Admission, runner and image encoders of one engine. Used as an async context manager; leaving it drains.

    `turns`: held around every engine call, for engines that share a device.
    """

    def __init__(
        self,
        settings: ServeSettings,
        engine: Engine,
        metrics: Metrics,
        safety: Safety,
        costs: CostModel | None = None,
        turns: AbstractContextManager[None] | None = None,
        tracing: Tracing | None = None,
    ) -> None:
        self.settings = settings
        self.engine = engine
        self.name = engine.manifest.name
        self.began = int(time.time())
        """When it began to be served, in seconds since 1970: a bundle does not say when it was made."""
        self.limits = Limits.of(settings, engine.manifest)
        self.metrics = metrics
        self.safety = safety
        self.costs = CostModel() if costs is None else costs
        self._cost_file = cost_file(engine)
        if self._cost_file is not None:
            read_costs(self._cost_file, self.costs)
        self._counts = metrics.of(self.name)
        stages = Stages(engine, self._counts, self.costs, EmbeddingCache(settings.embedding_cache))
        scheduler = POLICIES[settings.policy](self.costs, engine.info.max_batch, settings.aging_s)
        self.runner = Runner(stages, scheduler, self._counts, self._keep_costs, turns)
        self.permits = Permits(settings.queue_limit, self.runner.wait_for)
        self.draining = False
        self._tracing = tracing
        self._results = Results(settings.result_cache) if settings.result_cache else None
        self._delivery = Delivery(settings.image_workers, engine.manifest, self.safety, self._counts)
        self.entered = False
        self._loop: asyncio.AbstractEventLoop

    async def __aenter__(self) -> Self:
        self.entered = True
        self._loop = asyncio.get_running_loop()
        self._delivery.warm_up()
        self.runner.start()  # last: a start that fails leaves no thread behind
        return self

    async def __aexit__(self, *_: object) -> None:
        self.drain()
        if not await asyncio.to_thread(self.runner.join, LATE_S):
            log.error("an engine call of %r does not return; stopping without it", self.name)
            self.runner.abandon()  # before the pool closes, in which what it finishes would go on
        # In threads: other models are served meanwhile.
        await asyncio.to_thread(self._delivery.close)
        if self.runner.ready.is_set():
            await asyncio.to_thread(self._keep_costs)

    def show(self) -> None:
        """Let `/metrics` tell what this model is and has: from now on it is the one of its name that is served."""
        info = self.engine.info
        self.metrics.forget(self.name)
        self.metrics.model_info.labels(self.name, info.runtime, info.precision, info.device).set(1)
        self.metrics.show_costs(self.name, self.costs.rows)
        self.metrics.in_work.labels(self.name).set_function(lambda: self.permits.in_use)

    def _keep_costs(self) -> None:
        if self._cost_file is not None:
            write_costs(self._cost_file, self.costs)

    @property
    def broken(self) -> str | None:
        """What only a restart mends, if there is such a thing."""
        if self.runner.failure:
            return self.runner.failure
        if (seconds := self.runner.stuck_for()) > self.settings.stuck_s:
            return (
                f"an engine call of {self.name!r} has been running for {seconds:.0f} s, longer than "
                f"--stuck-s={self.settings.stuck_s:g}; the server must be restarted"
            )
        return None

    @property
    def unavailable(self) -> str | None:
        """Why no request can be served now, if none can."""
        if self.draining:
            return f"the server is stopping, or unloading {self.name!r}; send the request again elsewhere"
        return self.broken

    def drain(self) -> None:
        """Refuse newcomers from now on and let the runner finish what was accepted."""
        if not self.draining:
            self.draining = True
            log.info("stopping: finishing %d pictures", self.permits.in_use)
            self.runner.stop(self.settings.drain_timeout_s)
            self._loop.call_later(self.settings.drain_timeout_s + LATE_S, self.runner.abandon)

    def give_up(self) -> None:
        """Answer everybody who waits `Unavailable` now, whatever the engine does."""
        self.drain()
        self.runner.stop(0)
        self.runner.abandon()

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
                replies.append(
                    partial(self._delivery.finish, order, partial(self._tell, _resolve, futures[-1]))
                )
        with self._accepted(orders, replies):
            return await asyncio.gather(*futures)

    async def stream(self, order: Order, previews: int) -> AsyncGenerator[Preview | Made, None]:
        """Make the one picture of `order`: up to `previews` previews, then the picture. Raises as `generate` does."""
        assert len(order.seeds) == 1
        events: asyncio.Queue[Future[Preview] | Made | ServeError] = asyncio.Queue()

        def preview(picture: Picture, pixels: NDArray[np.uint8]) -> None:
            # The queue keeps their order, whichever is encoded first.
            self._tell(events.put_nowait, self._delivery.preview(order, picture, pixels))

        reply = partial(self._delivery.finish, order, partial(self._tell, events.put_nowait))
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
        with (
            self.permits.take(len(replies)),
            charged(len(replies), priority, self.runner.wait_for),
            ExitStack() as leaving,
        ):
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
            if self._tracing is not None:
                leaving.enter_context(self._tracing.following(pictures, self.name))
            if self._results is not None:
                pictures = [
                    picture for picture in pictures if not self._shared(self._results, picture, leaving)
                ]
            else:
                leaving.push(self._dropping(pictures))
            self.runner.submit(pictures)
            yield

    def _shared(self, results: Results, picture: Picture, leaving: ExitStack) -> bool:
        """Whether `picture` needs no work of its own: it is kept, or in work for another request.

        An elastic one does, for its steps are not known yet, and one with previews, for they belong to its own work.
        """
        if picture.min_steps is not None or picture.previews:
            leaving.push(self._dropping([picture]))
            return False
        steps = len(picture.remaining) - 1
        key = (picture.tokens, picture.seed, steps, picture.width, picture.height)
        reply = picture.reply

        def found(pixels: NDArray[np.uint8] | ServeError) -> None:
            picture.path = picture.remaining[:-1]
            picture.spans.queue = time.perf_counter() - picture.arrival
            reply(picture, pixels)

        if (kept := results.find(key)) is not None:
            self._counts.cache_hits.labels("result").inc()
            picture.source = "kept"
            found(kept)
            return True
        if flight := results.in_work(key, picture.deadline, picture.priority):
            self._counts.cache_hits.labels("result").inc()
            picture.source = "shared"
            flight.followers.append(found)
            leaving.callback(results.leave, flight, found)
            return True
        self._counts.cache_misses.labels("result").inc()
        flight = results.begin(
            key, picture.deadline, picture.priority, stop=partial(self.runner.cancel, [picture])
        )
        leaving.callback(results.leave, flight)

        def finish(picture: Picture, outcome: NDArray[np.uint8] | ServeError) -> None:
            self._tell(results.finish, flight, outcome)
            if not flight.abandoned:
                reply(picture, outcome)

        picture.reply = finish
        return False

    def _dropping(self, pictures: Sequence[Picture]) -> Callable[..., None]:
        """What drops `pictures` at the end of a with block that was left by an exception: nobody waits for them."""

        def drop(kind: type[BaseException] | None, *_: object) -> None:
            if kind is not None:
                self.runner.cancel(pictures)

        return drop

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
