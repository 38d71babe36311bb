"""Whatever JSON is sent, the answer is pictures or an error that says what was wrong, never a failure of the server."""

from __future__ import annotations

import json
from typing import Any

import hypothesis
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cdm_serve.openai_schemas import FIXED, ImagesRequest
from cdm_serve.schemas import FORMATS, GenerateRequest
from tests.cdm_serve.helpers import App, error_of

JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda values: st.lists(values, max_size=3) | st.dictionaries(st.text(), values, max_size=3),
    max_leaves=5,
)
SENSIBLE: dict[str, st.SearchStrategy[Any]] = {
    "prompt": st.text(st.characters(), min_size=1, max_size=20),  # halves of surrogate pairs too
    "model": st.just("fake"),
    "steps": st.sampled_from([1, 2, 4, 8, "auto"]),
    "num_inference_steps": st.sampled_from([1, 2, 4, 8, "auto"]),
    "min_steps": st.integers(0, 4),
    "num_images": st.integers(0, 3),
    "n": st.integers(0, 3),
    "width": st.sampled_from([64, 128]),
    "height": st.sampled_from([64, 128]),
    "size": st.sampled_from(["auto", "64x64", "128x64", "128x128"]),
    "format": st.sampled_from(FORMATS),
    "output_format": st.sampled_from(FORMATS),
    "output_compression": st.integers(-1, 101),
    "response_format": st.sampled_from(["image", "json", "b64_json", "url"]),
    "stream": st.booleans(),
    "previews": st.integers(-1, 8),
    "partial_images": st.integers(-1, 4),
    "seed": st.integers(-1, 2**63),
    "deadline_ms": st.integers(0, 3_600_001),
    "priority": st.integers(-1, 10),
    **{
        name: st.sampled_from(["other", *allowed])
        for name, (allowed, _) in FIXED.items()
        if name != "response_format"
    },
}


def bodies(fields: list[str]) -> st.SearchStrategy[Any]:
    """Bodies that mostly make sense, so that many get far, with a few values or fields that do not; and any JSON."""

    def sensible(names: list[str]) -> st.SearchStrategy[dict[str, Any]]:
        return st.fixed_dictionaries({name: SENSIBLE.get(name, st.text()) for name in ("prompt", *names)})

    mostly = st.lists(st.sampled_from(fields), max_size=4).flatmap(sensible)
    odd = st.dictionaries(st.sampled_from(fields) | st.text(), JSON_VALUES, max_size=1)
    return st.builds(lambda body, odd: body | odd, mostly, st.just({}) | odd) | JSON_VALUES


def check(app: App, path: str, body: Any) -> None:
    response = app.client.post(path, content=json.dumps(body), headers={"content-type": "application/json"})
    hypothesis.event(f"status {response.status_code}")
    if response.status_code != 200:
        assert response.status_code in (400, 404, 422, 429)
        assert error_of(response)["message"]
    elif response.headers["content-type"] == "text/event-stream":
        assert response.text.splitlines()[-3] in ("event: picture", "event: image_generation.completed")
    else:
        assert response.content
    assert app.service.permits.in_use == 0


@settings(max_examples=150)
@given(body=bodies([*GenerateRequest.model_fields]))
def test_any_json_is_answered_by_generate(app: App, body: Any) -> None:
    check(app, "/generate", body)


@settings(max_examples=150)
@given(body=bodies([*ImagesRequest.model_fields]))
def test_any_json_is_answered_by_the_images_api(app: App, body: Any) -> None:
    check(app, "/v1/images/generations", body)


@pytest.mark.parametrize("path", ["/generate", "/v1/images/generations"])
@given(body=st.binary(max_size=40))
def test_any_bytes_are_answered(app: App, path: str, body: bytes) -> None:
    response = app.client.post(path, content=body, headers={"content-type": "application/json"})
    if b'"prompt"' in body:  # whole requests may be drawn from the constants in our own code
        assert response.status_code in (200, 400, 422)
        return
    assert response.status_code in (400, 422)
    assert error_of(response)["message"]
