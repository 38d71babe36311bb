"""OpenTelemetry spans: one for a request, one for each of its pictures, one for each stage and step of those.

    POST /generate                      server span (FastAPI's own instrumentation)
    └─ generate_content emoji           a picture, from acceptance to its file
       ├─ queue                         until its first engine call
       ├─ encode                        its text, if no cache had it
       ├─ denoise                       one for each step
       ├─ decode                        also for each preview
       └─ image_encode                  PNG, JPEG or WebP; also for each preview

An engine call is shared by pictures of several requests. Each of them gets a span of its own for it, with the call's
real times, so that every trace is whole by itself; `cdm.call.id` is the same in all of them. Links lead from the first
member's span to the other pictures and from theirs to the first, which keeps their number linear in the batch.

No prompt, key, query or picture gets into an attribute, nor an exception's message, which may quote one: only its type.
"""

from __future__ import annotations

import logging
import threading
import time
import uuid
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING

from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import OTELResourceDetector, Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.trace import Link, Span, Status, StatusCode, get_current_span, set_span_in_context

from cdm_serve.errors import ServeError
from cdm_serve.front import outcome
from cdm_serve.logs import TRACE_ID
from cdm_serve.tracing import EngineCall, Trail
from engines.cli import DISTRIBUTION

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

    from cdm_serve.picture import Picture

log = logging.getLogger("cdm_serve.otel")

Attributes = dict[str, str | int | bool]

CLOSE_S = 5.0
"""What a stop waits for the last spans: a collector that is gone must not hold it up."""
CLOCK_SET_NS = 100_000_000


class Tracing:
    """Where spans go. What is sampled, the standard variables say (OTEL_TRACES_SAMPLER)."""

    def __init__(self, provider: TracerProvider) -> None:
        self.provider = provider
        self._tracer = provider.get_tracer("cdm_serve", _version())
        self._clock = time.time_ns() - time.perf_counter_ns()

    @classmethod
    def to(cls, endpoint: str) -> Tracing:
        """Send to the OTLP/HTTP collector at `endpoint`, the URL without `/v1/traces`.

        Everything else is told by the standard variables: OTEL_EXPORTER_OTLP_HEADERS, OTEL_SERVICE_NAME, …
        """
        provider = TracerProvider(resource=_resource(), shutdown_on_exit=False)
        exporter = OTLPSpanExporter(endpoint=endpoint.rstrip("/") + "/v1/traces")
        provider.add_span_processor(BatchSpanProcessor(exporter))
        return cls(provider)

    def close(self) -> None:
        """Send what is left, for at most `CLOSE_S` seconds."""
        closing = threading.Thread(target=self.provider.shutdown, name="cdm-otel-close", daemon=True)
        closing.start()
        closing.join(CLOSE_S)
        if closing.is_alive():
            log.warning("the collector took longer than %g s; the last spans are lost", CLOSE_S)

    def described(self, app: ASGIApp) -> ASGIApp:
        """`app`, which adds to its server span what FastAPI does not know."""
        return Described(app)

    @contextmanager
    def following(self, pictures: Sequence[Picture], model: str) -> Iterator[None]:
        """Trace `pictures`, inside the current span, if that is sampled. Who leaves by an exception drops them."""
        trails, clock = [], self._set_clock()
        for picture in pictures:
            attributes: Attributes = {
                "gen_ai.operation.name": "generate_content",
                "gen_ai.provider.name": DISTRIBUTION,
                "gen_ai.request.model": model,
                "gen_ai.output.type": "image",
                "gen_ai.request.seed": picture.seed,
                "cdm.picture.width": picture.width,
                "cdm.picture.height": picture.height,
                "cdm.picture.steps.planned": len(picture.remaining) - 1,
            }
            started = round(picture.arrival * 1e9) + clock
            span = self._tracer.start_span(
                f"generate_content {model}", attributes=attributes, start_time=started
            )
            if span.is_recording():
                picture.trail = trail = PictureSpan(self, span, picture, model, clock)
                trails.append(trail)
        try:
            yield
        except BaseException as error:
            for trail in trails:
                trail.leave(error)
            raise

    def _set_clock(self) -> int:
        """Nanoseconds to add to `time.perf_counter`: the same for all, until the machine's clock is set."""
        now = time.time_ns() - time.perf_counter_ns()
        if abs(now - self._clock) > CLOCK_SET_NS:
            self._clock = now
        return self._clock

    def child(
        self,
        parent: Span,
        name: str,
        times: tuple[int, int],
        attributes: Attributes,
        links: Sequence[Link] = (),
        error: BaseException | None = None,
    ) -> None:
        """A span inside `parent`, at `times` (ns since the epoch), that is over."""
        started, ended = times
        span = self._tracer.start_span(
            name, set_span_in_context(parent), attributes=attributes, links=links, start_time=started
        )
        if error is not None:
            _fail(span, error)
        span.end(ended)


