"""OpenAI's Images API, asked by OpenAI's own client: its exception for whatever goes wrong, and what it retries."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from openai import (
    APIError,
    APIStatusError,
    AsyncOpenAI,
    BadRequestError,
    DefaultHttpx2Client,
    InternalServerError,
    NotFoundError,
    RateLimitError,
)

from engines.bundle import Bundle
from tests.cdm_serve.helpers import App, Gate, listening
from tests.cdm_serve.openai_client import CAT, Ask, ask_async, ask_sync, generate, sync_client

ENDPOINT = "/v1/images/generations"


@pytest.fixture(scope="module")
def url(bundle: Bundle) -> Iterator[str]:
    with listening(App(bundle, Gate(), max_body_bytes=8192)) as url:
        yield url


both = pytest.mark.parametrize("ask", [ask_sync, ask_async])


REFUSED: list[tuple[dict[str, Any], str, list[str]]] = [
    ({"prompt": ""}, "prompt", ["empty"]),
    ({"prompt": "a" * 1001}, "prompt", ["1001", "1000"]),
    ({"prompt": 5}, "prompt", ["prompt=5", "string"]),
    ({"n": 0}, "n", ["n=0", "1 to 10"]),
    ({"n": 11}, "n", ["n=11", "1 to 10"]),
    ({"n": True}, "n", ["n=true", "integer"]),
    ({"n": 2, "stream": True}, "n", ["n=2", "n=1"]),
    ({"size": "1024x1024"}, "size", ['"1024x1024"', "auto, 128x128, 64x64, 128x64"]),
    ({"size": "128X128"}, "size", ["128x128"]),
    ({"response_format": "url"}, "response_format", ['"url"', "b64_json"]),
    ({"output_format": "gif"}, "output_format", ['"gif"', "png, jpeg, webp"]),
    ({"output_format": "jpeg", "output_compression": 101}, "output_compression", ["101", "0 to 100"]),
    ({"output_format": "webp", "output_compression": -1}, "output_compression", ["-1", "0 to 100"]),
    ({"output_compression": 50}, "output_compression", ["50", "png", "webp"]),
    ({"background": "transparent"}, "background", ["transparen", "auto, opaque"]),
    ({"quality": "high"}, "quality", ['"high"', "num_inference_steps", "auto"]),
    ({"moderation": "strict"}, "moderation", ["operator decides"]),
    ({"style": "vivid"}, "style", ["vivid", "prompt"]),
    ({"user": 5}, "user", ["string"]),
    ({"stream": True, "partial_images": 4}, "partial_images", ["4", "0 to 3"]),
    ({"partial_images": 1}, "partial_images", ["stream=true"]),
    ({"extra_body": {"stream": 1}}, "stream", ["true or false"]),
    ({"extra_body": {"seed": -1}}, "seed", ["seed=-1"]),
    ({"extra_body": {"num_inference_steps": 5}}, "num_inference_steps", ["1, 2, 3, 4, 6, 8, auto"]),
    ({"extra_body": {"num_inference_steps": "few"}}, "num_inference_steps", ["an integer or auto"]),
    ({"extra_body": {"min_steps": 2}}, "min_steps", ['num_inference_steps="auto"']),
    ({"extra_body": {"deadline_ms": 0}}, "deadline_ms", ["deadline_ms=0"]),
    ({"extra_body": {"priority": 10}}, "priority", ["0 to 9"]),
    ({"extra_body": {"steps": 2}}, "steps", ["no field", "num_inference_steps"]),
    ({"frame_count": 4}, "frame_count", ["no field"]),
]


@pytest.mark.parametrize(("wish", "param", "words"), REFUSED)
def test_value_that_cannot_be_served_is_a_bad_request_that_names_it(
    url: str, wish: dict[str, Any], param: str, words: list[str]
) -> None:
    with pytest.raises(BadRequestError) as caught:
        ask_sync(url, generate(**{"prompt": "cat", **wish}))
    error = caught.value
    assert (error.status_code, error.param, error.code) == (400, param, "invalid_value")
    assert error.type == "invalid_request_error"
    assert error.request_id
    assert all(word in error.message for word in words)


@both
@pytest.mark.parametrize("model", ["dall-e-3", "fake/2", "FAKE", " "])
def test_another_model_is_not_found(url: str, ask: Ask, model: str) -> None:
    for call in (lambda client: client.models.retrieve(model), generate(prompt="cat", model=model)):
        with pytest.raises(NotFoundError) as caught:
            ask(url, call)
        assert (caught.value.code, caught.value.param) == ("model_not_found", "model")
        assert '"fake"' in caught.value.message


def test_long_body_is_told(url: str) -> None:
    with pytest.raises(APIStatusError) as caught:
        ask_sync(url, generate(prompt="a" * 9000))
    assert (caught.value.status_code, caught.value.code) == (413, "body_too_large")


def test_full_queue_is_retried_when_the_server_says(bundle: Bundle, caplog: pytest.LogCaptureFixture) -> None:
    app = App(bundle, Gate(), queue_limit=1, max_images=1)
    answers: list[tuple[int, str | None]] = []

    def heard(response: Any) -> None:
        answers.append((response.status_code, response.headers.get("retry-after-ms")))
        app.gate.open()
        app.wait_until(lambda: app.service.permits.in_use == 0)

    http = DefaultHttpx2Client(trust_env=False, event_hooks={"response": [heard]})
    with listening(app) as url, ThreadPoolExecutor(1) as pool:
        app.gate.close()
        first = pool.submit(ask_sync, url, generate(**CAT))
        app.gate.wait()
        with pytest.raises(RateLimitError) as caught:
            ask_sync(url, generate(**CAT))
        assert (caught.value.code, caught.value.type) == ("queue_full", "rate_limit_error")
        assert int(caught.value.response.headers["retry-after"]) >= 1
        with (
            caplog.at_level(logging.INFO, "openai._base_client"),
            sync_client(url, max_retries=2, http_client=http) as client,
        ):
            second = client.images.generate(**CAT)
        assert second.data == first.result().data
    assert [status for status, _ in answers] == [429, 200]
    slept = [
        entry.args[0] for entry in caplog.records if "Retrying request in" in str(entry.msg) and entry.args
    ]  # type: ignore[index]
    assert slept == [int(answers[0][1] or "") / 1e3]


@both
def test_infeasible_deadline_failure_and_stop_have_their_exceptions(bundle: Bundle, ask: Ask) -> None:
    app = App(bundle, Gate())
    with listening(app) as url:
        app.service.costs.SECONDS = dict.fromkeys(app.service.costs.SECONDS, (1.0, 0.0))  # type: ignore[attr-defined]
        with pytest.raises(RateLimitError) as late:
            ask(url, generate(prompt="cat", extra_body={"deadline_ms": 500}))
        assert (late.value.code, late.value.param) == ("deadline_infeasible", "deadline_ms")
        for streamed in (False, True):  # before its first event, a stream has the status of any other answer
            app.engine.fail("denoise")
            with pytest.raises(InternalServerError) as failed:
                ask(url, generate(stream=streamed, **CAT))
            assert (failed.value.status_code, failed.value.code) == (500, "generation_failed")
        app.service.draining = True
        for streamed in (False, True):
            with pytest.raises(InternalServerError) as stopping:
                ask(url, generate(stream=streamed, **CAT))
            assert (stopping.value.status_code, stopping.value.code) == (503, "unavailable")
        app.service.draining = False


@both
def test_failure_in_mid_stream_is_the_clients_exception(bundle: Bundle, ask: Ask) -> None:
    app = App(bundle, Gate())
    with listening(app) as url:
        app.engine.fail("denoise", after=2)
        with pytest.raises(APIError) as failed:
            ask(url, generate(stream=True, partial_images=3, **CAT))
        assert not isinstance(failed.value, APIStatusError)  # it had begun as a 200
        assert (failed.value.code, failed.value.type) == ("generation_failed", "server_error")
        assert "told to fail" in failed.value.message
        app.wait_until(lambda: app.metric("cdm_requests_total", endpoint=ENDPOINT, outcome="failed") == 1)
        assert len(ask(url, generate(stream=True, **CAT))) == 1


def leave_sync(url: str, before: Callable[[], None]) -> None:
    """Begin a stream, and leave it after its first event and `before`."""
    with sync_client(url) as client:
        stream = client.images.generate(stream=True, partial_images=3, **CAT)
        assert next(iter(stream)).type == "image_generation.partial_image"
        before()
        stream.close()


def leave_async(url: str, before: Callable[[], None]) -> None:
    async def leave(client: AsyncOpenAI) -> None:
        stream = await client.images.generate(stream=True, partial_images=3, **CAT)
        assert (await anext(aiter(stream))).type == "image_generation.partial_image"
        before()
        await stream.close()

    ask_async(url, leave)


@pytest.mark.parametrize("leave", [leave_sync, leave_async])
def test_client_that_leaves_in_mid_stream_cancels_its_picture(
    bundle: Bundle, leave: Callable[[str, Callable[[], None]], None]
) -> None:
    app = App(bundle, Gate())
    with listening(app) as url:
        app.gate.close()
        app.gate.step()
        leave(url, app.gate.wait)  # in the second step
        app.wait_until(lambda: app.service.permits.in_use == 0)
        app.gate.open()
        app.wait_until(lambda: app.metric("cdm_pictures_total", outcome="cancelled") == 1)
        assert app.metric("cdm_cancelled_steps_total") == 2
        app.wait_until(lambda: app.metric("cdm_requests_total", endpoint=ENDPOINT, outcome="cancelled") == 1)
        assert app.metric("cdm_pictures_total", outcome="finished") == 0
