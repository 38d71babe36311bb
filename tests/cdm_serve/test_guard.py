"""What a server with keys answers to whom, whichever API is asked."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from starlette.websockets import WebSocketDisconnect

from cdm_serve.errors import is_kserve
from cdm_serve.guard import PAGE_FILES, PAGES, PROBES
from cdm_serve.keys import Key, hashed
from tests.cdm_serve.helpers import App, error_of

CAT = {"prompt": "cat", "seed": 1, "steps": 1}
INFER = {"inputs": [{"name": "prompt", "datatype": "BYTES", "shape": [1], "data": ["cat"]}]}
USER, ADMIN = "user-secret", "admin-secret"
AS_USER, AS_ADMIN = {"authorization": f"Bearer {USER}"}, {"authorization": f"Bearer {ADMIN}"}


def write_keys(path: Path, **limits: int) -> Path:
    """A user with `limits`, and an admin without."""
    keys = [
        Key(name="alice", sha256=hashed(USER), **limits),  # type: ignore[arg-type]
        Key(name="root", sha256=hashed(ADMIN), role="admin"),
    ]
    path.write_text(json.dumps({"keys": [key.model_dump() for key in keys]}))
    return path


@pytest.fixture
def guarded(serve: Callable[..., App], tmp_path: Path) -> Callable[..., App]:
    """Start an app with keys; `limits` are the user's."""

    def start(limits: dict[str, int] | None = None, **settings: Any) -> App:
        return serve(keys=write_keys(tmp_path / "keys.json", **(limits or {})), **settings)

    return start


def routes_of(app: App) -> list[tuple[str, str]]:
    """(method, path) of everything that the server has, with something in place of the paths' parameters."""
    document = app.asgi.openapi()
    found = [
        (method.upper(), re.sub(r"\{\w+\}", "fake", path))
        for path, operations in document["paths"].items()
        for method in operations
    ]
    return [*found, ("GET", "/"), ("GET", "/docs"), ("GET", "/openapi.json"), ("GET", "/page/app.js")]


def test_every_path_but_the_named_ones_needs_a_key(guarded: Callable[..., App]) -> None:
    app = guarded()
    routes = routes_of(app)
    assert {"/generate", "/v1/images/generations", "/v2/models/fake/infer"} <= {path for _, path in routes}
    for method, path in [
        *routes,
        ("GET", "/no/such/path"),
        ("DELETE", "/generate"),
        ("OPTIONS", "/generate"),
    ]:
        answer = app.client.request(method, path)
        if path in PROBES | PAGES or path.startswith(PAGE_FILES):
            assert answer.status_code == 200, path
            continue
        assert answer.status_code == 401, path
        assert answer.headers["www-authenticate"] == 'Bearer realm="cdm-serve"'
        if is_kserve(path):
            assert "needs an API key" in answer.json()["error"]
        else:
            error = error_of(answer)
            assert (error["type"], error["code"]) == ("invalid_request_error", "invalid_api_key")
            assert "Authorization: Bearer" in error["message"]


@pytest.mark.parametrize(
    "headers",
    [
        AS_USER,
        {"authorization": f"bearer  {USER} "},
        {"x-api-key": USER},
        {"authorization": "Basic dXNlcjpwYXNz", "x-api-key": USER},  # a proxy's, beside ours
    ],
)
def test_key_opens_every_api_in_each_of_its_headers(
    guarded: Callable[..., App], headers: dict[str, str]
) -> None:
    app = guarded()
    for path, body in (
        ("/generate", CAT),
        ("/v1/images/generations", {"prompt": "cat"}),
        ("/v2/models/fake/infer", INFER),
    ):
        assert app.client.post(path, json=body, headers=headers).status_code == 200, path
    assert app.client.get("/no/such/path", headers=headers).status_code == 404
    assert app.metric("cdm_key_pictures_total", key="alice") == 3
    assert app.metric("cdm_key_requests_total", key="alice", outcome="ok") == 3
    assert app.metric("cdm_key_requests_total", key="alice", outcome="invalid") == 1


