"""The threads that own the engine: one for all stages, or one for decoding beside the rest where the runtime allows.

Each loops over three verbs: the policy's `schedule`, the engine's call (`Stages.run`), and `postprocess`, after which
finished pictures are answered. Scheduler and pictures are guarded by one lock that is held between two engine calls
only, so that a request is let in or refused at once, by the scheduler itself, on its caller's thread.
An engine call that fails fails the pictures in that call, and the loop goes on.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext

import numpy as np
from numpy.typing import NDArray

from cdm_serve.costs import STAGES, TEXT, Stage
from cdm_serve.errors import DeadlineInfeasible, GenerationFailed, ServeError, Unavailable
from cdm_serve.logs import REQUEST_ID
from cdm_serve.metrics import ModelMetrics
from cdm_serve.picture import Picture
from cdm_serve.scheduler import Scheduler
from cdm_serve.stages import Stages
from cdm_serve.tasks import Call, Task
from engines.errors import ExecutionError

log = logging.getLogger("cdm_serve.runner")

OUT_OF_TIME = "the server stopped before this picture was finished; send it again elsewhere"
OVERLAPPED: tuple[tuple[Stage, ...], ...] = (("encode", "denoise"), ("decode",))


class Runner:
    """Start it, submit pictures, stop it. `ready` is set once every call that a request can lead to has been run."""

    def __init__(
        self,
        stages: Stages,
        scheduler: Scheduler,
        metrics: ModelMetrics,
        on_ready: Callable[[], None] = lambda: None,
        turns: AbstractContextManager[None] | None = None,
    ) -> None:
        self.ready = threading.Event()
        self.failure: str | None = None
        self.warmed = (0, 1)
        """Warm-up calls made, and how many there are."""
        self._on_ready = on_ready
        self._stages = stages
        self._scheduler = scheduler
        self._metrics = metrics
        self._turns = nullcontext() if turns is None or stages.engine.info.overlap else turns
        self._pictures: dict[int, Picture] = {}
        self._edge = threading.Condition()
        self._stop_at: float | None = None
        self._calls: dict[Call, float] = {}
        self._busy = 0.0  # what the calls that have ended took
        self._inside: dict[Call, float] = {}  # when the calls that are in the engine, their turn come, began
        self._warming: float | None = None  # when the running warm-up call began
        self._cancelled: dict[int, Picture] = {}
        lanes = OVERLAPPED if stages.engine.info.overlap else (STAGES,)
        self._threads = [
            threading.Thread(target=self._lane, args=(lane,), name=f"cdm-{lane[-1]}", daemon=True)
            for lane in lanes
        ]

    # What other threads call.

    def start(self) -> None:
        """Warm up, then work."""
        for thread in self._threads:
            thread.start()

    def submit(self, pictures: Sequence[Picture]) -> None:
        """Take pictures in together, so that they can share their first call. Each gets one reply.

        Raises:
            DeadlineInfeasible: one of them could not be finished in time beside what was accepted; none is taken in.
            Unavailable: the runner is stopping or broken.
        """
        with self._edge:
            if self.failure or self._stop_at is not None:
                raise Unavailable(self.failure or "the server is stopping; send the request again elsewhere")
            now = time.perf_counter()
            with ExitStack() as undo:  # all or none
                for picture in pictures:
                    task = Task(
                        picture.id, picture.bucket, len(picture.remaining) - 1, picture.arrival, picture.deadline,
                        picture.priority, picture.min_steps, encoded=self._stages.embedded(picture),
                    )  # fmt: skip
                    if excess := self._scheduler.excess(task, now):
                        raise _infeasible(task, excess, now)
                    picture.mark = self._busy_by(now)
                    self._scheduler.add(task)
                    undo.callback(self._scheduler.withdraw, picture.id)
                undo.pop_all()
            self._pictures.update((picture.id, picture) for picture in pictures)
            self._metrics.queue_depth.inc(len(pictures))
            self._edge.notify_all()

    def wait_for(self, pictures: int) -> float:
        """Seconds until `pictures` of those in work should be finished."""
        with self._edge:
            return self._scheduler.leaving(time.perf_counter(), pictures)

    def cancel(self, pictures: Sequence[Picture]) -> None:
        """Drop pictures at the next edge, without a reply. Those already finished are left alone."""
        with self._edge:
            for picture in pictures:
                if self._pictures.pop(picture.id, None) is None:
                    continue
                self._metrics.cancelled_steps.inc(self._scheduler.cancel(picture.id))
                if any(picture.id in call.ids for call in self._calls):
                    self._cancelled[picture.id] = picture  # what its call costs is known when that has ended
                else:
                    self._drop(picture)
            self._edge.notify_all()

    def stop(self, drain_s: float) -> None:
        """Finish what was accepted, for at most `drain_s` seconds; the rest is answered `Unavailable`."""
        with self._edge:
            self._stop_at = time.perf_counter() + drain_s
            self._edge.notify_all()

    def abandon(self) -> None:
        """Answer `Unavailable` to all pictures that are still there: an engine call does not return."""
        with self._edge:
            left = list(self._pictures.values())
        self._fail(left, Unavailable(OUT_OF_TIME))

    def join(self, late_s: float | None = None) -> bool:
        """Wait until the threads have ended, with `late_s` at most so long beyond `stop`'s time; whether they have."""
        for thread in self._threads:
            if thread.ident is None:  # it was never started
                continue
            if late_s is None:
                thread.join()
            else:
                assert self._stop_at is not None
                thread.join(max(0.0, self._stop_at + late_s - time.perf_counter()))
        return self.ended

    @property
    def ended(self) -> bool:
        """Whether none of its threads is in the engine, or will be."""
        return not any(thread.is_alive() for thread in self._threads)

    def stuck_for(self) -> float:
        """Seconds that the longest of the running engine calls, those of the warm-up too, has taken so far."""
        now = time.perf_counter()
        warming = self._warming
        return now - min([*list(self._inside.values()), now if warming is None else warming])

    # What only its own threads call.

    def _lane(self, stages: tuple[Stage, ...]) -> None:
        try:
            if "denoise" in stages:
                self._warm_up()
            else:
                with self._edge:
                    self._edge.wait_for(
                        lambda: self.ready.is_set() or self.failure or self._stop_at is not None
                    )
            while work := self._next(stages, wait=True):
                self._do(*work)
        except (
            BaseException
        ) as error:  # a native library's panic is no Exception, and nobody else would hear of it
            log.exception("the runner stopped working")
            with self._edge:
                self.failure = f"the engine stopped working: {said(error)}; the server must be restarted"
                self._edge.notify_all()
                left = list(self._pictures.values())
            self._fail(left, Unavailable(self.failure))

    def _next(self, stages: tuple[Stage, ...], wait: bool) -> tuple[Call, list[Picture]] | None:
        """The next call for this lane and who is in it.

        None: stopping is done, another lane broke, or nobody waits and this one shall not either.
        """
        while True:
            late: list[Picture] = []
            with self._edge:
                while not self.failure:
                    now = time.perf_counter()
                    if self._stop_at is not None:
                        if not self._pictures:
                            return None
                        if now > self._stop_at:
                            late = list(self._pictures.values())
                            break
                    if call := self._scheduler.schedule(now, stages):
                        return call, self._begin(call, now)
                    if not wait:
                        return None
                    self._edge.wait(None if self._stop_at is None else max(0.0, self._stop_at - now) + 0.001)
                else:
                    return None
            self._fail(late, Unavailable(OUT_OF_TIME))

    def _begin(self, call: Call, now: float) -> list[Picture]:
        members = [self._pictures[id] for id in call.ids]
        busy = self._busy_by(now)
        self._calls[call] = now
        for picture in members:
            picture.spans.queue += now - picture.waiting
            picture.spans.others += busy - picture.mark
            if not picture.started:
                picture.started = True
                self._metrics.queue_depth.dec()
                self._metrics.queue_time.observe(picture.spans.queue)
        return members

    def _busy_by(self, now: float) -> float:
        """Seconds that the engine has been in calls. (Those of lanes that overlap count one by one.)"""
        return self._busy + sum(now - began for began in self._calls.values())

    def _do(self, call: Call, members: list[Picture]) -> None:
        images: list[NDArray[np.uint8]] = []
        failed: GenerationFailed | None = None
        asked = time.perf_counter()
        try:
            with self._turns:
                self._inside[call] = time.perf_counter()
                waited = self._inside[call] - asked
                images = self._stages.run(call, members)
            for picture in members:  # another model's call is one of others as well
                picture.spans.queue += waited
                picture.spans.others += waited
        except Exception as error:
            failed = _failed(call.stage, error, members)
        if failed is not None:
            self._fail(members, failed)
        elif call.stage == "denoise":
            self._preview(call, [p for p in members if p.preview_due and p.id in self._pictures])
        with self._edge:
            now = time.perf_counter()
            self._inside.pop(call, None)
            self._busy += now - self._calls.pop(call)
            busy = self._busy_by(now)
            for picture in members:
                picture.waiting, picture.mark = now, busy
                if self._cancelled.pop(picture.id, None) is not None:
                    self._drop(picture)
            finished = set(self._scheduler.postprocess(call, now))
            leaving = [
                (picture, image)
                for picture, image in zip(members, images, strict=False)
                if picture.id in finished
            ]
            for picture, _ in leaving:
                del self._pictures[picture.id]
                self._leave(picture, "finished")
            self._edge.notify_all()
        for picture, image in leaving:
            picture.reply(picture, image)

    def _preview(self, call: Call, pictures: Sequence[Picture]) -> None:
        if not pictures:
            return
        try:
            with self._turns:
                images = self._stages.previews(call.bucket, pictures)
        except (
            Exception
        ) as error:  # the picture itself may still come; if the engine is broken, its next call tells
            _failed("decode previews of", error, pictures)
            return
        for picture, image in zip(pictures, images, strict=True):
            assert picture.preview is not None
            picture.preview(picture, image)

    def _fail(self, pictures: Sequence[Picture], error: ServeError) -> None:
        with self._edge:
            failed = [picture for picture in pictures if self._pictures.pop(picture.id, None) is not None]
            for picture in failed:
                self._scheduler.cancel(picture.id)
                self._leave(picture, "failed")
        for picture in failed:
            picture.reply(picture, error)

    def _drop(self, picture: Picture) -> None:
        self._metrics.cancelled_compute.inc(picture.compute)
        self._leave(picture, "cancelled")

    def _leave(self, picture: Picture, outcome: str) -> None:
        if not picture.started:
            self._metrics.queue_depth.dec()
        self._metrics.pictures.labels(outcome).inc()

    def _warm_up(self) -> None:
        """Run every component at every batch and picture size that requests can lead to; whoever asks meanwhile is
        served between two of these calls."""
        engine = self._stages.engine
        sizes = [(size.width, size.height) for size in engine.manifest.sizes]
        calls = [
            (stage, bucket, batch)
            for batch in range(1, engine.info.max_batch + 1)
            for stage in STAGES
            for bucket in ((TEXT,) if stage == "encode" else sizes)
        ]
        for done, (stage, bucket, batch) in enumerate(calls):
            self.warmed = (done, len(calls))
            with self._turns:
                self._warming = time.perf_counter()
                self._stages.warm_up(stage, bucket, batch)
                self._warming = None
            while work := self._next(STAGES, wait=False):
                self._do(*work)
            if self._stop_at is not None:
                return
        self.warmed = (len(calls), len(calls))
        with self._edge:
            self.ready.set()
            self._edge.notify_all()
        self._on_ready()


