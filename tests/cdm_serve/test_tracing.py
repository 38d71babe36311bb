"""What a trace tells of a request: which spans, in what tree, with what times; and what it must never tell."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import httpx
import pytest
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode, format_trace_id

from cdm_serve.images import encode_image
from cdm_serve.logs import handler
from cdm_serve.otel import Tracing
from cdm_serve.scheduler import Scheduler
from engines.bundle import Bundle
from tests.cdm_serve.helpers import App, Gate, listening, read_events
from tests.cdm_serve.test_guard import AS_USER, USER, write_keys

ROOT = Path(__file__).resolve().parents[2]
ENDPOINT = "http://localhost:4318"
PROMPT = "xylophone of the quince"


class Traces:
    """The spans that an app made, ended ones only."""

    def __init__(self) -> None:
        self.exporter = InMemorySpanExporter()
        self.provider = TracerProvider(shutdown_on_exit=False)
        self.provider.add_span_processor(SimpleSpanProcessor(self.exporter))

    @property
    def spans(self) -> list[ReadableSpan]:
        return list(self.exporter.get_finished_spans())

    def named(self, name: str) -> list[ReadableSpan]:
        return [span for span in self.spans if span.name == name]

    def one(self, name: str) -> ReadableSpan:
        (span,) = self.named(name)
        return span

    def children(self, parent: ReadableSpan) -> list[ReadableSpan]:
        """By their start."""
        found = [
            s for s in self.spans if s.parent is not None and s.parent.span_id == context(parent).span_id
        ]
        return sorted(found, key=lambda span: span.start_time or 0)


def context(span: ReadableSpan) -> Any:
    assert span.context is not None
    return span.context


def attributes(span: ReadableSpan) -> dict[str, Any]:
    return dict(span.attributes or {})


@pytest.fixture
def traces(monkeypatch: pytest.MonkeyPatch) -> Traces:
    """What an app that is told of a collector sends to it."""
    for name in ("OTEL_TRACES_SAMPLER", "OTEL_TRACES_SAMPLER_ARG", "OTEL_SDK_DISABLED"):
        monkeypatch.delenv(name, raising=False)
    traces = Traces()
    monkeypatch.setattr(Tracing, "to", lambda endpoint: Tracing(traces.provider))
    return traces


@pytest.fixture
def traced(serve: Callable[..., App], traces: Traces) -> App:
    return serve(otlp_endpoint=ENDPOINT)


@pytest.fixture
def aside() -> Iterator[Callable[..., Future[httpx.Response]]]:
    """Send requests from threads of their own."""
    with ThreadPoolExecutor(8) as pool:
        yield lambda app, body, **more: pool.submit(app.client.post, "/generate", json=body, **more)


def test_trace_of_a_request_is_a_tree_of_its_stages(traced: App, traces: Traces) -> None:
    body = {"prompt": PROMPT, "steps": 3, "seed": 7}
    answer = traced.client.post("/generate?api_key=secret", json=body, headers={"x-request-id": "req-7"})
    assert answer.status_code == 200

    server = traces.one("POST /generate")
    assert (server.parent, server.kind, server.status.status_code) == (
        None,
        SpanKind.SERVER,
        StatusCode.UNSET,
    )
    told = attributes(server)
    assert told["http.request.method"] == "POST"
    assert told["http.route"] == "/generate"
    assert told["http.response.status_code"] == 200
    assert told["cdm.request_id"] == "req-7"
    assert told["cdm.outcome"] == "ok"

    (picture,) = traces.children(server)
    assert picture.name == f"generate_content {traced.service.name}"
    told = attributes(picture)
    assert told["gen_ai.request.model"] == traced.service.name
    assert told["gen_ai.output.type"] == "image"
    assert (told["gen_ai.request.seed"], told["cdm.picture.steps"]) == (7, 3)
    assert (told["cdm.outcome"], told["cdm.picture.source"]) == ("finished", "made")

    stages = traces.children(picture)
    expected = ["queue", "encode", "denoise", "denoise", "denoise", "decode", "image_encode"]
    assert [span.name for span in stages] == expected
    assert [attributes(span)["cdm.step"] for span in stages if span.name == "denoise"] == [1, 2, 3]
    calls = [attributes(span) for span in stages if span.name in ("encode", "denoise", "decode")]
    assert [call["cdm.batch.size"] for call in calls] == [1] * 5
    assert len({call["cdm.call.id"] for call in calls}) == 5
    assert all(attributes(span)["gen_ai.request.model"] == traced.service.name for span in stages)
    assert len(traces.spans) == 2 + len(expected)
    # Nothing overlaps, nothing lies outside of what it is a part of.
    times = [time for span in stages for time in (span.start_time, span.end_time)]
    assert times == sorted(times)  # type: ignore[type-var]
    for inner, outer in ((stages[0], picture), (stages[-1], picture)):
        assert outer.start_time <= inner.start_time <= inner.end_time <= outer.end_time  # type: ignore[operator]
    slack = 5_000_000  # the server span is by another clock
    assert server.start_time - slack <= picture.start_time  # type: ignore[operator]


def test_spans_last_as_long_as_the_answer_says(traced: App, traces: Traces) -> None:
    body = {"prompt": PROMPT, "steps": 2, "seed": 3, "response_format": "json"}
    timings = traced.client.post("/generate", json=body).json()["images"][0]["timings_ms"]
    (picture,) = traces.named(f"generate_content {traced.service.name}")
    spent: dict[str, float] = {}
    for span in traces.children(picture):
        spent[span.name] = spent.get(span.name, 0.0) + ((span.end_time or 0) - (span.start_time or 0)) / 1e6
    for stage in ("denoise", "decode"):
        assert spent[stage] == pytest.approx(timings[stage], abs=0.01)


def test_nothing_secret_is_in_a_trace(
    serve: Callable[..., App], traces: Traces, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not even of failures whose messages quote it."""
    app = serve(otlp_endpoint=ENDPOINT, keys=write_keys(tmp_path / "keys.json"))

    def quote(*_: Any) -> Any:
        raise RuntimeError(f"{PROMPT} of {USER}")

    def ask(status: int, path: str = "/generate", **more: Any) -> None:
        answer = app.client.post(
            f"{path}?api_key={USER}&prompt={PROMPT}", json={"prompt": PROMPT, **more}, headers=AS_USER
        )
        assert answer.status_code == status

    ask(200)
    ask(200, stream=True)
    ask(422, steps=99)
    ask(404, "/nothing")
    monkeypatch.setattr(app.engine, "denoise", quote)
    ask(500)
    monkeypatch.setattr(app.engine, "tokenize", quote)
    ask(500)
    text = "\n".join(span.to_json() for span in traces.spans)
    assert len(traces.named("POST /generate")) == 5
    assert "REDACTED" in text
    for secret in (PROMPT, "quince", USER, "api_key"):
        assert secret not in text


