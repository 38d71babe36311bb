"""`POST /generate`, served in process by the fake engine."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from PIL import Image

from cdm_serve.images import read_parameters
from engines.noise import MAX_SEED
from tests.cdm_serve.helpers import App, error_of

STAGES = {"queue", "encode", "denoise", "preview", "decode", "image_encode"}


def opened(data: bytes) -> Image.Image:
    image = Image.open(io.BytesIO(data))
    image.load()
    return image


@pytest.mark.parametrize(
    ("format", "media"), [("png", "image/png"), ("jpeg", "image/jpeg"), ("webp", "image/webp")]
)
def test_one_picture_comes_back_as_itself(app: App, format: str, media: str) -> None:
    wish = {"prompt": "red apple 🍎", "seed": 7, "steps": 2, "width": 128, "height": 64, "format": format}
    response = app.client.post("/generate", json=wish)
    assert response.status_code == 200
    assert response.headers["content-type"] == media
    assert response.headers["x-seed"] == "7"
    assert response.headers["x-steps"] == "2"
    assert response.headers["x-request-id"]
    image = opened(response.content)
    assert (image.format, image.size) == (format.upper(), (128, 64))
    made_from = {"prompt": "red apple 🍎", "seed": 7, "steps": 2, "width": 128, "height": 64, "model": "fake"}
    assert read_parameters(response.content) == made_from


def test_server_timing_names_every_stage(app: App) -> None:
    response = app.client.post("/generate", json={"prompt": "cat"})
    entries = dict(entry.split(";dur=") for entry in response.headers["server-timing"].split(", "))
    assert set(entries) == {*STAGES, "others", "total"}
    spent = {stage: float(ms) for stage, ms in entries.items()}
    assert spent["denoise"] > 0
    assert spent["total"] >= spent["denoise"] + spent["decode"] + spent["image_encode"]


def test_several_come_back_as_json(app: App) -> None:
    response = app.client.post("/generate", json={"prompt": "cat", "num_images": 3, "seed": 5, "steps": 1})
    assert response.headers["content-type"] == "application/json"
    assert response.headers["x-seed"] == "5, 6, 7"
    answer = response.json()
    assert (answer["model"], answer["width"], answer["height"], answer["format"]) == ("fake", 128, 128, "png")
    assert set(answer["timings_ms"]) == {*STAGES, "others", "total"}
    assert [image["seed"] for image in answer["images"]] == [5, 6, 7]
    for image in answer["images"]:
        data = base64.b64decode(image["b64_json"], validate=True)
        assert opened(data).size == (128, 128)
        assert read_parameters(data)["seed"] == image["seed"]
        assert image["steps"] == 1
        assert set(image["timings_ms"]) == STAGES
    assert len({image["b64_json"] for image in answer["images"]}) == 3


def test_json_of_one_holds_the_same_bytes_as_the_picture_itself(app: App) -> None:
    wish = {"prompt": "cat", "seed": 3}
    plain = app.client.post("/generate", json=wish).content
    answer = app.client.post("/generate", json={**wish, "response_format": "json"}).json()
    assert base64.b64decode(answer["images"][0]["b64_json"]) == plain


def test_absent_seed_is_drawn_reported_and_makes_the_picture_again(app: App) -> None:
    first = app.client.post("/generate", json={"prompt": "cat"})
    other = app.client.post("/generate", json={"prompt": "cat", "seed": None})
    assert first.headers["x-seed"] != other.headers["x-seed"]
    again = app.client.post("/generate", json={"prompt": "cat", "seed": int(first.headers["x-seed"])})
    assert again.content == first.content != other.content


def test_seeds_of_one_request_wrap_at_the_largest(app: App) -> None:
    response = app.client.post("/generate", json={"prompt": "cat", "seed": MAX_SEED, "num_images": 2})
    assert [image["seed"] for image in response.json()["images"]] == [MAX_SEED, 0]


def test_defaults_are_the_manifests(app: App) -> None:
    response = app.client.post("/generate", json={"prompt": "cat"})
    assert response.headers["x-steps"] == str(app.engine.manifest.default_steps)
    size = app.engine.manifest.default_size
    assert opened(response.content).size == (size.width, size.height)


def test_unknown_word_and_strange_characters_are_no_error(app: App) -> None:
    for prompt in ("qwxzzy blorp", "𝔘𝔫𝔦𝔠𝔬𝔡𝔢 \u202e \x00 \n", "a" * 1000):
        response = app.client.post("/generate", json={"prompt": prompt, "steps": 1})
        assert response.status_code == 200
        assert read_parameters(response.content)["prompt"] == prompt


def test_same_seed_same_bytes_alone_or_among_others_at_other_steps(serve: Callable[..., App]) -> None:
    app = serve()
    wishes = [{"prompt": f"animal {i}", "seed": i, "steps": steps} for i, steps in enumerate((4, 1, 8, 2))]
    alone = [app.client.post("/generate", json=wish).content for wish in wishes]
    app.engine.calls.clear()
    app.gate.close()
    with ThreadPoolExecutor(len(wishes)) as pool:
        answers = [pool.submit(app.client.post, "/generate", json=wish) for wish in wishes]
        app.wait_until(lambda: app.service.permits.in_use == len(wishes))
        app.gate.open()
        assert [answer.result().content for answer in answers] == alone
    assert max(batch for component, batch in app.engine.calls if component == "denoise") >= 3


INVALID: list[tuple[dict[str, Any], str, list[str]]] = [
    ({}, "prompt", ["prompt is required"]),
    ({"prompt": 5}, "prompt", ["prompt=5", "string"]),
    ({"prompt": None}, "prompt", ["prompt=null", "string"]),
    ({"prompt": ["cat"]}, "prompt", ['prompt=["cat"]', "string"]),
    ({"prompt": ""}, "prompt", ["prompt is empty"]),
    ({"prompt": " \t\n"}, "prompt", ["prompt is empty"]),
    ({"prompt": "a" * 1001}, "prompt", ["1001 characters", "1000"]),
    ({"prompt": "cat", "seed": -1}, "seed", ["seed=-1", str(MAX_SEED)]),
    ({"prompt": "cat", "seed": MAX_SEED + 1}, "seed", [f"seed={MAX_SEED + 1}", str(MAX_SEED)]),
    ({"prompt": "cat", "seed": 10**400}, "seed", ["seed=", "bits", str(MAX_SEED)]),
    ({"prompt": "cat", "seed": True}, "seed", ["seed=true", "integer"]),
    ({"prompt": "cat", "seed": "4"}, "seed", ['seed="4"', "integer"]),
    ({"prompt": "cat", "seed": 4.0}, "seed", ["seed=4.0", "integer"]),
    ({"prompt": "cat", "steps": 12}, "steps", ["steps=12", "1, 2, 3, 4, 6, 8"]),
    ({"prompt": "cat", "steps": 5}, "steps", ["steps=5", "1, 2, 3, 4, 6, 8"]),
    ({"prompt": "cat", "steps": 0}, "steps", ["steps=0"]),
    ({"prompt": "cat", "steps": -4}, "steps", ["steps=-4"]),
    ({"prompt": "cat", "steps": True}, "steps", ["steps=true", "integer"]),
    ({"prompt": "cat", "steps": "4"}, "steps", ['steps="4"', "integer"]),
    ({"prompt": "cat", "num_images": 0}, "num_images", ["num_images=0", "1 to 16"]),
    ({"prompt": "cat", "num_images": 17}, "num_images", ["num_images=17", "1 to 16"]),
    ({"prompt": "cat", "num_images": -1}, "num_images", ["num_images=-1", "1 to 16"]),
    ({"prompt": "cat", "num_images": None}, "num_images", ["num_images=null", "integer"]),
    ({"prompt": "cat", "num_images": 10**30}, "num_images", ["1 to 16"]),
    ({"prompt": "cat", "num_images": 1.5}, "num_images", ["num_images=1.5", "integer"]),
    ({"prompt": "cat", "width": 65}, "width", ["width=65", "128×128, 64×64, 128×64"]),
    ({"prompt": "cat", "width": -128, "height": -128}, "width", ["width=-128"]),
    ({"prompt": "cat", "height": 4096}, "height", ["height=4096", "128×128, 64×64, 128×64"]),
    ({"prompt": "cat", "width": 64, "height": 128}, "height", ["width=64, height=128"]),
    ({"prompt": "cat", "width": "128"}, "width", ['width="128"', "integer"]),
    ({"prompt": "cat", "format": "gif"}, "format", ['format="gif"', "png, jpeg, webp"]),
    ({"prompt": "cat", "format": "PNG"}, "format", ['format="PNG"', "png, jpeg, webp"]),
    ({"prompt": "cat", "format": 1}, "format", ["format=1", "png, jpeg, webp"]),
    (
        {"prompt": "cat", "response_format": "url"},
        "response_format",
        ['response_format="url"', "image, json"],
    ),
    (
        {"prompt": "cat", "num_images": 2, "response_format": "image"},
        "response_format",
        ["num_images=2", "response_format='json'", "num_images=1"],
    ),
    ({"prompt": "cat", "stepz": 4}, "stepz", ['"stepz" is no field', "steps"]),
    ({"prompt": "cat", "x" * 500: 4}, "x" * 500, ["is no field"]),
]


@pytest.mark.parametrize(("body", "param", "fragments"), INVALID)
def test_invalid_value_is_422_naming_field_value_and_limit(
    app: App, body: dict[str, Any], param: str, fragments: list[str]
) -> None:
    response = app.client.post("/generate", json=body)
    error = error_of(response)
    assert response.status_code == 422
    assert (error["type"], error["param"], error["code"]) == ("invalid_request_error", param, "invalid_value")
    for fragment in fragments:
        assert fragment in error["message"]
    assert len(error["message"]) < 400


def test_every_broken_limit_is_named_at_once(app: App) -> None:
    body = {"prompt": "", "steps": 99, "num_images": 99, "seed": -1, "width": 1}
    message = error_of(app.client.post("/generate", json=body))["message"]
    for fragment in ("prompt is empty", "steps=99", "num_images=99", "seed=-1", "width=1"):
        assert fragment in message


@pytest.mark.parametrize("body", ["[]", "null", "5", '"cat"'])
def test_body_that_is_no_object_is_422(app: App, body: str) -> None:
    response = app.client.post("/generate", content=body, headers={"content-type": "application/json"})
    assert response.status_code == 422
    assert "JSON object" in error_of(response)["message"]


MALFORMED = [
    b"",
    b"{",
    b"prompt=cat",
    b'{"prompt": "cat",}',
    b"{'prompt': 'cat'}",
    b'{"prompt": "\xff"}',
    b'{"prompt": "\\ud800"}',
    b"[" * 5000,
]


@pytest.mark.parametrize("body", MALFORMED)
def test_malformed_json_is_400(app: App, body: bytes) -> None:
    response = app.client.post("/generate", content=body, headers={"content-type": "application/json"})
    assert response.status_code == 400
    error = error_of(response)
    assert (error["type"], error["code"]) == ("invalid_request_error", "malformed_json")
    assert "the body is not JSON" in error["message"]


@pytest.mark.parametrize(
    "media", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data", ""]
)
def test_body_of_another_type_is_415_with_the_remedy(app: App, media: str) -> None:
    body = json.dumps({"prompt": "cat"})
    response = app.client.post("/generate", content=body, headers={"content-type": media} if media else {})
    assert response.status_code == 415
    assert "application/json" in error_of(response)["message"]


def test_media_type_may_have_parameters(app: App) -> None:
    headers = {"content-type": "Application/JSON; charset=utf-8"}
    assert app.client.post("/generate", content=b'{"prompt": "cat"}', headers=headers).status_code == 200
