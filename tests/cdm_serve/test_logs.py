"""Log lines: what stands in each, and what stands in none."""

from __future__ import annotations

import base64
import io
import json
import logging
import re
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from cdm_serve.logs import REQUEST_ID, handler, trace
from tests.cdm_serve.helpers import App
from tests.cdm_serve.test_guard import ADMIN, AS_ADMIN, AS_USER, USER, write_keys

PROMPT = "xylophone of the quince"
STRANGER = "cdm_a-strangers-key"


def judge(_: Any, facts: Any) -> bool:
    """A safety hook whose failure quotes the prompt."""
    raise ValueError(f"no verdict on {facts['prompt']}")


def not_the_clients(record: logging.LogRecord) -> bool:
    """The test's own HTTP client logs, too."""
    return not record.name.startswith("http")


def fail(name: str, *_: Any) -> Any:
    """What a library might do that is given a prompt, and more."""
    raise RuntimeError(f"{name} of {PROMPT} for {USER}")


@pytest.fixture(params=["text", "json"])
def captured(request: pytest.FixtureRequest) -> Iterator[Callable[..., io.StringIO]]:
    """Everything that is logged, at every level, as `cdm-serve` would write it."""
    root, stream, before = logging.getLogger(), io.StringIO(), logging.getLogger().level
    installed: list[logging.Handler] = []

    def install(prompts: bool = False) -> io.StringIO:
        installed.append(handler(request.param, prompts, stream))
        installed[0].addFilter(not_the_clients)
        root.addHandler(installed[0])
        root.setLevel(logging.DEBUG)
        return stream

    yield install
    root.removeHandler(installed[0])
    root.setLevel(before)


def everything_goes_wrong(
    serve: Callable[..., App], keys: Path, monkeypatch: pytest.MonkeyPatch, **more: Any
) -> set[int]:
    """Send prompts and keys through every way that a request can go; the statuses that came."""
    statuses = set()
    app = serve(keys=write_keys(keys, rate_per_minute=12), max_prompt_chars=100, max_body_bytes=2000, **more)

    def ask(path: str, body: Any = None, headers: dict[str, str] = AS_USER, **how: Any) -> None:
        answer = app.client.request(how.pop("method", "POST"), path, json=body, headers=headers, **how)
        statuses.add(answer.status_code)

    def all_of(body: dict[str, Any], headers: dict[str, str] = AS_USER) -> None:
        infer = {"inputs": [{"name": "prompt", "datatype": "BYTES", "shape": [1], "data": [PROMPT]}]}
        for path, given in (
            ("/generate", {"prompt": PROMPT, **body}),
            ("/generate", {"prompt": PROMPT, "stream": True, **body}),
            ("/v1/images/generations", {"prompt": PROMPT}),
            ("/v1/images/generations", {"prompt": PROMPT, "stream": True, "partial_images": 2}),
            ("/v2/models/fake/infer", infer),
        ):
            ask(path, given, headers)

    all_of({})  # 200
    for text in (PROMPT, json.dumps(PROMPT), json.dumps({"prompt": PROMPT})[:-1]):  # 400, 422
        for path in ("/generate", "/v1/images/generations", "/v2/models/fake/infer"):
            json_type = {**AS_USER, "content-type": "application/json"}
            ask(path, headers=json_type, content=text)
            ask(path, headers={**AS_USER, "content-type": "text/plain"}, content=text)  # 415
    ask("/generate", {"prompt": [PROMPT], PROMPT: PROMPT})  # 422
    ask("/generate", {"prompt": PROMPT, "seed": -1, "steps": 99})
    ask("/generate", {"prompt": PROMPT * 50})  # 422, and 413
    ask("/generate", {"prompt": PROMPT * 500})
    ask("/generate", {"prompt": PROMPT, "deadline_ms": 1, "steps": 8, "num_images": 9})
    for stranger in ({"authorization": f"Bearer {STRANGER}"}, {"x-api-key": STRANGER}):  # 401
        all_of({}, stranger)
    ask(f"/generate?api_key={USER}&prompt={PROMPT}", {"prompt": PROMPT})  # a query is in no line
    ask("/metrics", method="GET")  # 403
    ask("/v1/models/other", method="GET")  # 404
    ask("/generate", method="PUT")  # 405
    all_of({"num_images": 1})  # 429, the rate being used up
    all_of({})
    all_of({})
    app.engine.fail("denoise")  # 500
    all_of({}, AS_ADMIN)
    for broken, name in ((app.engine, "tokenize"), (app.service._delivery, "parameters")):
        with monkeypatch.context() as patch:
            patch.setattr(broken, name, partial(fail, name))
            all_of({}, AS_ADMIN)
    keys.write_text(json.dumps({"keys": [{"name": "alice", "sha256": USER}]}))  # a key in place of its hash
    app.asgi.state.keys.reload()
    return statuses


