"""uvicorn's HTTP/1.1 with the bounds that it leaves to a proxy: a head's size and time, and connections at once.

    uvicorn.Config(app, http=BoundedHttp, limit_concurrency=512)

httptools gathers a request's head however long it is, and uvicorn waits for its end for ever; uvicorn's own limit of
connections refuses probes as well, in words of its own. Here requests on a connection too many are marked, and
`front.py` answers them.
"""

from __future__ import annotations

import asyncio

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from cdm_serve.errors import http_error_response
from cdm_serve.front import CROWDED

HEAD_BYTES = 65536
"""Of a head that arrives in several reads; one read (256 KiB at most) may bring more."""
HEAD_S = 10.0


class BoundedHttp(HttpToolsProtocol):
    """One connection."""

    _timer: asyncio.TimerHandle | None = None
    _expects_head = True  # between two messages, or inside a head
    _in_head = False
    _heads = 0
    _head_bytes = 0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Accepted: the first head's time begins."""
        super().connection_made(transport)
        self._max_connections, self.limit_concurrency = self.limit_concurrency, None
        self._timer = self.loop.call_later(HEAD_S, self._late)

    def connection_lost(self, exc: Exception | None) -> None:
        """Closed, by whomever."""
        self._stop_timer()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Let the parser have it; then see whether a head is still open."""
        was_in_head, expected_head, heads = self._in_head, self._expects_head, self._heads
        super().data_received(data)
        if self.transport.is_closing():
            return
        if self._in_head:
            self._head_bytes += len(data) if was_in_head and heads == self._heads else 0
            if self._head_bytes > HEAD_BYTES:
                self._refuse_head()
                return
        # Bytes that begin nothing (empty lines) have stopped uvicorn's keep-alive timer, so they need ours.
        stray = expected_head and self._expects_head and heads == self._heads
        if self._timer is None and (self._in_head or stray):
            self._timer = self.loop.call_later(HEAD_S, self._late)

    def on_message_begin(self) -> None:
        """The parser saw a request's first byte."""
        super().on_message_begin()
        self._in_head, self._head_bytes = True, 0

    def on_headers_complete(self) -> None:
        """The parser has the whole head: the request is answered from here on."""
        self._stop_timer()
        self._in_head = self._expects_head = False
        self._heads += 1
        if self._max_connections is not None and len(self.connections) > self._max_connections:
            self.scope["state"][CROWDED] = self._max_connections
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        """The parser has the whole body."""
        self._expects_head = True
        super().on_message_complete()

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _late(self) -> None:
        self._timer = None
        if self.cycle is not None and not self.cycle.response_complete:
            # It waits behind an answer.
            self._timer = self.loop.call_later(HEAD_S, self._late)
        elif not self.transport.is_closing():
            self.transport.close()

    def _refuse_head(self) -> None:
        message = f"the request's head is longer than {HEAD_BYTES} bytes; send fewer or shorter headers"
        response = http_error_response(431, message, {"connection": "close"})
        headers = b"".join(name + b": " + value + b"\r\n" for name, value in response.raw_headers)
        status = b"HTTP/1.1 431 Request Header Fields Too Large\r\n"
        self.transport.write(status + headers + b"\r\n" + bytes(response.body))
        self.transport.close()
