"""Every field of OpenAI's Images API (openai-python 3.54, `POST /v1/images/generations`), as it is true here.

A field that could change nothing here is accepted with the values that are true anyway (`FIXED`) and refused with any
other, so that nobody believes to have got what he asked for. What the API lacks comes at the top level of the body:

    client.images.generate(prompt="red apple", extra_body={"seed": 7, "num_inference_steps": 2})
"""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from cdm_serve.errors import InvalidRequest
from cdm_serve.limits import MAX_DEADLINE_MS, MAX_PRIORITY, Limits, Order, plain, with_nulls
from cdm_serve.schemas import Format, GenerateRequest, listed, number, quoted
from engines.base import Engine
from engines.noise import MAX_SEED

MAX_N = 10
MAX_PARTIAL_IMAGES = 3
COMPRESSION = 100
"""`output_compression` when none is given, as OpenAI's."""


class ImagesRequest(BaseModel):
    """The body. Leaving a field out and null mean the same."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    prompt: Annotated[str, Field(description="what to draw; unknown words are no error")]
    model: Annotated[str | None, Field(description="a served model's name; none: the default")] = None
    n: Annotated[int | None, Field(description="pictures to make")] = None
    size: Annotated[str | None, Field(description="WIDTHxHEIGHT in pixels; auto: the default size")] = None
    quality: Annotated[str | None, Field(description="num_inference_steps says how many steps to take")] = (
        None
    )
    response_format: Annotated[str | None, Field(description="pictures come as base64 only")] = None
    output_format: Annotated[Format | None, Field(description="how pictures are encoded")] = None
    output_compression: Annotated[
        int | None,
        Field(description="quality of jpeg and webp, larger is better; png loses nothing: only 100"),
    ] = None
    background: Annotated[str | None, Field(description="pictures have no transparency")] = None
    moderation: Annotated[str | None, Field(description="what is refused, the server's operator decides")] = (
        None
    )
    style: Annotated[str | None, Field(description="no value is accepted; the prompt says the style")] = None
    user: Annotated[str | None, Field(description="accepted, neither used nor kept")] = None
    safety_identifier: Annotated[str | None, Field(description="accepted, neither used nor kept")] = None
    stream: Annotated[bool | None, Field(description="answer with events while the one picture is made")] = (
        None
    )
    partial_images: Annotated[int | None, Field(description="with stream: the most previews")] = None
    seed: Annotated[int | None, Field(description="seed of the first picture; the next has seed + 1")] = None
    num_inference_steps: Annotated[
        int | Literal["auto"] | None,
        Field(description="denoising steps; auto: the default, or fewer where the deadline asks for it"),
    ] = None
    min_steps: Annotated[
        int | None, Field(description="with num_inference_steps=auto: the fewest to be content with")
    ] = None
    deadline_ms: Annotated[int | None, Field(description="milliseconds until the pictures are wanted")] = None
    priority: Annotated[int | None, Field(description="larger goes first")] = None


FIXED: dict[str, tuple[tuple[str, ...], str]] = {
    "response_format": (
        ("b64_json",),
        "pictures are not stored, so there is nothing that a URL could lead to; they come as base64",
    ),
    "quality": (
        ("auto",),
        "the model has one quality, and more steps are not always better; num_inference_steps sets them",
    ),
    "background": (("auto", "opaque"), "pictures have no transparency"),
    "moderation": (("auto", "low"), "what is refused, the server's operator decides"),
    "style": ((), "describe the style in the prompt"),
}
"""Field → the values that are true here, and why no other is."""


def order_of(request: ImagesRequest, limits: Limits) -> Order:
    """Fill in the defaults and check every value against what this server offers.

    Raises:
        InvalidRequest: a value that cannot be served, named as OpenAI's API names it.
    """
    if problems := [*_fixed_problems(request), *_problems(request, limits)]:
        raise InvalidRequest("; ".join(message for _, message in problems), param=problems[0][0])
    width, height = _sizes(limits)[request.size or "auto"]
    order = limits.order(
        GenerateRequest(
            prompt=request.prompt,
            seed=request.seed,
            steps=request.num_inference_steps,
            min_steps=request.min_steps,
            deadline_ms=request.deadline_ms,
            priority=request.priority or 0,
            num_images=request.n or 1,
            width=width,
            height=height,
            format=request.output_format or "png",
            response_format="json",
        )
    )
    compression = request.output_compression
    return replace(order, quality=COMPRESSION if compression is None else compression)


def _fixed_problems(request: ImagesRequest) -> list[tuple[str, str]]:
    problems = []
    for name, (allowed, reason) in FIXED.items():
        value = getattr(request, name)
        if value is not None and value not in allowed:
            remedy = f"allowed: {listed(allowed)}" if allowed else "leave it out"
            problems.append((name, f"{name}={quoted(value)} is not offered ({reason}); {remedy}"))
    return problems


def _problems(request: ImagesRequest, limits: Limits) -> list[tuple[str, str]]:
    """What `Limits.order` would name otherwise, or does not know."""
    problems = []
    for name, least, most in (
        ("n", 1, min(MAX_N, limits.max_images)),
        ("output_compression", 0, 100),
        ("partial_images", 0, MAX_PARTIAL_IMAGES),
    ):
        value = getattr(request, name)
        if value is not None and not least <= value <= most:
            problems.append((name, f"{name}={number(value)} is outside {least} to {most}"))
    sizes, steps = _sizes(limits), request.num_inference_steps
    if request.size is not None and request.size not in sizes:
        problems.append(("size", f"size={quoted(request.size)} is not offered; allowed: {listed(sizes)}"))
    if isinstance(steps, int) and steps not in limits.steps:
        offered = listed([*limits.steps, "auto"])
        message = f"num_inference_steps={number(steps)} is not offered; allowed: {offered}"
        problems.append(("num_inference_steps", message))
    if request.min_steps is not None and steps != "auto":
        message = f'min_steps={number(request.min_steps)} goes with num_inference_steps="auto"'
        problems.append(("min_steps", f"{message}; ask for that, or leave it out"))
    if problems:
        return problems
    if request.output_compression not in (None, COMPRESSION) and request.output_format in (None, "png"):
        message = f"output_compression={request.output_compression} is for jpeg and webp, png loses nothing"
        problems.append(("output_compression", f'{message}; ask for output_format="webp", or leave it out'))
    if request.stream and request.n not in (None, 1):
        problems.append(("n", f"n={request.n} cannot be streamed; ask for n=1"))
    if request.partial_images and not request.stream:
        message = f"partial_images={request.partial_images} goes with stream=true"
        problems.append(("partial_images", f"{message}; ask for that, or leave it out"))
    return problems


def _sizes(limits: Limits) -> dict[str, tuple[int, int]]:
    return {
        "auto": limits.default_size,
        **{f"{width}x{height}": (width, height) for width, height in limits.sizes},
    }


def usage_of(engine: Engine, order: Order) -> dict[str, Any]:
    """The answer's `usage`.

    `input_tokens`: tokens of the prompt that the model reads, without start, end and padding, and cut where the model
    cuts; of several tokenizers, that which reads most. `output_tokens`: latent positions of the pictures, which is what
    the model writes: width × height / downscale² each. Steps and previews add none, for the picture does not grow.
    """
    pads = [tokenizer.pad_id for tokenizer in engine.manifest.tokenizers]
    empty, text = engine.tokenize(""), engine.tokenize(order.prompt)
    # An end token that pads as well (CLIP's) is taken for padding, in the empty prompt as in this one.
    read = max(
        _filled(ids, pad) - _filled(none, pad) for ids, none, pad in zip(text, empty, pads, strict=True)
    )
    written = len(order.seeds) * order.width * order.height // engine.manifest.latent.downscale**2
    return {
        "input_tokens": read,
        "input_tokens_details": {"text_tokens": read, "image_tokens": 0},
        "output_tokens": written,
        "output_tokens_details": {"text_tokens": 0, "image_tokens": written},
        "total_tokens": read + written,
    }


def _filled(ids: tuple[int, ...], pad: int) -> int:
    """How many of `ids` stand before the padding."""
    filled = len(ids)
    while filled and ids[filled - 1] == pad:
        filled -= 1
    return filled


def schema(limits: Limits) -> dict[str, Any]:
    """The body's JSON schema with the limits of one model in it, for the OpenAPI document."""
    document = ImagesRequest.model_json_schema()
    fields = {name: plain(field) for name, field in document["properties"].items()}
    for name, (allowed, _) in FIXED.items():
        fields[name] |= {"enum": list(allowed)} if allowed else {"type": "null"}
    fields["prompt"] |= {"minLength": 1, "maxLength": limits.max_prompt_chars, "example": "red apple"}
    fields["n"] |= {"minimum": 1, "maximum": min(MAX_N, limits.max_images), "default": 1}
    fields["size"] |= {"enum": list(_sizes(limits)), "default": "auto"}
    fields["output_format"] |= {"default": "png"}
    fields["output_compression"] |= {"minimum": 0, "maximum": 100, "default": COMPRESSION}
    fields["stream"] |= {"default": False}
    fields["partial_images"] |= {"minimum": 0, "maximum": MAX_PARTIAL_IMAGES, "default": 0}
    fields["seed"] |= {"minimum": 0, "maximum": MAX_SEED}
    fields["num_inference_steps"] |= {"enum": [*limits.steps, "auto"], "default": limits.default_steps}
    fields["min_steps"] |= {"minimum": 1, "maximum": limits.default_steps, "default": 1}
    fields["deadline_ms"] |= {"minimum": 1, "maximum": MAX_DEADLINE_MS}
    fields["priority"] |= {"minimum": 0, "maximum": MAX_PRIORITY, "default": 0}
    return {
        **document,
        "properties": with_nulls(fields, document["properties"]),
        "example": {"prompt": "red apple", "n": 2},
    }