def test_pictures_of_several_requests_in_one_call_are_linked(
    traced: App, traces: Traces, aside: Callable[..., Future[httpx.Response]]
) -> None:
    traced.gate.close("decode")
    first = aside(traced, {"prompt": "a", "steps": 1, "seed": 0})
    traced.gate.wait()  # it holds the engine; the others gather
    others = [aside(traced, {"prompt": "b", "steps": 2, "seed": seed}) for seed in (1, 2, 3)]
    traced.wait_until(lambda: traced.metric("cdm_queue_depth") == 3)
    traced.gate.open()
    assert {future.result().status_code for future in (first, *others)} == {200}

    shared = [span for span in traces.named("denoise") if attributes(span)["cdm.batch.size"] == 3]
    by_call: dict[int, list[ReadableSpan]] = {}
    for span in shared:
        by_call.setdefault(attributes(span)["cdm.call.id"], []).append(span)
    assert [len(spans) for spans in by_call.values()] == [3, 3]
    pictures = {
        context(span).trace_id: span for span in traces.named(f"generate_content {traced.service.name}")
    }
    assert len(pictures) == 4
    for spans in by_call.values():
        assert len({(span.start_time, span.end_time) for span in spans}) == 1
        traces_in_it = {context(span).trace_id for span in spans}
        assert len(traces_in_it) == 3
        spans.sort(key=lambda span: len(span.links))
        *followers, leader = spans
        assert {link.context.span_id for link in leader.links} == {
            context(pictures[context(span).trace_id]).span_id for span in followers
        }
        for span in followers:
            (link,) = span.links
            assert link.context.span_id == context(pictures[context(leader).trace_id]).span_id


