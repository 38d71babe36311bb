"""The Open Inference Protocol over plain HTTP: what must hold for any client, however strange its requests."""

from __future__ import annotations

import gzip
import json
import tracemalloc
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cdm_serve.compression import decompressed
from cdm_serve.errors import BodyTooLarge
from cdm_serve.kserve_infer import parse_infer
from cdm_serve.kserve_schemas import INPUTS, OUTPUTS, PRIORITIES
from engines.fake import fake_bundle
from engines.noise import MAX_SEED
from tests.cdm_serve.helpers import App, Gate

INFER = "/v2/models/fake/infer"
LENGTH = "Inference-Header-Content-Length"
CAT = {"name": "prompt", "datatype": "BYTES", "shape": [1], "data": ["cat"]}
STEPS = {"name": "steps", "datatype": "INT32", "shape": [1], "data": [1]}


def error_of(response: httpx.Response) -> str:
    """The message of an error, which must have the protocol's exact shape and a request id."""
    assert response.headers["content-type"] == "application/json"
    assert response.headers["x-request-id"]
    body = response.json()
    assert set(body) == {"error"}
    assert isinstance(body["error"], str)
    return body["error"]


def asked(app: App, *inputs: dict[str, Any], **body: Any) -> httpx.Response:
    return app.client.post(INFER, json={"inputs": [CAT, *inputs], **body})


def test_plain_json_needs_nothing_but_a_prompt(app: App) -> None:
    response = asked(app, STEPS)
    assert response.headers["content-type"] == "application/json"
    assert LENGTH not in response.headers
    assert "denoise;dur=" in response.headers["server-timing"]
    image, seed, steps = response.json()["outputs"]
    assert (len(image["data"]), image["shape"]) == (128 * 128 * 3, [1, 128, 128, 3])
    assert (len(seed["data"]), steps["data"]) == (1, [1])


@pytest.mark.parametrize("shape", [[2], [2, 1]])
def test_rows_may_have_a_second_dimension(app: App, shape: list[int]) -> None:
    prompt = {**CAT, "shape": shape, "data": ["cat", "dog"]}
    response = app.client.post(INFER, json={"inputs": [prompt, {**STEPS, "shape": shape, "data": [1, 2]}]})
    assert response.json()["outputs"][2]["data"] == [1, 2]


def test_one_seed_for_all_rows_counts_up_and_wraps(app: App) -> None:
    prompt = {**CAT, "shape": [3], "data": ["cat"] * 3}
    seed = {"name": "seed", "datatype": "INT64", "shape": [1], "data": [MAX_SEED - 1]}
    response = app.client.post(INFER, json={"inputs": [prompt, seed], "outputs": [{"name": "seed"}]})
    assert response.json()["outputs"][0]["data"] == [MAX_SEED - 1, MAX_SEED, 0]


def test_model_name_in_the_body_is_no_error(app: App) -> None:
    assert asked(app, model_name="fake").status_code == 200


def test_pixels_cost_no_file(serve: Callable[..., App], monkeypatch: pytest.MonkeyPatch) -> None:
    app = serve()

    def broken(*_: Any) -> bytes:
        raise RuntimeError("nobody asked for a file")

    monkeypatch.setattr("cdm_serve.delivery.encode_image", broken)
    assert asked(app).status_code == 200
    assert app.metric("cdm_stage_seconds_count", stage="image_encode") == 0
    assert app.metric("cdm_stage_seconds_count", stage="decode") == 1
    encoded = asked(app, outputs=[{"name": "encoded", "parameters": {"binary_data": True}}])
    assert encoded.status_code == 500
    assert "nobody asked for a file" in error_of(encoded)


