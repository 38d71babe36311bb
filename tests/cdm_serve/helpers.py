"""What the serving tests share: an engine whose steps can be held back, and an app around it."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import uvicorn
from fastapi.testclient import TestClient

from cdm_serve.app import create_app
from cdm_serve.costs import Bucket, CostModel, Stage
from cdm_serve.main import listen
from cdm_serve.models import Models
from cdm_serve.service import Service
from cdm_serve.settings import ServeSettings
from engines.base import EngineOptions
from engines.bundle import Bundle
from engines.fake import FakeEngine

PATIENCE_S = 20.0
"""After which a test gives up on something that should have happened: no test waits for it to pass."""


class Gate:
    """Holds engine calls back: `close()`, wait for `reached`, let single calls `step()` or all of them (`open()`)."""

    def __init__(self) -> None:
        self.reached = threading.Event()
        self._closed = ""
        self._passes = threading.Semaphore(0)

    def close(self, component: str = "denoise") -> None:
        self._passes = threading.Semaphore(0)  # none is left from an opening before
        self.reached.clear()
        self._closed = component

    def step(self) -> None:
        self.reached.clear()
        self._passes.release()

    def open(self) -> None:
        self._closed = ""
        self._passes.release(1000)

    def wait(self) -> None:
        assert self.reached.wait(PATIENCE_S), "the engine was never called"

    def cost(self, component: str, batch: int) -> float:
        if component == self._closed:
            self.reached.set()
            assert self._passes.acquire(timeout=PATIENCE_S), "the gate stayed closed"
        return 0.0


class FixedCosts(CostModel):
    """A cost model that has made up its mind: batches cost little more than single calls. It learns nothing."""

    SECONDS: ClassVar[dict[Stage, tuple[float, float]]] = {
        "encode": (1e-6, 1e-9), "denoise": (4e-6, 1e-7), "decode": (1e-6, 1e-9)
    }  # fmt: skip

    def record(
        self, stage: Stage, bucket: Bucket, batch: int, seconds: float, undisturbed: bool = False
    ) -> None:
        del seconds, undisturbed
        super().record(stage, bucket, batch, self.seconds(stage, bucket, batch))

    def seconds(self, stage: Stage, bucket: Bucket, batch: int) -> float:
        del bucket
        call, each = self.SECONDS[stage]
        return call + each * batch


class App:
    """A served fake engine."""

    def __init__(self, bundle: Bundle, gate: Gate, **settings: Any) -> None:
        settings = {"engine": "fake", "max_batch": 4, **settings}
        self.gate = gate
        self.settings = ServeSettings(**settings)
        options = EngineOptions(max_batch=self.settings.max_batch)
        self.engine = FakeEngine(bundle, options, cost=gate.cost, sleep=lambda _: None)
        self.asgi = create_app(self.settings, self.engine, costs=FixedCosts())
        self.models: Models = self.asgi.state.models
        self.service: Service = self.models.default
        self.client = TestClient(self.asgi, raise_server_exceptions=False)

    def metric(self, name: str, **labels: str) -> float:
        """Its value, 0 where it was never counted. What is about a model is meant of the default one."""
        registry = self.models.metrics.registry
        of_model = registry.get_sample_value(name, {"model": self.service.name, **labels})
        return of_model or registry.get_sample_value(name, labels) or 0.0

    def wait_until(self, happened: Callable[[], bool]) -> None:
        wait_until(happened)


@contextmanager
def listening(app: App, **config: Any) -> Iterator[str]:
    """Serve `app` on a socket rather than through its client, for clients that need one; yields its URL."""
    listener = listen("127.0.0.1", 0)
    server = uvicorn.Server(uvicorn.Config(app.asgi, log_config=None, access_log=False, **config))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    try:
        assert app.service.runner.ready.wait(PATIENCE_S)
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        app.gate.open()
        server.should_exit = True
        thread.join()
        listener.close()


def wait_until(happened: Callable[[], bool]) -> None:
    """Return once it has happened; a test fails that waits for too long."""
    pause = threading.Event()
    for _ in range(int(PATIENCE_S / 0.002)):
        if happened():
            return
        pause.wait(0.002)
    raise AssertionError("it never happened")


def read_events(body: bytes) -> list[tuple[str, Any]]:
    """WHATWG HTML 9.2.6, as far as is used: lines end at CR, LF or both; comments begin with a colon."""
    events, name, data = [], "", []
    for line in body.decode().replace("\r\n", "\n").replace("\r", "\n").split("\n"):
        field, _, value = line.partition(":")
        if not line and data:
            events.append((name, json.loads("\n".join(data))))
            name, data = "", []
        elif field == "event":
            name = value.removeprefix(" ")
        elif field == "data":
            data.append(value.removeprefix(" "))
    return events


def error_of(response: Any) -> dict[str, Any]:
    """The error of an answer, which must have the envelope's exact shape and a request id."""
    assert response.headers["x-request-id"]
    assert response.headers["content-type"] == "application/json"
    body = response.json()
    assert set(body) == {"error"}
    assert set(body["error"]) == {"message", "type", "param", "code"}
    error: dict[str, Any] = body["error"]
    return error
