"""Sockets that do what no client should: heads without end, silence, more connections than are allowed."""

from __future__ import annotations

import http.client
import json
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack

import pytest

from cdm_serve import protocol
from cdm_serve.protocol import HEAD_BYTES, BoundedHttp
from engines.bundle import Bundle
from tests.cdm_serve.helpers import PATIENCE_S, App, Gate, listening

LIMIT = 4
Address = tuple[str, int]


@pytest.fixture(scope="module")
def app(bundle: Bundle) -> App:
    return App(bundle, Gate())


@pytest.fixture(scope="module")
def address(app: App) -> Iterator[Address]:
    with listening(app, http=BoundedHttp, limit_concurrency=LIMIT) as url:
        host, _, port = url.removeprefix("http://").partition(":")
        yield host, int(port)


def connect(address: Address) -> socket.socket:
    return socket.create_connection(address, PATIENCE_S)


@pytest.mark.parametrize(
    "start", [b"GET /livez HTTP/1.1\r\nx-a: ", b"GET /", b"GET /livez HTTP/1.1\r\nhost: x\r\n"]
)
def test_head_without_end_is_431_after_a_bounded_number_of_bytes(address: Address, start: bytes) -> None:
    header = b"x-b: %s\r\n" % (b"a" * 1000)
    part = header if start.endswith(b"\r\n") else b"a" * 1000
    with connect(address) as client:
        client.sendall(start)
        sent = 0
        try:
            while sent < 100 * HEAD_BYTES:
                client.sendall(part)
                sent += len(part)
        except OSError:  # it has closed
            pass
    assert sent < 100 * HEAD_BYTES


def test_long_head_is_told_its_limit(address: Address) -> None:
    with connect(address) as client:
        client.sendall(b"GET /livez HTTP/1.1\r\n")  # the first read of a head is not counted
        answer = http.client.HTTPResponse(client)
        line = b"x-a: %s\r\n" % (b"a" * 1017)
        # The server closes once it has read too much; bytes that it has not read then would be answered by a reset.
        for part in (line * (HEAD_BYTES // 1024), line * 2):
            time.sleep(0.3)
            client.sendall(part)
        answer.begin()
        assert answer.status == 431
        error = json.loads(answer.read())["error"]
    assert str(HEAD_BYTES) in error["message"]


def test_ordinary_heads_pass_one_after_the_other_on_one_connection(address: Address) -> None:
    client = http.client.HTTPConnection(*address, timeout=PATIENCE_S)
    for size in (10, 10_000, 60_000, 10):
        client.request("GET", "/livez", headers={"x-a": "a" * size})
        answer = client.getresponse()
        assert (answer.status, answer.read()) == (200, b"alive\n")
    client.close()


@pytest.mark.parametrize("before", [b"", b"GET /livez HTTP/1.1\r\nhost: x\r\n\r\n"])
@pytest.mark.parametrize("sent", [b"\r\n", b"GET /li", b"GET /livez HTTP/1.1\r\nhost: x\r\nx-a: "])
def test_head_that_takes_too_long_ends_its_connection(
    address: Address, before: bytes, sent: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    # uvicorn's own, which any byte stops
    monkeypatch.setattr(BoundedHttp, "timeout_keep_alive_handler", lambda _: None)
    if not before:
        monkeypatch.setattr(protocol, "HEAD_S", 0.05)
    with connect(address) as client:
        if before:
            client.sendall(before)
            answer = http.client.HTTPResponse(client)
            answer.begin()
            assert answer.read() == b"alive\n"
        monkeypatch.setattr(protocol, "HEAD_S", 0.05)
        client.sendall(sent)
        assert client.recv(1) == b""  # closed; or the socket's own timeout fails the test


def test_silence_from_the_start_ends_a_connection(address: Address, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(protocol, "HEAD_S", 0.05)
    with connect(address) as client:
        assert client.recv(1) == b""


def test_answer_may_take_longer_than_a_head(
    address: Address, app: App, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(protocol, "HEAD_S", 0.02)
    body = b'{"prompt": "cat", "seed": 1, "steps": 1}'
    head = (
        b"POST /generate HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n"
    )
    app.gate.close()
    with connect(address) as client:
        client.sendall(head % len(body) + body + b"GET /livez HTTP/1.1\r\n")  # and part of the next head
        app.gate.wait()
        client.settimeout(0.2)  # ten times HEAD_S
        with pytest.raises(TimeoutError):
            client.recv(1)
        client.settimeout(PATIENCE_S)
        app.gate.open()
        answer = http.client.HTTPResponse(client)
        answer.begin()
        assert answer.status == 200
        assert answer.read().startswith(b"\x89PNG")


def test_connections_too_many_are_refused_and_probes_are_not(address: Address, app: App) -> None:
    with ExitStack() as stack:
        statuses = []
        for _ in range(LIMIT + 1):
            client = http.client.HTTPConnection(*address, timeout=PATIENCE_S)
            stack.callback(client.close)
            client.request("GET", "/info")
            answer = client.getresponse()
            answer.read()
            statuses.append(answer.status)
        assert statuses == [200] * LIMIT + [503]
        probe = http.client.HTTPConnection(*address, timeout=PATIENCE_S)
        stack.callback(probe.close)
        probe.request("GET", "/livez")
        assert probe.getresponse().status == 200
    assert app.metric("cdm_requests_total", endpoint="none", outcome="unavailable") == 1