@pytest.mark.parametrize(
    "headers",
    [
        {"authorization": "Bearer wrong"},
        {"authorization": f"Bearer {USER}x"},
        {"authorization": f"Bearer {hashed(USER)}"},  # what the file says is no key
        {"x-api-key": "wrong"},
        {b"x-api-key": "ключ".encode()},
        {"authorization": "Bearer wrong", "x-api-key": USER},
    ],
)
def test_wrong_key_is_told_so_and_opens_nothing(guarded: Callable[..., App], headers: Any) -> None:
    app = guarded()
    answer = app.client.post("/generate", json=CAT, headers=headers)
    assert answer.status_code == 401
    assert answer.headers["www-authenticate"] == 'Bearer realm="cdm-serve", error="invalid_token"'
    assert "no API key of this server" in error_of(answer)["message"]
    assert app.service.permits.in_use == 0


def test_admin_paths_and_metrics_are_for_admins(guarded: Callable[..., App]) -> None:
    app = guarded()
    for path in ("/admin", "/admin/no/such/thing", "/metrics"):
        refused = app.client.get(path, headers=AS_USER)
        assert refused.status_code == 403, path
        assert 'error="insufficient_scope"' in refused.headers["www-authenticate"]
        assert error_of(refused)["code"] == "permission_denied"
        assert app.client.get(path, headers=AS_ADMIN).status_code in (200, 404), path
    assert app.client.get("/administrator", headers=AS_USER).status_code == 404
    text = app.client.get("/metrics", headers=AS_ADMIN).text
    assert 'cdm_key_requests_total{key="alice",outcome="invalid"}' in text
    assert USER not in text
    assert hashed(USER) not in text


def test_open_metrics_need_no_key_and_open_nothing_else(guarded: Callable[..., App]) -> None:
    app = guarded(metrics_open=True)
    assert app.client.get("/metrics").status_code == 200
    assert app.client.get("/metrics/more").status_code == 401
    assert app.client.get("/info").status_code == 401


def test_websocket_is_not_opened(guarded: Callable[..., App]) -> None:
    with pytest.raises(WebSocketDisconnect) as raised, guarded().client.websocket_connect("/generate"):
        pass
    assert raised.value.code == 1008


def test_without_keys_no_key_is_asked_for(app: App) -> None:
    assert app.client.post("/generate", json=CAT, headers={"authorization": "Bearer x"}).status_code == 200
    assert app.client.get("/metrics").status_code == 200


def test_openapi_tells_of_the_key_only_where_there_is_one(guarded: Callable[..., App], app: App) -> None:
    document = guarded().client.get("/openapi.json").json()
    assert set(document["components"]["securitySchemes"]) == {"bearer", "x-api-key"}
    assert document["paths"]["/generate"]["post"]["security"]
    assert "401" in document["paths"]["/generate"]["post"]["responses"]
    assert document["paths"]["/metrics"]["get"]["security"]
    assert "security" not in document["paths"]["/livez"]["get"]
    open_metrics = guarded(metrics_open=True).client.get("/openapi.json").json()
    assert "security" not in open_metrics["paths"]["/metrics"]["get"]
    assert "securitySchemes" not in app.client.get("/openapi.json").json().get("components", {})


def test_used_up_rate_is_429_for_that_key_alone(guarded: Callable[..., App]) -> None:
    app = guarded({"rate_per_minute": 2})
    assert app.client.post("/generate", json={**CAT, "num_images": 2}, headers=AS_USER).status_code == 200
    for path, body in (
        ("/generate", CAT),
        ("/generate", {**CAT, "stream": True}),
        ("/v1/images/generations", {"prompt": "cat"}),
        ("/v1/images/generations", {"prompt": "cat", "stream": True}),
    ):
        refused = app.client.post(path, json=body, headers=AS_USER)
        assert refused.status_code == 429
        error = error_of(refused)
        assert (error["type"], error["code"]) == ("rate_limit_error", "rate_limit_exceeded")
        assert 1 <= int(refused.headers["retry-after"]) <= 30
        assert 1 <= int(refused.headers["retry-after-ms"]) <= 30_000
    assert app.client.get("/info", headers=AS_USER).status_code == 200  # pictures are what is counted
    assert app.client.post("/generate", json=CAT, headers=AS_ADMIN).status_code == 200
    assert app.metric("cdm_key_requests_total", key="alice", outcome="rejected") == 4
    assert app.metric("cdm_key_pictures_total", key="alice") == 2
    never = app.client.post("/generate", json={**CAT, "num_images": 3}, headers=AS_USER)
    assert never.status_code == 422
    assert "rate_per_minute=2" in error_of(never)["message"]