def test_stream_shows_previews_and_ends_with_its_last_event(traced: App, traces: Traces) -> None:
    answer = traced.client.post(
        "/generate", json={"prompt": PROMPT, "steps": 3, "stream": True, "previews": 2}
    )
    assert [name for name, _ in read_events(answer.content)] == ["preview", "preview", "picture"]
    (picture,) = traces.children(traces.one("POST /generate"))
    stages = traces.children(picture)
    engine = [
        (span.name, attributes(span).get("cdm.preview", False))
        for span in stages
        if "cdm.call.id" in attributes(span)
    ]
    assert engine == [
        ("encode", False), ("denoise", False), ("decode", True), ("denoise", False), ("decode", True),
        ("denoise", False), ("decode", False),
    ]  # fmt: skip
    files = [attributes(span).get("cdm.preview", False) for span in stages if span.name == "image_encode"]
    assert sorted(files) == [False, True, True]


def test_failure_in_mid_stream_is_an_error_though_it_began_as_200(traced: App, traces: Traces) -> None:
    traced.engine.fail("denoise", after=1)
    answer = traced.client.post(
        "/generate", json={"prompt": PROMPT, "steps": 2, "stream": True, "previews": 1}
    )
    assert [name for name, _ in read_events(answer.content)] == ["preview", "error"]
    server = traces.one("POST /generate")
    assert server.status.status_code is StatusCode.ERROR
    told = attributes(server)
    assert (told["http.response.status_code"], told["cdm.outcome"], told["error.type"]) == (
        200,
        "failed",
        "500",
    )


def test_failed_engine_call_marks_the_call_the_picture_and_the_request(traced: App, traces: Traces) -> None:
    traced.engine.fail("denoise", after=1)
    answer = traced.client.post("/generate", json={"prompt": PROMPT, "steps": 3})
    assert answer.status_code == 500
    server = traces.one("POST /generate")
    (picture,) = traces.children(server)
    stages = traces.children(picture)
    assert [span.name for span in stages] == ["queue", "encode", "denoise", "denoise"]
    status = [span.status.status_code for span in (server, picture, *stages)]
    assert status == [StatusCode.ERROR] * 2 + [StatusCode.UNSET] * 3 + [StatusCode.ERROR]
    assert attributes(stages[-1])["error.type"] == "ExecutionError"
    assert attributes(picture)["error.type"] == "GenerationFailed"
    assert attributes(picture)["cdm.outcome"] == "failed"


def test_picture_that_cannot_be_encoded_is_an_error(
    traced: App, traces: Traces, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any) -> bytes:
        raise OSError("no codec")

    monkeypatch.setattr(f"{encode_image.__module__.replace('images', 'delivery')}.encode_image", broken)
    assert traced.client.post("/generate", json={"prompt": PROMPT, "steps": 1}).status_code == 500
    picture = traces.one(f"generate_content {traced.service.name}")
    assert picture.status.status_code is StatusCode.ERROR
    assert attributes(picture)["error.type"] == "OSError"


def test_request_whose_client_left_ends_its_spans(bundle: Bundle, traces: Traces) -> None:
    app = App(bundle, Gate(), otlp_endpoint=ENDPOINT)
    with listening(app) as url:
        app.gate.close()
        body = json.dumps({"prompt": PROMPT, "steps": 3}).encode()
        connection = HTTPConnection(url.removeprefix("http://"))
        connection.request("POST", "/generate", body, {"content-type": "application/json"})
        app.gate.wait()
        connection.close()
        app.wait_until(lambda: bool(traces.named("POST /generate")))
        app.gate.open()
        app.wait_until(lambda: bool(traces.named("denoise")))
    server = traces.one("POST /generate")
    assert attributes(server)["cdm.outcome"] == "cancelled"
    assert attributes(server)["http.route"] == "/generate"
    assert "error.type" not in attributes(server)
    (picture,) = traces.children(server)
    assert attributes(picture)["cdm.outcome"] == "cancelled"
    assert picture.status.status_code is StatusCode.UNSET
    # The step that ran on is shown although nobody waited for it.
    assert [span.name for span in traces.children(picture)] == ["queue", "encode", "denoise"]


