"""`POST /generate` with stream: previews, then the picture, as server-sent events."""

from __future__ import annotations

import base64
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest

from cdm_serve.images import read_parameters
from engines.bundle import Bundle
from tests.cdm_serve.helpers import PATIENCE_S, App, Gate, error_of, listening, read_events

CAT = {"prompt": "cat", "seed": 3, "steps": 4, "stream": True}


def test_stream_is_a_preview_per_step_then_the_picture(app: App) -> None:
    response = app.client.post("/generate", json=CAT)
    assert response.headers["content-type"] == "text/event-stream"
    assert response.headers["cache-control"] == "no-store"
    assert response.headers["x-seed"] == "3"
    *previews, (kind, picture) = read_events(response.content)
    assert [name for name, _ in previews] == ["preview"] * 3
    assert [(data["step"], data["steps"], data["seed"]) for _, data in previews] == [
        (step, 4, 3) for step in (1, 2, 3)
    ]
    for step, (_, data) in enumerate(previews, 1):
        assert read_parameters(base64.b64decode(data["b64_json"]))["steps"] == step
    assert kind == "picture"
    whole = {**CAT, "stream": False, "response_format": "json"}
    (entry,) = app.client.post("/generate", json=whole).json()["images"]
    timings, other = picture.pop("timings_ms"), entry.pop("timings_ms")
    assert picture == entry
    assert set(timings) == {*other, "total"}
    assert timings["total"] >= timings["denoise"] > 0
    assert len({data["b64_json"] for _, data in (*previews, (kind, picture))}) == 4


@pytest.mark.parametrize(("previews", "steps"), [(0, []), (1, [2]), (2, [2, 3]), (7, [1, 2, 3])])
def test_previews_are_spread_over_the_steps(app: App, previews: int, steps: list[int]) -> None:
    *shown, (kind, _) = read_events(app.client.post("/generate", json={**CAT, "previews": previews}).content)
    assert [data["step"] for _, data in shown] == steps
    assert kind == "picture"


@pytest.mark.parametrize(
    ("body", "param", "words"),
    [
        ({**CAT, "num_images": 2}, "num_images", "num_images=2 cannot be streamed"),
        ({**CAT, "response_format": "image"}, "response_format", "events carry base64"),
        ({**CAT, "previews": 8}, "previews", "previews=8 is outside 0 to 7"),
        ({**CAT, "previews": -1}, "previews", "previews=-1 is outside 0 to 7"),
        ({**CAT, "previews": True}, "previews", "previews=true must be an integer"),
        ({**CAT, "stream": 1}, "stream", "stream=1 must be true or false"),
        ({"prompt": "cat", "previews": 0}, "previews", "goes with stream=true"),
    ],
)
def test_what_cannot_be_streamed_is_named(app: App, body: dict[str, Any], param: str, words: str) -> None:
    response = app.client.post("/generate", json=body)
    error = error_of(response)
    assert (response.status_code, error["param"]) == (422, param)
    assert words in error["message"]


def test_full_queue_refuses_a_stream_as_any_other_request(serve: Callable[..., App]) -> None:
    app = serve(queue_limit=1, max_images=1)
    app.gate.close()
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(app.client.post, "/generate", json=CAT)
        app.gate.wait()
        refused = app.client.post("/generate", json=CAT)
        assert (refused.status_code, error_of(refused)["code"]) == (429, "queue_full")
        assert int(refused.headers["retry-after"]) >= 1
        assert int(refused.headers["retry-after-ms"]) >= 1
        app.gate.open()
        assert read_events(first.result().content)[-1][0] == "picture"
    assert app.service.permits.in_use == 0
    assert app.metric("cdm_requests_total", endpoint="/generate", outcome="rejected") == 1


def test_leaving_a_stream_frees_its_place_at_the_next_step_edge(bundle: Bundle) -> None:
    app = App(bundle, Gate())
    with listening(app) as url, httpx.Client(trust_env=False, timeout=PATIENCE_S) as client:
        app.gate.close()
        app.gate.step()
        with client.stream("POST", f"{url}/generate", json=CAT) as response:
            assert next(response.iter_bytes()).startswith(b"event: preview\n")
            app.gate.wait()  # in the second step
        app.wait_until(lambda: app.service.permits.in_use == 0)
        app.gate.open()
        app.wait_until(lambda: app.metric("cdm_pictures_total", outcome="cancelled") == 1)
        assert app.metric("cdm_cancelled_steps_total") == 2
        app.wait_until(
            lambda: app.metric("cdm_requests_total", endpoint="/generate", outcome="cancelled") == 1
        )


def test_stop_out_of_time_ends_a_stream_with_an_error(bundle: Bundle) -> None:
    app = App(bundle, Gate(), drain_timeout_s=0)
    with listening(app) as url, httpx.Client(trust_env=False, timeout=PATIENCE_S) as client:
        app.gate.close()
        app.gate.step()
        with client.stream("POST", f"{url}/generate", json=CAT) as response:
            app.gate.wait()
            app.models.drain_soon()
            app.wait_until(lambda: app.service.draining)
            app.gate.open()
            name, answer = read_events(response.read())[-1]
        assert (response.status_code, name, answer["error"]["code"]) == (200, "error", "unavailable")
        app.wait_until(
            lambda: app.metric("cdm_requests_total", endpoint="/generate", outcome="unavailable") == 1
        )


def test_streams_are_in_the_openapi_document(app: App) -> None:
    paths = app.client.get("/openapi.json").json()["paths"]
    for path, kind in (("/generate", "boolean"), ("/v1/images/generations", ["boolean", "null"])):
        operation = paths[path]["post"]
        assert "text/event-stream" in operation["responses"]["200"]["content"]
        fields = operation["requestBody"]["content"]["application/json"]["schema"]["properties"]
        assert fields["stream"]["type"] == kind
    assert "400" in paths["/v1/images/generations"]["post"]["responses"]
    assert "422" not in paths["/v1/images/generations"]["post"]["responses"]
    assert "422" not in paths["/v1/models/{model}"]["get"]["responses"]