def test_picture_too_large_for_json_is_refused_before_it_is_made(
    serve: Callable[..., App], monkeypatch: pytest.MonkeyPatch
) -> None:
    app = serve()
    monkeypatch.setattr("cdm_serve.kserve_infer.MAX_JSON_VALUES", 3 * 128 * 128 - 1)
    assert "binary_data=true" in error_of(asked(app))
    assert app.metric("cdm_pictures_total", outcome="finished") == 0
    assert asked(app, outputs=[{"name": "seed"}]).status_code == 200
    assert asked(app, parameters={"binary_data_output": True}).status_code == 200


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/v2/nope", 404),
        ("GET", "/v2/models/other", 404),
        ("GET", "/v2/models/fake/versions/0/ready", 404),
        ("GET", "/v2/models/fake/versions/1/config", 200),
        ("POST", "/v2/health/live", 405),
        ("DELETE", INFER, 405),
        ("GET", "/v2x", 404),
    ],
)
def test_only_below_v2_errors_are_a_string(app: App, method: str, path: str, status: int) -> None:
    response = app.client.request(method, path)
    assert response.status_code == status
    if path == "/v2x":
        assert response.json()["error"]["type"] == "invalid_request_error"
    elif status != 200:
        assert error_of(response)


def test_name_with_slashes_is_found(tmp_path: Path) -> None:
    app = App(fake_bundle(tmp_path, name="org/fake"), Gate())
    with app.client:
        app.wait_until(app.service.runner.ready.is_set)
        for path in ("", "/ready", "/versions/1", "/versions/1/config"):
            assert app.client.get(f"/v2/models/org/fake{path}").json()["name"] == "org/fake"
        response = app.client.post("/v2/models/org/fake/versions/1/infer", json={"inputs": [CAT]})
        assert response.json()["model_name"] == "org/fake"


def test_full_queue_is_429_for_all_rows_or_none(serve: Callable[..., App]) -> None:
    app = serve(queue_limit=3, max_images=3)
    app.gate.close()
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(asked, app)
        app.wait_until(lambda: app.service.permits.in_use == 1)
        three = {**CAT, "shape": [3], "data": ["cat"] * 3}
        response = app.client.post(INFER, json={"inputs": [three]})
        assert response.status_code == 429
        assert "--queue-limit=3" in error_of(response)
        assert int(response.headers["retry-after"]) >= 1
        assert app.service.permits.in_use == 1
        app.gate.open()
        assert first.result().status_code == 200
    assert app.metric("cdm_pictures_total", outcome="finished") == 1


@pytest.mark.parametrize("way", ["deadline_ms", "timeout"])
def test_deadline_that_cannot_be_met_is_429(serve: Callable[..., App], way: str) -> None:
    app = serve()
    seconds = dict.fromkeys(("encode", "denoise", "decode"), (0.1, 0.0))
    app.service.costs.SECONDS = seconds  # type: ignore[attr-defined]
    deadline = {"name": "deadline_ms", "datatype": "INT32", "shape": [1], "data": [500]}
    response = asked(app, deadline) if way == "deadline_ms" else asked(app, parameters={"timeout": 500_000})
    assert response.status_code == 429
    assert "the deadline cannot be met" in error_of(response)
    assert response.headers["retry-after"] == "1"
    assert app.service.permits.in_use == 0


def test_stop_and_warm_up_are_503_and_liveness_is_not(serve: Callable[..., App]) -> None:
    app = serve(ready=False, before=lambda app: app.gate.close("encode"))
    for path in ("/v2/health/ready", "/v2/models/fake/ready"):
        response = app.client.get(path)
        assert response.status_code == 503
        assert "warming up" in error_of(response)
    app.gate.open()
    app.wait_until(app.service.runner.ready.is_set)
    assert app.client.get("/v2/health/ready").json() == {"ready": True}
    app.models.drain_soon()
    app.wait_until(lambda: app.service.draining)
    for response in (app.client.get("/v2/health/ready"), asked(app)):
        assert response.status_code == 503
        assert "stopping" in error_of(response)
    assert app.client.get("/v2/health/live").json() == {"live": True}


