"""Server-sent events (WHATWG HTML, section 9.2): an answer that is written while its pictures are made.

async def drawing() -> AsyncGenerator[bytes, None]:
    async for made in service.stream(order, previews=3):
        yield event("preview", {"b64_json": …})

return EventStream(drawing())
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from typing import TYPE_CHECKING, Any

from starlette.responses import Response

from cdm_serve.errors import ClientGone, ServeError, error_response, http_error_response

if TYPE_CHECKING:
    from starlette.types import Receive, Scope, Send

log = logging.getLogger("cdm_serve.sse")

MEDIA_TYPE = "text/event-stream"
KEEP_ALIVE_S = 15.0
"""Silence after which a comment is sent: proxies close connections that say nothing for a minute or half of one."""
KEEP_ALIVE = b": still drawing\n\n"
HEADERS = {
    "content-type": MEDIA_TYPE,
    "cache-control": "no-store",
    "x-accel-buffering": "no",  # nginx would keep the events back until the last
}


def event(name: str, data: Mapping[str, Any]) -> bytes:
    """One event as it is sent. JSON has no raw line breaks, so its data is one line."""
    return f"event: {name}\ndata: {json.dumps(data)}\n\n".encode()


def error_event(answer: Response) -> bytes:
    """An error's answer as an event, for when another answer has begun: the same envelope."""
    return b"event: error\ndata: " + bytes(answer.body) + b"\n\n"


class EventStream(Response):
    """An answer of `events`, each sent as soon as it is there.

    What goes wrong before the first event is raised, and so answered with a status of its own (what a full queue, a
    stop or a failing engine answers elsewhere); afterwards it becomes an `error` event, the last. A client that leaves
    cancels the work. Work never waits for a client that reads slowly.
    """

    def __init__(
        self,
        events: AsyncGenerator[bytes, None],
        headers: Mapping[str, str] | None = None,
        keep_alive_s: float = KEEP_ALIVE_S,
    ) -> None:
        self.status_code = 200
        self.background = None
        self.init_headers({**HEADERS, **(headers or {})})
        self._events = events
        self._keep_alive_s = keep_alive_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send it. `scope["state"]["ended"]` is the status that the request would have had, if it ended badly."""
        outbox: asyncio.Queue[bytes | Exception | None] = asyncio.Queue()
        work = asyncio.ensure_future(self._work(outbox))
        gone = asyncio.ensure_future(_disconnect(receive))
        gone.add_done_callback(lambda _: work.cancel())
        state = scope.setdefault("state", {})
        begun = False
        try:
            while True:
                item = await self._next(outbox)
                if isinstance(item, Exception) and not begun:
                    raise item
                if not begun:
                    begun = True
                    await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
                if isinstance(item, Exception):
                    answer = _answer(item, state.get("request_id"))
                    state["ended"] = answer.status_code
                    if isinstance(item, ClientGone):
                        return
                    item = error_event(answer)
                    outbox.put_nowait(None)
                await send({"type": "http.response.body", "body": item or b"", "more_body": item is not None})
                if item is None:
                    return
        finally:
            gone.cancel()
            if work.cancel():
                await asyncio.wait((work,))  # until it has given its permit back

    async def _work(self, outbox: asyncio.Queue[bytes | Exception | None]) -> None:
        """Fill the outbox: the events, then None or what ended them."""
        try:
            async with aclosing(self._events) as events:
                async for item in events:
                    outbox.put_nowait(item)
            outbox.put_nowait(None)
        except asyncio.CancelledError:
            outbox.put_nowait(ClientGone("the client left before its picture was finished"))
            raise
        except Exception as error:
            outbox.put_nowait(error)

    async def _next(self, outbox: asyncio.Queue[bytes | Exception | None]) -> bytes | Exception | None:
        try:
            return await asyncio.wait_for(outbox.get(), self._keep_alive_s)
        except TimeoutError:
            return KEEP_ALIVE


async def _disconnect(receive: Receive) -> None:
    """Return when the client has left. The body must have been read."""
    while (await receive())["type"] != "http.disconnect":
        pass


def _answer(error: Exception, request_id: str | None) -> Response:
    """What would have been answered, had the stream not begun."""
    if isinstance(error, ServeError):
        return error_response(error)
    log.error("request %s failed unforeseen in mid-stream", request_id, exc_info=error)
    message = f"the server failed unforeseen; its log has more under request id {request_id}"
    return http_error_response(500, message)