def test_limits_changed_in_the_file_hold_from_the_next_request(
    guarded: Callable[..., App], tmp_path: Path
) -> None:
    app = guarded({"max_priority": 1})
    assert app.client.post("/generate", json={**CAT, "priority": 2}, headers=AS_USER).status_code == 403
    write_keys(tmp_path / "keys.json", max_priority=2)
    app.asgi.state.keys.reload()
    assert app.client.post("/generate", json={**CAT, "priority": 2}, headers=AS_USER).status_code == 200


def test_pictures_in_work_are_counted_by_key_over_all_apis(guarded: Callable[..., App]) -> None:
    app = guarded({"max_concurrent": 2})
    app.gate.close()
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(app.client.post, "/generate", json={**CAT, "num_images": 2}, headers=AS_USER)
        app.wait_until(lambda: app.service.permits.in_use == 2)
        refused = app.client.post("/v1/images/generations", json={"prompt": "cat"}, headers=AS_USER)
        assert refused.status_code == 429
        assert error_of(refused)["code"] == "concurrency_limit_exceeded"
        assert int(refused.headers["retry-after"]) >= 1
        kserve = app.client.post("/v2/models/fake/infer", json=INFER, headers=AS_USER)
        assert kserve.status_code == 429
        assert "max_concurrent=2" in kserve.json()["error"]
        assert app.service.permits.in_use == 2  # a refused request gives its permits back
        app.gate.open()
        assert first.result().status_code == 200
    assert app.client.post("/generate", json=CAT, headers=AS_USER).status_code == 200


def test_what_the_server_refuses_uses_up_no_rate(guarded: Callable[..., App]) -> None:
    app = guarded({"rate_per_minute": 1}, queue_limit=2, max_images=2)
    app.gate.close()
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(app.client.post, "/generate", json={**CAT, "num_images": 2}, headers=AS_ADMIN)
        app.wait_until(lambda: app.service.permits.in_use == 2)
        full = app.client.post("/generate", json=CAT, headers=AS_USER)
        assert error_of(full)["code"] == "queue_full"
        app.gate.open()
        first.result()
    app.service.costs.SECONDS = dict.fromkeys(("encode", "denoise", "decode"), (1.0, 0.0))  # type: ignore[attr-defined]
    for _ in range(3):
        late = app.client.post("/generate", json={**CAT, "deadline_ms": 1}, headers=AS_USER)
        assert error_of(late)["code"] == "deadline_infeasible"
    assert app.client.post("/generate", json=CAT, headers=AS_USER).status_code == 200
    refused = app.client.post("/generate", json=CAT, headers=AS_USER)
    assert error_of(refused)["code"] == "rate_limit_exceeded"


def test_priority_above_the_keys_is_forbidden(guarded: Callable[..., App]) -> None:
    app = guarded({"max_priority": 3})
    assert app.client.post("/generate", json={**CAT, "priority": 3}, headers=AS_USER).status_code == 200
    refused = app.client.post("/generate", json={**CAT, "priority": 4}, headers=AS_USER)
    assert refused.status_code == 403
    error = error_of(refused)
    assert error["param"] == "priority"
    assert "max_priority=3" in error["message"]
    assert app.client.post("/generate", json={**CAT, "priority": 9}, headers=AS_ADMIN).status_code == 200


def test_keys_request_is_not_charged_to_who_asked_before(guarded: Callable[..., App]) -> None:
    app = guarded({"rate_per_minute": 1})
    assert app.client.post("/generate", json=CAT, headers=AS_USER).status_code == 200
    for headers in (AS_ADMIN, AS_ADMIN):  # the same connection
        assert app.client.post("/generate", json=CAT, headers=headers).status_code == 200
    assert app.metric("cdm_key_pictures_total", key="alice") == 1
    assert app.metric("cdm_key_pictures_total", key="root") == 2