class PictureSpan(Trail):
    """The span of a picture. Those of its stages are made when it ends; a call that outlives it is added then."""

    def __init__(self, tracing: Tracing, span: Span, picture: Picture, model: str, clock: int) -> None:
        self.span = span
        self._tracing = tracing
        self._picture = picture
        self._model = model
        self._clock = clock
        self._calls: deque[EngineCall] = deque()
        self._steps = 0
        self._ended = False
        self._ending = threading.Lock()

    def called(self, call: EngineCall) -> None:
        self._calls.append(call)
        if self._ended:
            self._tell_calls()

    def encoded(self, started: float, preview: bool = False) -> None:
        attributes: Attributes = {"gen_ai.request.model": self._model}
        if preview:
            attributes["cdm.preview"] = True
        self._tracing.child(self.span, "image_encode", self._times(started, time.perf_counter()), attributes)

    def end(self, error: Exception | None = None) -> None:
        self._end("finished" if error is None else "failed", error)

    def leave(self, error: BaseException) -> None:
        """Nobody waits for it any more, or it was never let in (`error` is the server's refusal)."""
        refused = isinstance(error, ServeError) and not self._picture.started
        self._end("refused" if refused else "cancelled", None)

    def _end(self, outcome: str, error: Exception | None) -> None:
        with self._ending:
            if self._ended:
                return
            picture = self._picture
            # One that needed no call of its own has waited for another's, or for nothing.
            waited = picture.arrival + picture.spans.queue if picture.spans.queue else time.perf_counter()
            first = min((call.started for call in list(self._calls)), default=waited)
            attributes: Attributes = {"gen_ai.request.model": self._model}
            self._tracing.child(self.span, "queue", self._times(picture.arrival, first), attributes)
            self._ended = True
            self._tell_calls()
            self.span.set_attribute("cdm.outcome", outcome)
            self.span.set_attribute("cdm.picture.source", picture.source)
            self.span.set_attribute("cdm.picture.steps", picture.step)
            if error is not None:
                _fail(self.span, error)
            self.span.end(self._times(0.0, time.perf_counter())[1])

    def _tell_calls(self) -> None:
        while self._calls:
            try:
                call = self._calls.popleft()
            except IndexError:  # another thread was faster
                return
            attributes: Attributes = {
                "gen_ai.request.model": self._model,
                "cdm.batch.size": call.batch,
                "cdm.call.id": call.id,
            }
            if call.stage == "denoise":
                self._steps += 1
                attributes["cdm.step"] = self._steps
            if call.preview:
                attributes["cdm.preview"] = True
            times = self._times(call.started, call.ended)
            self._tracing.child(self.span, call.stage, times, attributes, self._links(call), call.error)

    def _links(self, call: EngineCall) -> list[Link]:
        leader, *others = call.trails
        linked = others if leader is self else [leader]
        return [Link(trail.span.get_span_context()) for trail in linked if isinstance(trail, PictureSpan)]

    def _times(self, started: float, ended: float) -> tuple[int, int]:
        return round(started * 1e9) + self._clock, round(ended * 1e9) + self._clock


class Described:
    """ASGI middleware inside FastAPI's server span: adds what that does not know, the request's id and how it ended."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        span = get_current_span()
        if scope["type"] != "http" or not span.is_recording():
            await self.app(scope, receive, send)
            return
        TRACE_ID.set(f"{span.get_span_context().trace_id:032x}")
        if scope.get("query_string"):
            span.set_attribute("url.query", "REDACTED")
        state = scope.setdefault("state", {})
        status = 0

        def describe() -> None:
            # A stream that ended badly began as a 200.
            ended = state.get("ended", status)
            span.set_attribute("cdm.outcome", outcome(ended))
            span.set_attribute("cdm.request_id", state["request_id"])
            if ended >= 500:
                span.set_status(Status(StatusCode.ERROR))
                span.set_attribute("error.type", str(ended))

        async def send_described(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            elif not message.get("more_body", False):
                describe()  # with this message the span ends
            await send(message)

        try:
            await self.app(scope, receive, send_described)
        finally:
            if span.is_recording():
                describe()


def _fail(span: Span, error: BaseException) -> None:
    span.set_status(Status(StatusCode.ERROR))
    span.set_attribute("error.type", type(error).__qualname__)


def _resource() -> Resource:
    ours = {
        "service.name": DISTRIBUTION,
        "service.version": _version(),
        "service.instance.id": str(uuid.uuid4()),
    }
    return Resource.create({**ours, **OTELResourceDetector().detect().attributes})


def _version() -> str:
    try:
        return version(DISTRIBUTION)
    except PackageNotFoundError:  # run from source
        return "0"
