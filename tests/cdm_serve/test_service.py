"""What holds around a request: ids, limits of the body and of the queue, leaving clients, failures, the stop."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from cdm_serve.delivery import Made, Preview
from cdm_serve.schemas import parse_body
from tests.cdm_serve.helpers import PATIENCE_S, App, error_of

CAT = {"prompt": "cat", "seed": 1, "steps": 4}
JSON = {"content-type": "application/json"}


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/nope", 404),
        ("GET", "/page/nope.js", 404),
        ("GET", "/generate", 405),
        ("DELETE", "/livez", 405),
    ],
)
def test_wrong_path_and_method_answer_in_the_envelope(app: App, method: str, path: str, status: int) -> None:
    response = app.client.request(method, path)
    assert response.status_code == status
    error = error_of(response)
    assert path in error["message"]
    assert error["type"] == "invalid_request_error"
    assert ("allow" in response.headers) == (status == 405)


def test_sane_request_id_is_kept_and_any_other_replaced(app: App) -> None:
    assert (
        app.client.get("/livez", headers={"x-request-id": "order-7:a"}).headers["x-request-id"] == "order-7:a"
    )
    for bad in ("two words", "x" * 129, "line\\nbreak", "ü".encode().decode("latin-1")):
        answered = app.client.get("/livez", headers={b"x-request-id": bad.encode("latin-1")}).headers[
            "x-request-id"
        ]
        assert answered != bad
        assert len(answered) == 32


def test_long_body_is_413_by_its_claim_and_by_its_bytes(serve: Callable[..., App]) -> None:
    app = serve(max_body_bytes=256)
    body = json.dumps({"prompt": "a" * 300}).encode()
    sent = 0

    def chunks() -> Iterator[bytes]:
        nonlocal sent
        for start in range(0, len(body), 50):
            sent += 50
            yield body[start : start + 50]

    for content in (body, chunks()):
        response = app.client.post("/generate", content=content, headers=JSON)
        assert response.status_code == 413
        assert "--max-body-bytes=256" in error_of(response)["message"]
    assert sent > 256
    assert app.client.post("/generate", json={"prompt": "cat"}).status_code == 200


def test_full_queue_is_429_at_once_with_a_time_to_come_back(serve: Callable[..., App]) -> None:
    app = serve(queue_limit=3, max_images=2, max_batch=1)
    app.gate.close()
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(app.client.post, "/generate", json={**CAT, "num_images": 2})
        app.wait_until(lambda: app.service.permits.in_use == 2)
        response = app.client.post("/generate", json={**CAT, "num_images": 2})
        error = error_of(response)
        assert response.status_code == 429
        assert (error["type"], error["code"]) == ("rate_limit_error", "queue_full")
        assert "--queue-limit=3" in error["message"]
        assert int(response.headers["retry-after"]) >= 1
        second = pool.submit(app.client.post, "/generate", json=CAT)  # one permit is left
        app.wait_until(lambda: app.service.permits.in_use == 3)
        app.gate.open()
        assert (first.result().status_code, second.result().status_code) == (200, 200)
    assert app.service.permits.in_use == 0
    assert app.metric("cdm_requests_total", endpoint="/generate", outcome="rejected") == 1


def test_engine_failure_is_500_for_its_batch_only(serve: Callable[..., App]) -> None:
    app = serve()
    app.engine.fail("denoise", after=1)
    response = app.client.post("/generate", json=CAT)
    assert response.status_code == 500
    error = error_of(response)
    assert (error["type"], error["code"]) == ("server_error", "generation_failed")
    assert "told to fail" in error["message"]
    assert app.client.post("/generate", json=CAT).status_code == 200
    assert app.metric("cdm_requests_total", endpoint="/generate", outcome="failed") == 1


def test_one_failed_picture_of_a_request_cancels_its_others(serve: Callable[..., App]) -> None:
    app = serve(max_batch=1)
    app.gate.close()
    app.engine.fail("denoise", after=1)  # the second step: the first picture's
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(app.client.post, "/generate", json={**CAT, "num_images": 3})
        app.gate.wait()
        app.gate.step()
        app.gate.wait()
        app.gate.step()
        assert answer.result().status_code == 500
        app.gate.open()
    app.wait_until(lambda: app.metric("cdm_pictures_total", outcome="cancelled") == 2)
    assert app.service.permits.in_use == 0


def test_unforeseen_failure_is_500_in_the_envelope(
    serve: Callable[..., App], monkeypatch: pytest.MonkeyPatch
) -> None:
    app = serve()

    def broken(*_: Any) -> Any:
        raise RuntimeError("a secret detail")

    monkeypatch.setattr(app.engine, "tokenize", broken)
    response = app.client.post("/generate", json=CAT, headers={"x-request-id": "mine"})
    assert response.status_code == 500
    message = error_of(response)["message"]
    assert "mine" in message
    assert "secret" not in message
    assert app.service.permits.in_use == 0


def test_picture_that_cannot_be_encoded_is_answered(
    serve: Callable[..., App], monkeypatch: pytest.MonkeyPatch
) -> None:
    app = serve()
    monkeypatch.setattr(app.service._delivery, "parameters", lambda *_: {"unserialisable": object()})
    response = app.client.post("/generate", json=CAT)
    assert response.status_code == 500
    assert "encoded as png" in error_of(response)["message"]


def test_client_that_leaves_is_dropped_at_the_next_step_edge(serve: Callable[..., App]) -> None:
    app = serve()
    app.gate.close()
    sent: list[dict[str, Any]] = []

    async def leave() -> None:
        inbox = [{"type": "http.request", "body": json.dumps(CAT).encode(), "more_body": False}]

        async def receive() -> dict[str, Any]:
            if inbox:
                return inbox.pop()
            await asyncio.to_thread(app.gate.wait)  # in the first step
            return {"type": "http.disconnect"}

        async def send(message: Any) -> None:
            sent.append(message)

        headers = [(b"content-type", b"application/json")]
        scope = {
            "type": "http",
            "method": "POST",
            "path": "/generate",
            "query_string": b"",
            "headers": headers,
        }
        await app.asgi(scope, receive, send)

    assert app.client.portal is not None
    app.client.portal.call(leave)
    assert app.service.permits.in_use == 0
    app.gate.open()
    app.wait_until(lambda: app.metric("cdm_pictures_total", outcome="cancelled") == 1)
    assert app.metric("cdm_cancelled_steps_total") == 3
    assert app.metric("cdm_requests_total", endpoint="/generate", outcome="cancelled") == 1
    assert app.client.post("/generate", json=CAT).status_code == 200


def test_stop_answers_what_was_accepted_and_refuses_the_rest(serve: Callable[..., App]) -> None:
    app = serve()
    app.gate.close()
    with ThreadPoolExecutor(1) as pool:
        accepted = pool.submit(app.client.post, "/generate", json={**CAT, "num_images": 6})
        app.gate.wait()
        app.models.drain_soon()
        app.wait_until(lambda: app.service.draining)
        refused = app.client.post("/generate", json=CAT)
        assert refused.status_code == 503
        assert "stopping" in error_of(refused)["message"]
        assert app.client.get("/readyz").status_code == 503
        assert app.client.get("/livez").status_code == 200
        app.gate.open()
        assert len(accepted.result().json()["images"]) == 6


def test_stop_out_of_time_answers_503(serve: Callable[..., App]) -> None:
    app = serve(drain_timeout_s=0)
    app.gate.close()
    with ThreadPoolExecutor(1) as pool:
        accepted = pool.submit(app.client.post, "/generate", json=CAT)
        app.gate.wait()
        app.models.drain_soon()
        app.wait_until(lambda: app.service.draining)
        app.gate.open()
        assert accepted.result().status_code == 503


def test_ready_only_after_warm_up_and_requests_before_it_wait(serve: Callable[..., App]) -> None:
    app = serve(ready=False, before=lambda app: app.gate.close("encode"))
    app.gate.wait()  # in the warm-up of batch 1
    response = app.client.get("/readyz")
    assert response.status_code == 503
    assert "warming up" in error_of(response)["message"]
    assert app.client.get("/livez").status_code == 200
    with ThreadPoolExecutor(1) as pool:
        early = pool.submit(app.client.post, "/generate", json=CAT)
        app.wait_until(lambda: app.service.permits.in_use == 1)
        assert app.client.get("/readyz").status_code == 503
        app.gate.open()
        assert early.result().status_code == 200
    assert app.service.runner.ready.wait(PATIENCE_S)
    assert app.client.get("/readyz").text == "ready\n"


def test_broken_engine_is_neither_live_nor_ready(serve: Callable[..., App]) -> None:
    app = serve(ready=False, before=lambda app: app.engine.fail("decode"))
    app.wait_until(lambda: app.service.runner.failure is not None)
    for response in (
        app.client.get("/livez"),
        app.client.get("/readyz"),
        app.client.post("/generate", json=CAT),
    ):
        assert response.status_code == 503
        assert "told to fail" in error_of(response)["message"]
        assert "restarted" in error_of(response)["message"]


def test_metrics_count_what_happened(serve: Callable[..., App]) -> None:
    app = serve()
    app.client.post("/generate", json={**CAT, "num_images": 3, "steps": 2})
    app.client.post("/generate", json={"prompt": ""})
    app.client.get("/no/such/path")
    text = app.client.get("/metrics").text
    for line in (
        'cdm_requests_total{endpoint="/generate",outcome="ok"} 1.0',
        'cdm_requests_total{endpoint="/generate",outcome="invalid"} 1.0',
        'cdm_requests_total{endpoint="none",outcome="invalid"} 1.0',
        'cdm_pictures_total{model="fake",outcome="finished"} 3.0',
        'cdm_pictures_in_work{model="fake"} 0.0',
        'cdm_queue_depth{model="fake"} 0.0',
        'cdm_queue_time_seconds_count{model="fake"} 3.0',
        'cdm_stage_seconds_count{model="fake",stage="encode"} 3.0',
        'cdm_stage_seconds_count{model="fake",stage="denoise"} 3.0',
        'cdm_stage_seconds_count{model="fake",stage="decode"} 3.0',
        'cdm_stage_seconds_count{model="fake",stage="image_encode"} 3.0',
        'cdm_step_seconds_count{model="fake"} 2.0',
        'cdm_steps_bucket{le="1.0",model="fake"} 0.0',
        'cdm_steps_bucket{le="2.0",model="fake"} 3.0',
        'cdm_batch_size_sum{model="fake",stage="encode"} 1.0',
        'cdm_batch_size_sum{model="fake",stage="denoise"} 6.0',
        'cdm_batch_size_sum{model="fake",stage="decode"} 3.0',
        'cdm_cancelled_compute_seconds_total{model="fake"} 0.0',
        'cdm_cache_misses_total{cache="embedding",model="fake"} 3.0',
        'cdm_model_info{device="cpu",model="fake",precision="float32",runtime="fake"} 1.0',
    ):
        assert line in text.splitlines()
    assert "/no/such/path" not in text


def test_info_says_what_can_be_asked_for(serve: Callable[..., App]) -> None:
    app = serve(max_steps=3, max_images=5, max_prompt_chars=50, examples=("cat",))
    info = app.client.get("/info").json()
    assert info["steps"] == [1, 2, 3]
    assert info["default_steps"] == 3  # the manifest's 4 is not allowed here
    assert (info["max_images"], info["max_prompt_chars"], info["examples"]) == (5, 50, ["cat"])
    for steps in info["steps"]:
        assert app.client.post("/generate", json={"prompt": "cat", "steps": steps}).status_code == 200
    assert app.client.post("/generate", json={"prompt": "cat", "steps": 4}).status_code == 422


def test_openapi_shows_this_servers_limits(serve: Callable[..., App]) -> None:
    app = serve(max_steps=3, max_images=5)
    document = app.client.get("/openapi.json").json()
    operation = document["paths"]["/generate"]["post"]
    fields = operation["requestBody"]["content"]["application/json"]["schema"]["properties"]
    assert fields["steps"]["enum"] == [1, 2, 3, "auto", None]  # null: left out
    assert fields["prompt"]["type"] == "string"
    assert fields["deadline_ms"]["type"] == ["integer", "null"]
    assert fields["num_images"]["maximum"] == 5
    assert {"200", "400", "413", "415", "422", "429", "500", "503"} <= set(operation["responses"])


@pytest.mark.parametrize(
    "path",
    ["/", "/docs", "/page/style.css", "/page/app.js", "/page/docs.js", "/page/theme.js", "/page/icon.svg"],
)
def test_page_needs_nothing_from_elsewhere(app: App, path: str) -> None:
    response = app.client.get(path)
    assert response.status_code == 200
    assert "default-src 'none'" in response.headers["content-security-policy"]
    assert response.headers["x-content-type-options"] == "nosniff"
    outside = response.text.replace("http://www.w3.org/2000/svg", "")
    assert "http://" not in outside
    assert "https://" not in outside


def test_auto_steps_are_the_default_while_there_is_time(serve: Callable[..., App]) -> None:
    app = serve()
    answer = app.client.post("/generate", json={"prompt": "cat", "steps": "auto", "response_format": "json"})
    assert answer.headers["x-steps"] == answer.headers["x-steps-planned"] == "4"
    assert [(image["steps"], image["planned_steps"]) for image in answer.json()["images"]] == [(4, 4)]


def test_auto_steps_are_fewer_when_the_deadline_asks_for_it(serve: Callable[..., App]) -> None:
    app = serve()
    seconds = {"encode": 0.0, "denoise": 0.1, "decode": 0.0}
    app.service.costs.SECONDS = {stage: (cost, 0.0) for stage, cost in seconds.items()}  # type: ignore[attr-defined]
    app.engine._cost, app.engine._sleep = (lambda stage, _: seconds[stage]), time.sleep
    body = {"prompt": "cat", "seed": 1, "steps": "auto", "deadline_ms": 290}
    answer = app.client.post("/generate", json=body)
    assert answer.headers["x-steps"] in ("1", "2")  # three take 300 ms, on a busy machine even two too long
    assert answer.headers["x-steps-planned"] == "4"
    refused = app.client.post("/generate", json={**body, "min_steps": 4})
    error = error_of(refused)
    assert refused.status_code == 429
    assert (error["code"], error["param"]) == ("deadline_infeasible", "deadline_ms")
    assert "the picture alone takes about 400 ms" in error["message"]
    assert refused.headers["x-should-retry"] == "false"
    assert app.service.permits.in_use == 0


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ({"steps": "many"}, 'steps="many" must be an integer or auto'),
        ({"steps": 2, "min_steps": 1}, 'min_steps=1 goes with steps="auto"'),
        ({"steps": "auto", "min_steps": 5}, "min_steps=5 is outside 1 to 4"),
        ({"deadline_ms": 0}, "deadline_ms=0 is outside 1 to 3600000"),
        ({"priority": 10}, "priority=10 is outside 0 to 9"),
    ],
)
def test_what_cannot_be_scheduled_is_named(app: App, body: dict[str, Any], words: str) -> None:
    answer = app.client.post("/generate", json={"prompt": "cat", **body})
    assert answer.status_code == 422
    assert words in error_of(answer)["message"]


def test_stuck_engine_is_not_live(serve: Callable[..., App]) -> None:
    app = serve(stuck_s=0.01)
    app.gate.close()
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(app.client.post, "/generate", json=CAT)
        app.gate.wait()
        app.wait_until(lambda: app.client.get("/livez").status_code == 503)
        assert "--stuck-s=0.01" in error_of(app.client.get("/livez"))["message"]
        app.gate.open()
        assert answer.result().status_code == 200
    assert app.client.get("/livez").status_code == 200


def test_previews_come_in_order_before_the_picture(serve: Callable[..., App]) -> None:
    app = serve()
    order = app.service.limits.order(parse_body(b'{"prompt": "cat", "seed": 3, "steps": 8}'))

    async def collect(previews: int) -> list[Preview | Made]:
        return [event async for event in app.service.stream(order, previews)]

    assert app.client.portal is not None
    for wanted, steps in ((0, []), (1, [4]), (3, [2, 4, 6])):
        events = app.client.portal.call(collect, wanted)
        assert [event.step for event in events[:-1] if isinstance(event, Preview)] == steps
        last = events[-1]
        assert isinstance(last, Made)
        assert (
            last.data == app.client.post("/generate", json={"prompt": "cat", "seed": 3, "steps": 8}).content
        )
    assert app.service.permits.in_use == 0
