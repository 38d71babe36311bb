"""Where spans go: to a collector over OTLP/HTTP, or nowhere."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.sdk.trace import TracerProvider

from cdm_serve.otel import Tracing
from cdm_serve.tracing import open_tracing
from engines.cli import UsageError
from tests.cdm_serve.helpers import App

ROOT = Path(__file__).resolve().parents[2]
ENDPOINT = "http://localhost:4318"
PROMPT = "xylophone of the quince"


class Collector(HTTPServer):
    """An OTLP/HTTP collector: decodes what it gets, or answers `status`."""

    def __init__(self, status: int = 200) -> None:
        self.received: list[tuple[str, ExportTraceServiceRequest]] = []
        collector = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["content-length"]))
                collector.received.append((self.path, ExportTraceServiceRequest.FromString(body)))
                self.send_response(status)
                self.send_header("content-length", "0")
                self.end_headers()

            def log_message(self, *_: Any) -> None:
                pass

        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_address[1]}"


@pytest.fixture
def collector(request: pytest.FixtureRequest) -> Iterator[Collector]:
    collector = Collector(getattr(request, "param", 200))
    thread = threading.Thread(target=collector.serve_forever, args=(0.02,))
    thread.start()
    yield collector
    collector.shutdown()
    thread.join()
    collector.server_close()


@pytest.mark.parametrize("name", [None, "pictures"])
def test_traces_arrive_at_a_collector(
    serve: Callable[..., App], collector: Collector, monkeypatch: pytest.MonkeyPatch, name: str | None
) -> None:
    monkeypatch.setenv("OTEL_RESOURCE_ATTRIBUTES", "deployment.environment.name=test")
    monkeypatch.delenv("OTEL_SERVICE_NAME", raising=False)
    if name is not None:
        monkeypatch.setenv("OTEL_SERVICE_NAME", name)
    app = serve(otlp_endpoint=collector.url)
    assert app.client.post("/generate", json={"prompt": PROMPT, "steps": 2}).status_code == 200
    app.client.__exit__()  # a stop sends what is left
    assert {path for path, _ in collector.received} == {"/v1/traces"}
    resources = [spans for _, message in collector.received for spans in message.resource_spans]
    told = {pair.key: pair.value.string_value for pair in resources[0].resource.attributes}
    assert (told["service.name"], told["deployment.environment.name"]) == (name or "cdm-serve", "test")
    names = sorted(span.name for r in resources for scope in r.scope_spans for span in scope.spans)
    expected = [
        "POST /generate",
        "decode",
        "denoise",
        "denoise",
        "encode",
        "generate_content fake",
        "image_encode",
        "queue",
    ]
    assert names == expected


@pytest.mark.parametrize("collector", [400], indirect=True)
def test_requests_do_not_suffer_from_a_collector_that_refuses(
    serve: Callable[..., App], collector: Collector, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "10")
    app = serve(otlp_endpoint=collector.url)
    for _ in range(3):
        assert app.client.post("/generate", json={"prompt": PROMPT, "steps": 2}).status_code == 200
    app.wait_until(lambda: bool(collector.received))
    assert app.client.post("/generate", json={"prompt": PROMPT, "steps": 2}).status_code == 200


def test_stop_does_not_wait_for_a_collector_that_is_gone(
    serve: Callable[..., App], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    released = threading.Event()
    tracing = Tracing(TracerProvider(shutdown_on_exit=False))
    monkeypatch.setattr(tracing.provider, "shutdown", released.wait)
    monkeypatch.setattr("cdm_serve.otel.CLOSE_S", 0.05)
    tracing.close()
    released.set()
    assert "the last spans are lost" in caplog.text


WITHOUT = """
import sys

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.startswith(("opentelemetry.sdk", "opentelemetry.exporter")):  # FastAPI needs opentelemetry-api
            raise ModuleNotFoundError(f"{name} is blocked", name=name)

sys.meta_path.insert(0, Refuse())
from cdm_serve.main import main
raise SystemExit(main(["--engine", "fake", "--port", "0", "--otlp-endpoint", "http://localhost:4318"]))
"""


def test_tracing_without_its_packages_says_what_to_install() -> None:
    ran = subprocess.run(
        [sys.executable, "-c", WITHOUT], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert ran.returncode == 2
    assert ran.stderr.count("error:") == 1
    assert "pip install 'cdm-serve[otel]'" in ran.stderr


OFF = """
import sys, tempfile
from pathlib import Path
from fastapi.testclient import TestClient
from cdm_serve.app import create_app
from cdm_serve.settings import ServeSettings
from engines.base import EngineOptions
from engines.fake import FakeEngine, fake_bundle

with tempfile.TemporaryDirectory() as folder:
    app = create_app(ServeSettings(engine="fake"), FakeEngine(fake_bundle(Path(folder)), EngineOptions()))
    with TestClient(app) as client:
        assert client.post("/generate", json={"prompt": "a"}).status_code == 200
loaded = [name for name in sys.modules if name.startswith(("opentelemetry.sdk", "opentelemetry.exporter"))]
assert not [*loaded, *(name for name in sys.modules if name == "cdm_serve.otel")], loaded
"""


def test_no_tracing_is_imported_when_off() -> None:
    subprocess.run([sys.executable, "-c", OFF], cwd=ROOT, check=True)


def test_off_is_none_and_an_address_without_a_scheme_is_refused() -> None:
    assert open_tracing(None) is None
    from pydantic import ValidationError

    from cdm_serve.settings import ServeSettings

    with pytest.raises(ValidationError):
        ServeSettings(engine="fake", otlp_endpoint="localhost:4318")
    assert issubclass(UsageError, Exception)