def test_engine_failure_and_the_unforeseen_are_500_in_a_string(
    serve: Callable[..., App], monkeypatch: pytest.MonkeyPatch
) -> None:
    app = serve()
    app.engine.fail("denoise")
    response = asked(app)
    assert response.status_code == 500
    assert "told to fail" in error_of(response)
    monkeypatch.setattr(app.engine, "tokenize", lambda *_: 1 / 0)
    response = asked(app)
    assert response.status_code == 500
    assert response.headers["x-request-id"] in error_of(response)


def test_long_body_is_413_even_when_it_was_short_before_it_was_inflated(serve: Callable[..., App]) -> None:
    app = serve(max_body_bytes=1000)
    bomb = gzip.compress(b" " * 10_000_000)[:1000]
    for content, encoding in (
        (b" " * 1001, "identity"),
        (bomb, "gzip"),
        (zlib.compress(b" " * 1001), "deflate"),
    ):
        response = app.client.post(INFER, content=content, headers={"content-encoding": encoding})
        assert response.status_code == 413
        assert "--max-body-bytes=1000" in error_of(response)
    exact = json.dumps({"inputs": [CAT]}).encode().ljust(1000)
    response = app.client.post(INFER, content=gzip.compress(exact), headers={"content-encoding": "gzip"})
    assert response.status_code == 200


def test_inflating_stops_at_the_limit() -> None:
    bomb = zlib.compress(b" " * 50_000_000)
    tracemalloc.start()
    try:
        with pytest.raises(BodyTooLarge):
            decompressed(bomb, "deflate", 1000)
        assert tracemalloc.get_traced_memory()[1] < 1_000_000
    finally:
        tracemalloc.stop()


def test_unknown_or_broken_compression_and_web_forms_are_refused(app: App) -> None:
    body = json.dumps({"inputs": [CAT]}).encode()
    whole = gzip.compress(body)
    for content, encoding, status in (
        (body, "br", 415),
        (body, "gzip", 400),
        (whole[:-5], "gzip", 400),
        (whole + b"more", "gzip", 400),
        (whole, "deflate", 400),
    ):
        response = app.client.post(INFER, content=content, headers={"content-encoding": encoding})
        assert response.status_code == status
        assert encoding in error_of(response)
    for form in ("application/x-www-form-urlencoded", "text/plain", "Multipart/Form-Data; boundary=x"):
        response = app.client.post(INFER, content=body, headers={"content-type": form})
        assert response.status_code == 415
        assert "application/json" in error_of(response)


def test_raw_bytes_must_be_all_there_and_no_more(app: App) -> None:
    raw = b"\x03\0\0\0cat"
    prompt = {key: CAT[key] for key in ("name", "datatype", "shape")}
    head = json.dumps({"inputs": [{**prompt, "parameters": {"binary_data_size": len(raw)}}]}).encode()

    def send(content: bytes, length: object) -> httpx.Response:
        return app.client.post(INFER, content=content, headers={LENGTH: str(length)})

    assert send(head + raw, len(head)).status_code == 200
    for content, length, fragment in (
        (head + raw[:-1], len(head), "6 bytes are left"),
        (head + raw + b"x", len(head), "1 bytes behind the JSON"),
        (head + raw, len(head) - 1, "is not JSON"),
        (head + raw, 0, "1 to"),
        (head + raw, len(head + raw) + 1, "1 to"),
        (head + raw, -1, "-1"),
        (head + raw, "9" * 5000, "999"),
        (head + raw, "many", "many"),
    ):
        response = send(content, length)
        assert response.status_code == 400
        assert fragment in error_of(response)
        assert len(error_of(response)) < 400
    assert app.client.post(INFER, content=head + raw).status_code == 400
    assert "prompt is there twice" in error_of(asked(app, CAT))
    both = {**CAT, "parameters": {"binary_data_size": len(raw)}}
    for unclear in (prompt, both):
        assert "either data" in error_of(app.client.post(INFER, json={"inputs": [unclear]}))


