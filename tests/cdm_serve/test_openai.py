"""OpenAI's Images API, asked by OpenAI's own client, sync and async: what it gives."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from openai.types import ImageGenCompletedEvent, ImageGenPartialImageEvent
from PIL import Image

from benchmarks.server import Server
from cdm_serve.images import read_parameters
from cdm_serve.limits import Order
from cdm_serve.openai_schemas import usage_of
from engines.bundle import Bundle
from tests.cdm_serve.openai_client import CAT, Ask, ask_async, ask_sync, generate

LATENTS = 16 * 16
"""Latent positions of a picture of 128×128 at downscale 8."""


@pytest.fixture(scope="module")
def server(bundle: Bundle) -> Iterator[Server]:
    flags = ["--engine", "fake", "--bundle", str(bundle.root), "--max-batch", "4", "--max-body-bytes", "8192"]
    with Server(flags) as server:
        yield server


@pytest.fixture(params=[ask_sync, ask_async], ids=["sync", "async"])
def ask(request: pytest.FixtureRequest, server: Server) -> Ask:
    """Put one call to a client of the served fake engine; the events of a stream come as a list."""
    return lambda call: request.param(server.url, call)


def opened(b64_json: str | None) -> Image.Image:
    assert b64_json is not None
    image = Image.open(io.BytesIO(base64.b64decode(b64_json, validate=True)))
    image.load()
    return image


def test_picture_and_how_it_was_made(ask: Ask) -> None:
    answer = ask(generate(model="fake", **CAT))
    (picture,) = answer.data
    image = opened(picture.b64_json)
    assert (image.format, image.size, image.mode) == ("PNG", (128, 128), "RGB")
    parameters = read_parameters(base64.b64decode(picture.b64_json))
    assert (parameters["prompt"], parameters["seed"]) == ("a black cat", 7)
    assert (picture.seed, picture.steps, picture.url, picture.revised_prompt) == (7, 4, None, None)
    assert (answer.background, answer.output_format, answer.quality) == ("opaque", "png", "auto")
    assert answer.size == "128x128"
    assert answer.created > 0
    assert answer._request_id


def test_usage_counts_the_prompts_tokens_and_the_pictures_latents(ask: Ask) -> None:
    usage = ask(generate(prompt="a b c", n=2, size="128x64")).usage
    assert (usage.input_tokens, usage.input_tokens_details.text_tokens) == (3, 3)
    assert usage.input_tokens_details.image_tokens == 0
    assert (usage.output_tokens, usage.output_tokens_details.image_tokens) == (LATENTS, LATENTS)
    assert usage.total_tokens == 3 + LATENTS
    cut = ask(generate(prompt="word " * 100)).usage
    assert cut.input_tokens == 77  # the fake tokenizer's length: what comes after it is not read


@pytest.mark.parametrize(
    ("start", "end", "pad"),
    [((1,), (2,), 2), ((1,), (2,), 0), ((), (2,), 0), ((), (), 0)],
    ids=["CLIP-L: the end pads", "CLIP-G", "T5: no start", "none"],
)
@pytest.mark.parametrize("words", [0, 1, 3, 50])
def test_tokens_are_counted_without_start_end_and_padding(
    start: tuple[int, ...], end: tuple[int, ...], pad: int, words: int
) -> None:
    def ids(prompt: str) -> tuple[int, ...]:
        text = (*start, *range(10, 10 + len(prompt.split())))[: 12 - len(end)]
        return (*text, *end, *(pad,) * (12 - len(text) - len(end)))

    latent = SimpleNamespace(downscale=8)
    manifest = SimpleNamespace(tokenizers=[SimpleNamespace(pad_id=pad)], latent=latent)
    engine: Any = SimpleNamespace(manifest=manifest, tokenize=lambda prompt: (ids(prompt),))
    order = Order("word " * words, (1,), 4, 128, 128, "png", as_json=True)
    assert usage_of(engine, order)["input_tokens"] == min(words, 12 - len(start) - len(end))


def test_n_pictures_have_seeds_of_their_own(ask: Ask) -> None:
    answer = ask(generate(n=3, **CAT))
    assert [picture.seed for picture in answer.data] == [7, 8, 9]
    assert len({opened(picture.b64_json).tobytes() for picture in answer.data}) == 3
    assert ask(generate(**CAT)).data[0].b64_json == answer.data[0].b64_json
    assert answer.usage.output_tokens == 3 * LATENTS


@pytest.mark.parametrize("format", ["png", "jpeg", "webp"])
@pytest.mark.parametrize(
    ("size", "pixels"), [("auto", (128, 128)), ("64x64", (64, 64)), ("128x64", (128, 64))]
)
def test_formats_and_sizes_are_the_asked_ones(
    ask: Ask, format: str, size: str, pixels: tuple[int, int]
) -> None:
    answer = ask(generate(output_format=format, size=size, response_format="b64_json", **CAT))
    image = opened(answer.data[0].b64_json)
    assert (image.format, image.size) == (format.upper(), pixels)
    assert (answer.output_format, answer.size) == (format, f"{pixels[0]}x{pixels[1]}")


@pytest.mark.parametrize("format", ["jpeg", "webp"])
def test_compression_sets_the_files_quality(ask: Ask, format: str) -> None:
    def size_at(**wish: Any) -> int:
        return len(ask(generate(output_format=format, **wish, **CAT)).data[0].b64_json)

    sizes = [size_at(output_compression=quality) for quality in (0, 50, 90, 100)]
    assert sizes == sorted(set(sizes))
    assert size_at() == sizes[-1]  # OpenAI's default


def test_values_that_are_true_here_are_accepted(ask: Ask) -> None:
    plain = ask(generate(**CAT))
    for background, moderation in (("auto", "auto"), ("opaque", "low")):
        wish = {"background": background, "moderation": moderation, "quality": "auto", "user": "me"}
        assert ask(generate(**wish, **CAT)).data == plain.data
    nulls = {
        "background": None, "model": None, "moderation": None, "n": None, "output_compression": None,
        "output_format": None, "partial_images": None, "quality": None, "response_format": None, "size": None,
        "stream": None, "style": None,
    }  # fmt: skip
    assert ask(generate(**nulls, **CAT)).data == plain.data
    assert (
        ask(generate(safety_identifier="me", output_compression=100, partial_images=0, **CAT)).data
        == plain.data
    )


def test_extras_reach_the_scheduler(ask: Ask) -> None:
    extra = {"seed": 3, "num_inference_steps": 2, "priority": 9}
    assert ask(generate(prompt="cat", extra_body=extra)).data[0].steps == 2
    extra = {"num_inference_steps": "auto", "min_steps": 1, "deadline_ms": 3_600_000}
    assert ask(generate(prompt="cat", extra_body=extra)).data[0].steps == 4


@pytest.mark.parametrize("partial_images", [None, 0, 1, 2, 3])
def test_stream_is_previews_in_order_then_the_picture(ask: Ask, partial_images: int | None) -> None:
    wish = {"output_format": "webp", "size": "64x64", **CAT}
    *partials, completed = ask(generate(stream=True, partial_images=partial_images, **wish))
    assert all(isinstance(event, ImageGenPartialImageEvent) for event in partials)
    assert [event.partial_image_index for event in partials] == list(range(partial_images or 0))
    assert isinstance(completed, ImageGenCompletedEvent)
    whole = ask(generate(**wish))
    assert completed.b64_json == whole.data[0].b64_json
    assert completed.usage.to_dict() == whole.usage.to_dict()
    assert (completed.seed, completed.steps) == (7, 4)  # type: ignore[attr-defined]
    for event in (*partials, completed):
        image = opened(event.b64_json)
        assert (image.format, image.size) == ("WEBP", (64, 64))
        assert (event.background, event.output_format, event.quality) == ("opaque", "webp", "auto")
        assert event.size == "64x64"
        assert event.created_at > 0
    shown = [opened(event.b64_json).tobytes() for event in (*partials, completed)]
    assert len(set(shown)) == len(shown)


def test_fewer_steps_show_fewer_previews(ask: Ask) -> None:
    extra = {"num_inference_steps": 2}
    events = ask(generate(prompt="cat", stream=True, partial_images=3, extra_body=extra))
    assert [event.type for event in events] == [
        "image_generation.partial_image",
        "image_generation.completed",
    ]


def test_served_model_is_listed_and_retrieved(ask: Ask) -> None:
    (listed,) = ask(lambda client: client.models.list()).data
    assert (listed.id, listed.object) == ("fake", "model")
    assert listed.created > 0
    assert ask(lambda client: client.models.retrieve("fake")) == listed