def test_refused_picture_says_so(traced: App, traces: Traces, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Scheduler, "excess", lambda *_: 0.5)
    answer = traced.client.post("/generate", json={"prompt": PROMPT, "steps": 2, "deadline_ms": 1})
    assert answer.status_code == 429
    server = traces.one("POST /generate")
    assert attributes(server)["cdm.outcome"] == "rejected"
    (picture,) = traces.children(server)
    assert attributes(picture)["cdm.outcome"] == "refused"
    assert [span.name for span in traces.children(picture)] == ["queue"]


def test_kept_picture_is_shown_without_engine_calls(serve: Callable[..., App], traces: Traces) -> None:
    app = serve(otlp_endpoint=ENDPOINT, result_cache=4)
    body = {"prompt": PROMPT, "steps": 2, "seed": 1}
    app.client.post("/generate", json=body)
    traces.exporter.clear()
    app.client.post("/generate", json=body)
    picture = traces.one(f"generate_content {app.service.name}")
    assert attributes(picture)["cdm.picture.source"] == "kept"
    assert [span.name for span in traces.children(picture)] == ["queue", "image_encode"]


def test_callers_trace_is_gone_on_with(traced: App, traces: Traces) -> None:
    trace, parent = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
    headers = {"traceparent": f"00-{trace}-{parent}-01"}
    traced.client.post("/generate", json={"prompt": PROMPT, "steps": 1}, headers=headers)
    server = traces.one("POST /generate")
    assert server.parent is not None
    assert f"{server.parent.span_id:016x}" == parent
    assert {format_trace_id(context(span).trace_id) for span in traces.spans} == {trace}


def test_caller_decides_what_is_sampled(traced: App, traces: Traces) -> None:
    headers = {"traceparent": "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-00"}
    assert traced.client.post("/generate", json={"prompt": PROMPT}, headers=headers).status_code == 200
    assert traces.spans == []


def test_sampler_of_the_environment_is_obeyed(
    serve: Callable[..., App], traces: Traces, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OTEL_TRACES_SAMPLER", "always_off")
    provider = TracerProvider(shutdown_on_exit=False)
    provider.add_span_processor(SimpleSpanProcessor(traces.exporter))
    monkeypatch.setattr(Tracing, "to", lambda endpoint: Tracing(provider))
    assert serve(otlp_endpoint=ENDPOINT).client.post("/generate", json={"prompt": PROMPT}).status_code == 200
    assert traces.spans == []


def test_probes_are_not_traced(traced: App, traces: Traces) -> None:
    for path in ("/livez", "/readyz", "/metrics", "/v2/health/live"):
        assert traced.client.get(path).status_code == 200
    assert traces.spans == []
    traced.client.get("/info")
    assert [span.name for span in traces.spans] == ["GET /info"]


@pytest.mark.parametrize("tracing", [True, False])
def test_log_lines_name_request_and_trace_on_every_thread(
    serve: Callable[..., App], traces: Traces, tracing: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    app = serve(otlp_endpoint=ENDPOINT if tracing else None)

    def broken(*_: Any) -> bytes:
        raise OSError("no codec")

    log, root = tmp_path / "log", logging.getLogger()
    with log.open("w") as stream:
        handling = handler("json", stream=stream)
        root.addHandler(handling)
        root.setLevel(logging.INFO)
        try:
            with monkeypatch.context() as patch:
                patch.setattr("cdm_serve.delivery.encode_image", broken)
                app.client.post("/generate", json={"prompt": "a"}, headers={"x-request-id": "in-the-pool"})
            app.engine.fail("denoise")
            app.client.post("/generate", json={"prompt": "a"}, headers={"x-request-id": "in-the-engine"})
        finally:
            root.removeHandler(handling)
            root.setLevel(logging.WARNING)
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    (pool,) = [line for line in lines if line["logger"] == "cdm_serve.delivery"]
    assert pool["request_id"] == "in-the-pool"
    (engine,) = [line for line in lines if line["logger"] == "cdm_serve.runner"]
    assert engine["request_ids"] == ["in-the-engine"]
    answered = [line for line in lines if line["logger"] == "cdm_serve.requests"]
    assert [line["request_id"] for line in answered] == ["in-the-pool", "in-the-engine"]
    ids = [format_trace_id(context(span).trace_id) for span in traces.named("POST /generate")]
    assert [line.get("trace_id") for line in answered] == (ids if tracing else [None, None])
    assert pool.get("trace_id") == (ids[0] if tracing else None)
