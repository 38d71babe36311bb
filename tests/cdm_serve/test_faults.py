"""Faults of the engine and of clients, over real sockets: who is answered what, and that the server goes on."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from functools import partial
from typing import Any

import httpx
import pytest

from cdm_serve.images import read_parameters
from cdm_serve.protocol import BoundedHttp
from engines.bundle import Bundle
from engines.errors import ExecutionError
from engines.fake import FakeEngine
from tests.cdm_serve.helpers import PATIENCE_S, App, error_of, listening, read_events, wait_until
from tests.cdm_serve.processes import generate_head
from tests.cdm_serve.troubled import Panic, Trouble

CAT = {"prompt": "cat", "seed": 3, "steps": 4}
STAGES = ("encode", "denoise", "decode")


class Served:
    """An app with a troubled engine behind a socket, and one client."""

    def __init__(self, app: App, trouble: Trouble, url: str) -> None:
        self.app = app
        self.trouble = trouble
        self.url = url
        self.client = httpx.Client(base_url=url, trust_env=False, timeout=PATIENCE_S)

    def draw(self, **fields: Any) -> httpx.Response:
        return self.client.post("/generate", json={**CAT, **fields})

    def assert_well(self) -> None:
        """It is alive and ready, holds nothing, and makes pictures."""
        assert [self.client.get(path).status_code for path in ("/livez", "/readyz")] == [200, 200]
        answer = self.draw(prompt="a picture that nobody asked for before")
        assert answer.status_code == 200, answer.text
        assert read_parameters(answer.content)["seed"] == 3
        wait_until(lambda: self.app.service.permits.in_use == 0)
        assert self.app.metric("cdm_queue_depth") == 0


@pytest.fixture
def served(bundle: Bundle) -> Iterator[Callable[..., Served]]:
    with ExitStack() as stack:

        def start(**settings: Any) -> Served:
            trouble = Trouble()
            app = App(bundle, trouble, **settings)
            served = Served(app, trouble, stack.enter_context(listening(app, http=BoundedHttp)))
            stack.callback(served.client.close)
            stack.callback(trouble.heal)
            return served

        yield start


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize(
    ("error", "word"),
    [
        (ExecutionError("the device is gone"), "the device is gone"),
        (MemoryError(), "MemoryError"),
        (ZeroDivisionError("a bug"), "a bug"),
    ],
)
def test_engine_that_raises_fails_its_batch_in_every_api(
    served: Callable[..., Served], stage: str, error: Exception, word: str
) -> None:
    server = served(embedding_cache=0)
    server.trouble.raises(stage, error)
    native = server.draw()
    assert (native.status_code, error_of(native)["code"]) == (500, "generation_failed")
    assert word in error_of(native)["message"]
    assert "can be sent again" in error_of(native)["message"]
    openai = server.client.post("/v1/images/generations", json={"prompt": "cat"})
    assert (openai.status_code, error_of(openai)["type"]) == (500, "server_error")
    tensor = {"name": "prompt", "shape": [1], "datatype": "BYTES", "data": ["cat"]}
    kserve = server.client.post("/v2/models/fake/infer", json={"inputs": [tensor]})
    assert kserve.status_code == 500
    assert word in kserve.json()["error"]
    streamed = server.draw(stream=True, previews=0)
    assert (streamed.status_code, error_of(streamed)["code"]) == (500, "generation_failed")
    assert server.client.get("/livez").status_code == 200
    assert server.app.metric("cdm_pictures_total", outcome="failed") == 4
    server.trouble.heal()
    server.assert_well()


def test_stream_that_fails_after_a_preview_ends_with_an_error_event(served: Callable[..., Served]) -> None:
    server = served()
    server.trouble.close("denoise")
    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(server.draw, stream=True)
        server.trouble.wait()
        server.trouble.step()
        server.trouble.wait()
        server.trouble.raises("denoise", ExecutionError("the device is gone"))
        server.trouble.open()
        assert asked.result().status_code == 200
        *previews, (kind, last) = read_events(asked.result().content)
    assert [name for name, _ in previews] == [
        "preview",
        "preview",
    ]  # the second step was in the engine by then
    assert (kind, last["error"]["code"]) == ("error", "generation_failed")
    server.trouble.heal()
    server.assert_well()
    assert server.app.metric("cdm_requests_total", endpoint="/generate", outcome="failed") == 1


def test_preview_that_cannot_be_decoded_costs_the_preview_only(
    served: Callable[..., Served], monkeypatch: pytest.MonkeyPatch
) -> None:
    server = served()
    decode, calls = server.app.engine.decode, 0

    def fails_first(samples: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 1:
            raise MemoryError
        return decode(samples)

    monkeypatch.setattr(server.app.engine, "decode", fails_first)
    answer = server.draw(stream=True)
    assert [(name, data.get("step")) for name, data in read_events(answer.content)[:-1]] == [
        ("preview", 2),
        ("preview", 3),
    ]
    assert read_events(answer.content)[-1][0] == "picture"
    server.assert_well()


def test_engine_that_loses_pictures_is_told_and_nobody_waits_for_ever(
    served: Callable[..., Served], monkeypatch: pytest.MonkeyPatch
) -> None:
    server = served()
    decode = server.app.engine.decode
    monkeypatch.setattr(server.app.engine, "decode", lambda samples: decode(samples)[:-1])
    answer = server.draw()
    assert (answer.status_code, error_of(answer)["code"]) == (500, "generation_failed")
    assert "decoding 1 pictures gave 0" in error_of(answer)["message"]
    monkeypatch.undo()
    server.assert_well()


def test_panic_that_is_no_exception_stops_the_server_visibly(served: Callable[..., Served]) -> None:
    server = served()
    server.trouble.raises("denoise", Panic())
    answer = server.draw()
    assert (answer.status_code, error_of(answer)["code"]) == (503, "unavailable")
    assert "the engine stopped working: Panic" in error_of(answer)["message"]
    for path in ("/livez", "/readyz", "/v2/health/live", "/v2/health/ready"):
        assert server.client.get(path).status_code == 503
    assert server.draw().status_code == 503
    assert server.client.get("/metrics").status_code == 200
    assert server.app.metric("cdm_pictures_total", outcome="failed") == 1


def test_engine_that_hangs_is_neither_live_nor_ready_and_takes_nobody_in_until_it_is_back(
    served: Callable[..., Served],
) -> None:
    server = served(stuck_s=0.05)
    server.trouble.close("denoise")
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(server.draw)
        server.trouble.wait()
        wait_until(lambda: server.client.get("/livez").status_code == 503)
        for path in ("/livez", "/readyz"):
            answer = server.client.get(path)
            assert (answer.status_code, error_of(answer)["code"]) == (503, "unavailable")
            assert "--stuck-s=0.05" in error_of(answer)["message"]
        assert server.draw().status_code == 503
        assert not waiting.done()
        server.trouble.open()
        assert waiting.result().status_code == 200
    server.assert_well()


@pytest.mark.parametrize("overlap", [False, True])
def test_failed_warm_up_is_told_and_can_be_stopped(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch, overlap: bool
) -> None:
    monkeypatch.setattr("tests.cdm_serve.helpers.FakeEngine", partial(FakeEngine, overlap=overlap))
    trouble = Trouble()
    trouble.raises("denoise", MemoryError())
    app = App(bundle, trouble)
    with app.client as client:
        app.wait_until(lambda: app.service.runner.failure is not None)
        for path in ("/livez", "/readyz"):
            answer = client.get(path)
            assert (answer.status_code, error_of(answer)["code"]) == (503, "unavailable")
            assert "the engine stopped working: MemoryError" in error_of(answer)["message"]
        refused = client.post("/generate", json=CAT)
        assert (refused.status_code, error_of(refused)["code"]) == (503, "unavailable")
        assert client.get("/metrics").status_code == 200


def test_hanging_warm_up_is_stuck(bundle: Bundle) -> None:
    trouble = Trouble()
    trouble.close("decode")
    app = App(bundle, trouble, stuck_s=0.05)
    with app.client as client:
        trouble.wait()
        app.wait_until(lambda: client.get("/livez").status_code == 503)
        assert client.get("/readyz").status_code == 503
        trouble.open()
        app.wait_until(lambda: client.get("/readyz").status_code == 200)


@pytest.mark.parametrize("overlap", [False, True])
def test_stop_during_the_warm_up_ends(bundle: Bundle, monkeypatch: pytest.MonkeyPatch, overlap: bool) -> None:
    monkeypatch.setattr("tests.cdm_serve.helpers.FakeEngine", partial(FakeEngine, overlap=overlap))
    trouble = Trouble()
    trouble.close("denoise")
    app = App(bundle, trouble)
    with app.client:
        trouble.wait()
        app.service.drain()
        trouble.open()
    assert not app.service.runner.ready.is_set()


def test_client_that_leaves_gives_its_place_back(served: Callable[..., Served]) -> None:
    server = served(queue_limit=1, max_images=1)
    server.trouble.close("denoise")
    for stream in (False, True):
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(f"{server.url}/generate", json={**CAT, "stream": stream}, timeout=0.3, trust_env=False)
        wait_until(lambda: server.app.service.permits.in_use == 0)
    server.trouble.open()
    wait_until(lambda: server.app.metric("cdm_pictures_total", outcome="cancelled") == 2)
    wait_until(
        lambda: server.app.metric("cdm_requests_total", endpoint="/generate", outcome="cancelled") == 2
    )
    server.assert_well()


def test_client_that_does_not_read_holds_up_nobody(served: Callable[..., Served]) -> None:
    """Eight answers of several hundred KiB each that nobody reads: their places are free once they are made."""
    server = served(queue_limit=16, max_images=16)
    body = b'{"prompt": "cat", "num_images": 16, "steps": 1}'
    address = ("127.0.0.1", int(server.url.rpartition(":")[2]))

    def finished(pictures: int) -> bool:
        made = server.app.metric("cdm_pictures_total", outcome="finished")
        return made == pictures and server.app.service.permits.in_use == 0

    slow = []
    for number in range(1, 9):
        connection = socket.socket()
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.connect(address)
        connection.sendall(generate_head(body) + body)
        slow.append(connection)
        wait_until(partial(finished, 16 * number))
    server.assert_well()
    for connection in slow:
        assert connection.recv(12) == b"HTTP/1.1 200"
        connection.close()
    server.assert_well()
