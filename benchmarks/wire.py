"""One HTTP/1.1 connection over a bare socket: lean enough to load a server, and free to misbehave.

    async with Wire(("127.0.0.1", 8000)) as wire:
        reply = await wire.ask(post("/generate", b'{"prompt": "red apple"}'))
        reply.status, reply.body

A client library would send only whole and correct requests, read as fast as it can, and spend more time on a request
than a fast server does.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Self

import httptools

CHUNK = 1 << 18
JSON = "application/json"


class Broken(Exception):
    """What came is no well-formed answer, or less than one."""


@dataclass(slots=True)
class Reply:
    """One whole answer; names of headers in lower case."""

    status: int
    headers: dict[str, str]
    body: bytes


@dataclass(slots=True)
class _Gathering:
    """The parser's callbacks, and what they have gathered of the first answer that began."""

    headers: dict[str, str] = field(default_factory=dict)
    body: bytearray = field(default_factory=bytearray)
    status: int = 0
    began: int = 0
    ended: int = 0
    parser: httptools.HttpResponseParser = field(init=False)

    def __post_init__(self) -> None:
        self.parser = httptools.HttpResponseParser(self)

    def feed(self, data: bytes, followed: bool) -> None:
        """Take bytes in. Raises `Broken` if they are no HTTP, unless they lie behind a whole answer and may."""
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserError as error:
            if not (followed and self.ended):
                raise Broken(f"no HTTP: {error}") from error

    def on_message_begin(self) -> None:
        self.began += 1

    def on_header(self, name: bytes, value: bytes) -> None:
        if not self.ended:
            self.headers[name.decode("latin-1").lower()] = value.decode("latin-1")

    def on_headers_complete(self) -> None:
        if not self.ended:
            self.status = self.parser.get_status_code()

    def on_body(self, body: bytes) -> None:
        if not self.ended:
            self.body += body

    def on_message_complete(self) -> None:
        self.ended += 1


class Wire:
    """One connection. `buffer_bytes`: of the kernel for what we have not read yet; none: its own choice."""

    def __init__(self, address: tuple[str, int], buffer_bytes: int | None = None) -> None:
        self._address = address
        self._socket = socket.socket()
        self._socket.setblocking(False)
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if buffer_bytes is not None:
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer_bytes)

    async def __aenter__(self) -> Self:
        try:
            await asyncio.get_running_loop().sock_connect(self._socket, self._address)
        except BaseException:
            self.close()
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Leave. What was sent to us and not read makes it a reset."""
        self._socket.close()

    async def ask(self, request: bytes) -> Reply:
        """Send a whole request and read its answer."""
        await self.send(request)
        return await self.reply()

    async def send(self, data: bytes) -> None:
        """Send bytes, whatever they are."""
        await asyncio.get_running_loop().sock_sendall(self._socket, data)

    async def receive(self, most: int = CHUNK) -> bytes:
        """Some of what was sent to us; empty where the server has closed the connection."""
        return await asyncio.get_running_loop().sock_recv(self._socket, most)

    async def reply(self, piece: int = CHUNK, pause_s: float = 0.0, followed: bool = False) -> Reply:
        """The next answer, whole; `piece` bytes at a time, with pauses between. `followed`: another may come behind it.

        Raises:
            Broken: it is no HTTP, it ends early, or more follows than was asked for.
            OSError: the connection was reset.
        """
        gathering = _Gathering()
        while not gathering.ended:
            data = await self.receive(piece)
            if not data:
                told = f"{len(gathering.body)} bytes of a body" if gathering.began else "any answer"
                raise Broken(f"the connection was closed after {told}")
            gathering.feed(data, followed)
            if pause_s and not gathering.ended:
                await asyncio.sleep(pause_s)
        if gathering.began > 1 and not followed:
            raise Broken("another answer follows the one that was asked for")
        return Reply(gathering.status, gathering.headers, bytes(gathering.body))


def post(
    path: str, body: bytes, headers: Mapping[str, str] | None = None, length: int | None = None
) -> bytes:
    """A whole request. `length`: what it claims of its body's; none: the truth."""
    return (
        head(
            "POST", path, {"content-length": str(len(body) if length is None else length), **(headers or {})}
        )
        + body
    )


def get(path: str, headers: Mapping[str, str] | None = None) -> bytes:
    """A whole request without a body."""
    return head("GET", path, headers or {}, media="")


def head(method: str, path: str, headers: Mapping[str, str], media: str = JSON) -> bytes:
    """A request's head, with the empty line that ends it."""
    given = {"host": "localhost", **({"content-type": media} if media else {}), **headers}
    lines = [f"{method} {path} HTTP/1.1", *(f"{name}: {value}" for name, value in given.items() if value)]
    return "\r\n".join([*lines, "", ""]).encode("latin-1")
