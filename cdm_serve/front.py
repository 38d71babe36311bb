"""What every request passes, whichever API it is for: its id, its count, its log line, an answer whatever happens."""

from __future__ import annotations

import asyncio
import logging
import re
import time
import uuid
from typing import TYPE_CHECKING

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import Request

from cdm_serve.errors import (
    BodyTimeout,
    BodyTooLarge,
    ClientGone,
    Unavailable,
    UnsupportedMedia,
    error_response,
    http_error_response,
)
from cdm_serve.logs import REQUEST_ID as LOGGED_ID

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

    from cdm_serve.metrics import Metrics

log = logging.getLogger("cdm_serve.requests")

REQUEST_ID = re.compile(r"[A-Za-z0-9._:/+=-]{1,128}")
"""Ids of a client that are taken over; any other is replaced, so that a log line stays one line."""
PROBES = ("/livez", "/readyz", "/metrics", "/v2/health/live", "/v2/health/ready")
CROWDED = "crowded"
"""Key in a request's state: the `--max-connections` that its connection exceeds (`protocol.py`)."""
SECURITY_HEADERS = {
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "content-security-policy": "default-src 'none'; frame-ancestors 'none'",
}
"""On every answer that does not say otherwise itself: what an API answers is no page, and may not be framed as one."""


class Front:
    """ASGI middleware around the whole app. `body_timeout_s`: seconds that a request's body may take to arrive."""

    def __init__(self, app: ASGIApp, metrics: Metrics, body_timeout_s: float) -> None:
        self.app = app
        self.metrics = metrics
        self.body_timeout_s = body_timeout_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        started = time.perf_counter()
        given = Headers(scope=scope).get("x-request-id", "")
        request_id = given if REQUEST_ID.fullmatch(given) else uuid.uuid4().hex
        state = scope.setdefault("state", {})
        state.update(started=started, request_id=request_id)
        LOGGED_ID.set(request_id)
        status = 0

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = MutableHeaders(scope=message)
                headers["x-request-id"] = request_id
                for name, value in SECURITY_HEADERS.items():
                    headers.setdefault(name, value)
            await send(message)

        try:
            await self.app(scope, in_time(receive, self.body_timeout_s), send_with_id)
        finally:
            # A stream that ended badly began as a 200, and says so here.
            self._count(scope, state.get("ended", status), time.perf_counter() - started)

    def _count(self, scope: Scope, status: int, seconds: float) -> None:
        # The route's template, not the path: paths are the client's to invent, and each would be a new time series.
        endpoint = getattr(scope.get("route"), "path", "none")
        self.metrics.requests.labels(endpoint, outcome(status)).inc()
        self.metrics.request_seconds.labels(endpoint).observe(seconds)
        key = scope["state"].get("key")
        if key is not None:
            self.metrics.key_requests.labels(key, outcome(status)).inc()
        quiet = scope["path"] in PROBES and status not in (401, 403)
        level = logging.DEBUG if quiet else logging.INFO
        if log.isEnabledFor(level):
            fields = {"method": scope["method"], "path": scope["path"], "status": status}
            fields["ms"] = round(seconds * 1e3, 1)
            said = (*fields.values(), key or "-")
            log.log(level, "%s %r %d %.1f ms key=%s", *said, extra={"fields": {**fields, "key": key}})


class Catch:
    """ASGI middleware: an unforeseen failure becomes an answer, in the envelope of its path.

    Apart from `Front`, so that what gives answers their CORS headers can stand between the two.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        path, state = scope["path"], scope["state"]
        begun = False

        async def watched(message: Message) -> None:
            nonlocal begun
            begun = True
            await send(message)

        if (limit := state.get(CROWDED)) and path not in PROBES:
            crowded = Unavailable(
                f"more than --max-connections={limit} connections are open; try again when there are fewer",
                headers={"retry-after": "1", "connection": "close"},
            )
            await error_response(crowded, path)(scope, receive, send)
            return
        try:
            await self.app(scope, receive, watched)
        except Exception:
            log.exception("a request failed unforeseen")
            if begun:  # half an answer is out: closing the connection is all that is left
                raise
            message = f"the server failed unforeseen; its log has more under request id {state['request_id']}"
            await http_error_response(500, message, path=path)(scope, receive, send)


def in_time(receive: Receive, seconds: float) -> Receive:
    """`receive`, which raises `BodyTimeout` when the body is not there `seconds` from now. Then nothing is late."""
    loop = asyncio.get_running_loop()
    end = loop.time() + seconds
    whole = False

    async def bounded() -> Message:
        nonlocal whole
        if whole:
            return await receive()
        try:
            async with asyncio.timeout_at(end):
                message = await receive()
        except TimeoutError:
            raise BodyTimeout(
                f"the body was not there after --body-timeout-s={seconds:g}; send less or faster, or restart with more",
                headers={"connection": "close"},  # else the rest could come in for ever
            ) from None
        whole = not message.get("more_body", False)
        return message

    return bounded


def outcome(status: int) -> str:
    """A status as the metrics count it; 0 is a request that was torn down before it had one."""
    if status == 0 or status == 499:
        return "cancelled"
    if status < 400:
        return "ok"
    return {429: "rejected", 503: "unavailable"}.get(status, "invalid" if status < 500 else "failed")


async def read_json_body(request: Request, limit: int) -> bytes:
    """The body's bytes, read no further than `limit`.

    Raises:
        UnsupportedMedia: it does not say that it is JSON. (A form can be posted here by any web page its user visits.)
        BodyTooLarge: it is, or claims to be, longer than `limit`.
        ClientGone: the client left while sending.
    """
    media = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if media != "application/json":
        given = f"content-type={media!r}" if media else "there is no content-type"
        raise UnsupportedMedia(
            f"{given}; send JSON as application/json (curl: --json '…' in place of -d '…')"
        )
    return await read_body(request, limit)


async def read_body(request: Request, limit: int) -> bytes:
    """The body's bytes, whatever they are, read no further than `limit`. Raises `BodyTooLarge` or `ClientGone`."""
    claimed = request.headers.get("content-length", "")
    if claimed.isdecimal() and int(claimed) > limit:
        raise BodyTooLarge(_too_large(f"of {claimed} bytes", limit))
    body = bytearray()
    while True:
        message = await request.receive()
        if message["type"] == "http.disconnect":
            raise ClientGone("the client left while sending its body")
        body += message.get("body", b"")
        if len(body) > limit:
            raise BodyTooLarge(_too_large(f"of more than {limit} bytes", limit))
        if not message.get("more_body", False):
            return bytes(body)


def _too_large(size: str, limit: int) -> str:
    return f"a body {size} exceeds --max-body-bytes={limit}; send less, or restart with a higher limit"