def test_no_line_tells_a_key_a_prompt_or_a_picture(
    serve: Callable[..., App],
    captured: Callable[..., io.StringIO],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    stream = captured()
    statuses = everything_goes_wrong(serve, tmp_path / "keys.json", monkeypatch)
    blocked = tmp_path / "words.txt"
    blocked.write_text("# none of these\nquince\n")
    statuses |= everything_goes_wrong(serve, tmp_path / "keys-2.json", monkeypatch, block_list=blocked)
    hook = f"{__name__}:judge"
    monkeypatch.setattr("cdm_serve.safety.load_hook", lambda _: judge)
    statuses |= everything_goes_wrong(serve, tmp_path / "keys-3.json", monkeypatch, safety_hook=hook)
    assert statuses >= {200, 400, 401, 403, 404, 405, 413, 415, 422, 429, 500}
    text = stream.getvalue()
    assert "RuntimeError" in text  # failures are logged, with where they came from
    assert "in fail" in text
    assert "ValueError" in text
    for secret in (
        PROMPT,
        "quince",
        USER,
        ADMIN,
        STRANGER,
        base64.b64encode(b"\x89PNG\r\n").decode()[:7],
        "PNG",
    ):
        assert secret not in text, text[max(0, text.find(secret) - 300) :][:400]


def test_prompts_and_messages_are_logged_when_asked_for(
    serve: Callable[..., App],
    captured: Callable[..., io.StringIO],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    stream = captured(prompts=True)
    everything_goes_wrong(serve, tmp_path / "keys.json", monkeypatch, log_prompts=True)
    text = stream.getvalue()
    assert text.count(f"prompt '{PROMPT}'") >= 5
    assert f"tokenize of {PROMPT}" in text
    assert STRANGER not in text


@pytest.fixture
def json_lines(serve: Callable[..., App], tmp_path: Path) -> Iterator[Callable[..., list[dict[str, Any]]]]:
    """The lines that a request of an app with keys leads to."""
    app, stream = serve(keys=write_keys(tmp_path / "keys.json")), io.StringIO()
    lines = handler("json", stream=stream)
    root, level = logging.getLogger(), logging.getLogger().level
    lines.addFilter(not_the_clients)
    root.addHandler(lines)
    root.setLevel(logging.INFO)

    def ask(method: str, path: str, **how: Any) -> list[dict[str, Any]]:
        stream.truncate(0)
        stream.seek(0)
        app.client.request(method, path, **how)
        return [json.loads(line) for line in stream.getvalue().splitlines()]

    ask.app = app  # type: ignore[attr-defined]
    yield ask
    root.removeHandler(lines)
    root.setLevel(level)


def test_a_requests_line_says_who_asked_what_and_how_it_went(
    json_lines: Callable[..., list[dict[str, Any]]],
) -> None:
    for method, path, headers, status, key in (
        ("POST", "/generate", AS_USER, 200, "alice"),
        ("GET", "/no/such/path", AS_ADMIN, 404, "root"),
        ("GET", "/info", {}, 401, None),
        ("GET", "/metrics", AS_USER, 403, "alice"),
    ):
        body = {"prompt": "cat"} if method == "POST" else None
        lines = json_lines(method, path, json=body, headers={**headers, "x-request-id": "mine"})
        line = lines[-1]
        assert line["logger"] == "cdm_serve.requests"
        assert line["request_id"] == "mine"
        assert (line["method"], line["path"], line["status"], line["key"]) == (method, path, status, key)
        assert line["ms"] > 0
        assert line["level"] == "info"
        assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", line["time"])


def test_probes_are_not_logged_at_info(json_lines: Callable[..., list[dict[str, Any]]]) -> None:
    assert json_lines("GET", "/livez") == []


def test_every_line_of_a_failing_request_bears_its_id(
    json_lines: Callable[..., list[dict[str, Any]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(json_lines.app.engine, "tokenize", lambda _: 1 / 0)  # type: ignore[attr-defined]
    lines = json_lines(
        "POST", "/generate", json={"prompt": "cat"}, headers={**AS_USER, "x-request-id": "mine"}
    )
    failure = next(line for line in lines if line["level"] == "error")
    assert failure["exception"].endswith("builtins.ZeroDivisionError")
    ours = [line for line in lines if line["logger"].startswith("cdm_serve")]
    assert len(ours) == 2
    assert {line["request_id"] for line in ours} == {"mine"}


@pytest.mark.parametrize("format", ["text", "json"])
def test_line_stays_one_line_and_bears_the_id_of_its_request_only(format: Any) -> None:
    stream = io.StringIO()
    lines = handler(format, stream=stream)
    token = REQUEST_ID.set("mine")
    try:
        lines.emit(logging.makeLogRecord({"msg": "%r %d%%", "args": ("two\nlines", 5), "levelno": 20}))
    finally:
        REQUEST_ID.reset(token)
    lines.emit(logging.makeLogRecord({"msg": "100%", "levelno": 20}))
    first, second = stream.getvalue().splitlines()
    assert "mine" in first
    assert "5%" in first
    assert "mine" not in second
    assert "100%" in second


def test_trace_tells_places_and_types_of_a_whole_chain_and_no_message() -> None:
    def inner() -> None:
        raise KeyError("secret one")

    try:
        try:
            inner()
        except KeyError as cause:
            raise ValueError("secret two") from cause
    except ValueError as error:
        text = "\n".join(trace(error))
    assert "secret" not in "\n".join(line for line in text.splitlines() if "raise" not in line)
    assert text.index("in inner") < text.index("builtins.KeyError") < text.index("builtins.ValueError")


def test_other_handlers_still_have_the_message() -> None:
    ours, theirs = io.StringIO(), io.StringIO()
    try:
        raise ValueError("a " + "message")
    except ValueError as error:
        record = logging.makeLogRecord(
            {"msg": "it failed", "exc_info": (ValueError, error, error.__traceback__)}
        )
    plain = logging.StreamHandler(theirs)
    for each in (plain, handler("text", stream=ours), handler("json", stream=ours), plain):
        each.emit(record)
    assert "a message" not in ours.getvalue()
    assert theirs.getvalue().count("ValueError: a message") == 2