def _failed(stage: str, error: Exception, pictures: Sequence[Picture]) -> GenerationFailed:
    expected = isinstance(error, ExecutionError)
    ids = list(dict.fromkeys(picture.context.get(REQUEST_ID, "") for picture in pictures))
    log.error(
        "the engine failed to %s: %s (request_ids=%s)", stage, said(error), ",".join(ids),
        exc_info=None if expected else error, extra={"fields": {"request_ids": ids}},
    )  # fmt: skip
    return GenerationFailed(
        f"the engine failed to {stage} this picture's batch: {said(error)}; the request can be sent again"
    )


def _infeasible(task: Task, excess: float, now: float) -> DeadlineInfeasible:
    hopeless = now + task.least > task.deadline  # whatever else is in work
    reason = (
        f"the picture alone takes about {task.least * 1e3:.0f} ms; allow more time"
        if hopeless
        else f"what was accepted before takes {excess * 1e3:.0f} ms too long; try again then, allow more time"
    )
    return DeadlineInfeasible(
        f'the deadline cannot be met: {reason}, or let it take fewer steps ("auto")',
        retry_after_s=excess,
        hopeless=hopeless,
    )


def said(error: BaseException) -> str:
    """An error's message; its kind where it has none, as a MemoryError."""
    return str(error) or type(error).__name__
