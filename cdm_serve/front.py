"""What every request passes, whichever API it is for: its id, its count, its log line, an answer whatever happens."""

from __future__ import annotations

import logging
import re
import time
import uuid
from typing import TYPE_CHECKING

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import Request

from cdm_serve.errors import BodyTooLarge, ClientGone, UnsupportedMedia, http_error_response

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

    from cdm_serve.metrics import Metrics

log = logging.getLogger("cdm_serve.requests")

REQUEST_ID = re.compile(r"[A-Za-z0-9._:/+=-]{1,128}")
"""Ids of a client that are taken over; any other is replaced, so that a log line stays one line."""
PROBES = ("/livez", "/readyz", "/metrics")


class Front:
    """ASGI middleware around the whole app."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self.app = app
        self.metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        started = time.perf_counter()
        given = Headers(scope=scope).get("x-request-id", "")
        request_id = given if REQUEST_ID.fullmatch(given) else uuid.uuid4().hex
        scope.setdefault("state", {})["started"] = started
        status = 0

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = MutableHeaders(scope=message)
                headers["x-request-id"] = request_id
                headers["x-content-type-options"] = "nosniff"
            await send(message)

        try:
            await self.app(scope, receive, send_with_id)
        except Exception:
            log.exception("request %s failed unforeseen", request_id)
            if status:  # half an answer is out: closing the connection is all that is left
                raise
            message = f"the server failed unforeseen; its log has more under request id {request_id}"
            await http_error_response(500, message)(scope, receive, send_with_id)
        finally:
            self._count(scope, status, time.perf_counter() - started, request_id)

    def _count(self, scope: Scope, status: int, seconds: float, request_id: str) -> None:
        # The route's template, not the path: paths are the client's to invent, and each would be a new time series.
        endpoint = getattr(scope.get("route"), "path", "none")
        self.metrics.requests.labels(endpoint, outcome(status)).inc()
        self.metrics.request_seconds.labels(endpoint).observe(seconds)
        level = logging.DEBUG if scope["path"] in PROBES else logging.INFO
        if log.isEnabledFor(level):
            line = "%s %r %d %.1f ms request_id=%s"
            log.log(level, line, scope["method"], scope["path"], status, seconds * 1e3, request_id)


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