def test_trailing_rows_of_steps_zero_are_auto(app: App) -> None:
    two = {**CAT, "shape": [2], "data": ["cat"] * 2}
    body = {"inputs": [two, {**STEPS, "shape": [2], "data": [0, 8]}]}
    auto, fixed = parse_infer(json.dumps(body).encode(), None, app.service.limits).orders
    assert (auto.steps, auto.min_steps) == (app.service.limits.default_steps, 1)
    assert auto.deadline_s == app.settings.auto_deadline_ms / 1e3
    assert (fixed.steps, fixed.min_steps, fixed.deadline_s) == (8, None, None)


def test_parameters_have_tritons_meaning(app: App) -> None:
    def ordered(**parameters: int) -> Any:
        body = json.dumps({"inputs": [CAT], "parameters": parameters}).encode()
        return parse_infer(body, None, app.service.limits).orders[0]

    levels = [ordered(priority=level).priority for level in range(1, PRIORITIES + 1)]
    assert levels == sorted(set(levels), reverse=True)  # 1 goes first
    assert ordered(priority=0).priority == ordered().priority == levels[-1]
    assert ordered(timeout=1_500_000).deadline_s == 1.5
    assert ordered(timeout=1).deadline_s == 0.001
    assert ordered(timeout=0).deadline_s is None


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
TENSORS = st.fixed_dictionaries(
    {},
    optional={
        "name": st.sampled_from([*INPUTS, "image", ""]) | JSON_VALUES,
        "datatype": st.sampled_from(["BYTES", "INT32", "INT64", "FP32"]) | JSON_VALUES,
        "shape": st.sampled_from([[1], [2], [1, 1], [2, 1], [0], [0, 10**30], [], [-1]]) | JSON_VALUES,
        "data": st.lists(st.sampled_from(["cat", 1, 0, 64, 128, -1, 2**40]) | JSON_VALUES, max_size=2),
        "parameters": st.fixed_dictionaries(
            {}, optional={"binary_data_size": st.integers(-1, 20) | JSON_VALUES}
        ),
    },
)
BODIES = st.fixed_dictionaries(
    {
        "inputs": st.lists(TENSORS, max_size=3).map(lambda more: [CAT, STEPS, *more])
        | st.lists(TENSORS)
        | JSON_VALUES
    },
    optional={
        "id": st.text() | JSON_VALUES,
        "outputs": st.lists(st.sampled_from([{"name": name} for name in OUTPUTS]) | JSON_VALUES, max_size=3),
        "parameters": st.fixed_dictionaries(
            {},
            optional={name: st.integers(-1, 10**7) | JSON_VALUES for name in ("priority", "timeout")}
            | {"binary_data_output": st.booleans() | JSON_VALUES},
        ),
    },
)
HEADERS = (
    st.none()
    | st.integers(-1, 400).map(str)
    | st.text(st.characters(codec="latin-1", categories=("L", "N", "P")))
)


def answered(app: App, content: bytes, length: str | None, encoding: str | None = None) -> httpx.Response:
    given = {LENGTH: length, "content-encoding": encoding}
    headers = {name: value.encode("latin-1") for name, value in given.items() if value is not None}
    response = app.client.post(INFER, content=content, headers=headers)
    assert response.status_code in (200, 400, 413, 415, 429)
    if response.status_code != 200:
        assert error_of(response)
    return response


@given(
    content=st.binary(max_size=300), length=HEADERS, encoding=st.sampled_from([None, "gzip", "deflate", "br"])
)
def test_arbitrary_bytes_and_header_lengths_are_never_our_failure(
    app: App, content: bytes, length: str | None, encoding: str | None
) -> None:
    answered(app, content, length, encoding)


@settings(max_examples=200)
@given(
    body=BODIES, raw=st.binary(max_size=30), shift=st.sampled_from([0, 0, 0, 1, -1]), compress=st.booleans()
)
def test_almost_right_requests_are_never_our_failure(
    app: App, body: dict[str, Any], raw: bytes, shift: int, compress: bool
) -> None:
    head = json.dumps(body).encode()
    content = head + raw
    length = str(len(head) + shift) if raw or shift else None
    answered(app, gzip.compress(content) if compress else content, length, "gzip" if compress else None)
