"""What holds around every answer: what a browser may do with it, how long a body may take, how many may connect."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cdm_serve.errors import BodyTimeout
from cdm_serve.front import CROWDED, in_time
from cdm_serve.protocol import BoundedHttp
from engines.bundle import Bundle
from tests.cdm_serve.helpers import PATIENCE_S, App, Gate, listening
from tests.cdm_serve.test_guard import AS_USER, write_keys

CAT = {"prompt": "cat", "seed": 1, "steps": 1}
SITE = "https://example.org"


def test_every_answer_says_how_it_may_be_used(serve: Callable[..., App], tmp_path: Path) -> None:
    app = serve(keys=write_keys(tmp_path / "keys.json"), cors_origin=(SITE,))
    app.engine.fail("denoise", after=1)
    answers = [
        app.client.get("/livez"),
        app.client.get("/"),
        app.client.get("/info"),
        app.client.get("/no/such/path", headers=AS_USER),
        app.client.post("/generate", json=CAT, headers=AS_USER),
        app.client.post("/generate", json={**CAT, "steps": 8}, headers=AS_USER),
        app.client.post("/generate", json={"prompt": ""}, headers=AS_USER),
        app.client.options("/generate", headers={"origin": SITE, "access-control-request-method": "POST"}),
    ]
    assert [answer.status_code for answer in answers] == [200, 200, 401, 404, 200, 500, 422, 200]
    for answer in answers:
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert answer.headers["referrer-policy"] == "no-referrer"
        policy = answer.headers["content-security-policy"]
        assert "default-src 'none'" in policy
        assert "frame-ancestors 'none'" in policy
        assert answer.headers["x-request-id"]
    assert "script-src 'self'" in answers[1].headers["content-security-policy"]  # the page's own


def test_other_sites_are_told_nothing_unless_named(app: App) -> None:
    for answer in (
        app.client.post("/generate", json=CAT, headers={"origin": SITE}),
        app.client.options("/generate", headers={"origin": SITE, "access-control-request-method": "POST"}),
    ):
        assert not [name for name in answer.headers if name.startswith("access-control-")]


def test_named_site_may_read_answers_and_errors(
    serve: Callable[..., App], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    app = serve(keys=write_keys(tmp_path / "keys.json"), cors_origin=(SITE, "https://other.example"))
    preflight = {
        "origin": SITE,
        "access-control-request-method": "POST",
        "access-control-request-headers": "authorization, content-type, x-stainless-lang",
    }
    allowed = app.client.options("/v1/images/generations", headers=preflight)  # which never carries a key
    assert allowed.status_code == 200
    assert allowed.headers["access-control-allow-origin"] == SITE
    for name in ("authorization", "content-type", "x-stainless-lang"):
        assert name in allowed.headers["access-control-allow-headers"]
    assert "access-control-allow-credentials" not in allowed.headers

    def ask(path: str = "/generate", **more: Any) -> Any:
        headers = {"origin": SITE, **more.pop("headers", AS_USER)}
        return app.client.post(path, headers=headers, **more)

    answers = [ask(json=CAT), ask(json=CAT, headers={}), ask(json={"prompt": ""}), ask("/nope")]
    monkeypatch.setattr(app.engine, "tokenize", lambda _: 1 / 0)
    answers.append(ask(json=CAT))
    assert [answer.status_code for answer in answers] == [200, 401, 422, 404, 500]
    for answer in answers:
        assert answer.headers["access-control-allow-origin"] == SITE
        assert "retry-after" in answer.headers["access-control-expose-headers"]
        assert "origin" in answer.headers["vary"].lower()
    foreign = app.client.post("/generate", json=CAT, headers={**AS_USER, "origin": "https://evil.example"})
    assert "access-control-allow-origin" not in foreign.headers


# Bodies and connections.


def test_body_in_time_is_passed_on_whole_and_what_comes_after_it_may_take_long() -> None:
    async def law() -> None:
        inbox = [
            {"type": "http.request", "body": b"a", "more_body": True},
            {"type": "http.request", "body": b"b"},
            {"type": "http.disconnect"},
        ]
        expected = list(inbox)
        late = asyncio.Event()

        async def receive() -> Any:
            if len(inbox) == 1:
                await late.wait()  # a client that waits for its answer, longer than a body may take
            return inbox.pop(0)

        bounded = in_time(receive, 0.05)
        got = [await bounded(), await bounded()]
        asyncio.get_running_loop().call_later(0.15, late.set)
        got.append(await bounded())
        assert got == expected

    asyncio.run(law())


def test_body_that_never_ends_is_given_up() -> None:
    async def law() -> None:
        async def receive() -> Any:  # a byte now and then: the whole has its time, not each part
            await asyncio.sleep(0.01)
            return {"type": "http.request", "body": b"a", "more_body": True}

        bounded = in_time(receive, 0.1)

        async def read() -> None:
            while True:
                await bounded()

        with pytest.raises(BodyTimeout, match=r"--body-timeout-s=0\.1"):
            await read()

    asyncio.run(law())


@pytest.mark.parametrize("path", ["/generate", "/v1/images/generations", "/v2/models/fake/infer"])
def test_slow_body_is_408_and_its_connection_is_closed(path: str, bundle: Bundle) -> None:
    app = App(bundle, Gate(), body_timeout_s=0.1)
    head = f"POST {path} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: 99\r\n\r\n"
    answer = b""
    with (
        listening(app, http=BoundedHttp) as url,
        socket.create_connection(("127.0.0.1", int(url.rpartition(":")[2])), PATIENCE_S) as client,
    ):
        client.sendall(head.encode() + b'{"prompt"')
        while part := client.recv(4096):  # until the server closes
            answer += part
    assert answer.startswith(b"HTTP/1.1 408 ")
    assert b"\r\nconnection: close\r\n" in answer.lower()
    assert b"--body-timeout-s=0.1" in answer


@pytest.mark.parametrize(
    ("path", "status"), [("/info", 503), ("/v2", 503), ("/livez", 200), ("/metrics", 200)]
)
def test_connection_too_many_is_answered_503_except_to_probes(app: App, path: str, status: int) -> None:
    # TestClient's requests have no connection; the protocol would mark theirs like this.
    asgi, app.client._transport.app = app.client._transport.app, None  # type: ignore[attr-defined]

    async def marked(scope: Any, receive: Any, send: Any) -> None:
        scope.setdefault("state", {})[CROWDED] = 7
        await asgi(scope, receive, send)

    app.client._transport.app = marked  # type: ignore[attr-defined]
    try:
        answer = app.client.get(path)
    finally:
        app.client._transport.app = asgi  # type: ignore[attr-defined]
    assert answer.status_code == status
    if status == 503:
        assert "--max-connections=7" in answer.text
        assert answer.headers["retry-after"] == "1"
        assert answer.headers["connection"] == "close"
