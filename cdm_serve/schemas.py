"""Every HTTP field of the native API: its type, its limit, and what a client reads when it breaks one.

Types are checked by `GenerateRequest` (strict: true is no 1, "4" is no 4, unknown fields are refused); values are
checked by `Limits` (`limits.py`), which come from the settings and from what the bundle was exported for. Other APIs'
bodies are read by the same `parse_fields`.
"""

from __future__ import annotations

import json
from types import NoneType
from typing import Annotated, Any, Literal, TypeVar, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from cdm_serve.errors import InvalidRequest, MalformedBody

Format = Literal["png", "jpeg", "webp"]
FORMATS: tuple[Format, ...] = get_args(Format)

Fields = TypeVar("Fields", bound=BaseModel)
TYPE_NAMES: dict[Any, str] = {str: "a string", int: "an integer", bool: "true or false"}


class GenerateRequest(BaseModel):
    """The body of `POST /generate`."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    prompt: Annotated[str, Field(description="what to draw; unknown words are no error")]
    model: Annotated[str | None, Field(description="a served model's name; none: the default")] = None
    seed: Annotated[int | None, Field(description="seed of the first picture; the next has seed + 1")] = None
    steps: Annotated[
        int | Literal["auto"] | None,
        Field(
            description="denoising steps; auto: the default, or fewer where the deadline would be missed otherwise"
        ),
    ] = None
    min_steps: Annotated[int | None, Field(description="with steps=auto: the fewest to be content with")] = (
        None
    )
    deadline_ms: Annotated[
        int | None,
        Field(description="milliseconds until the pictures are wanted; refused at once if that cannot be"),
    ] = None
    priority: Annotated[int, Field(description="larger goes first")] = 0
    num_images: Annotated[int, Field(description="pictures to make")] = 1
    width: Annotated[int | None, Field(description="pixels across")] = None
    height: Annotated[int | None, Field(description="pixels down")] = None
    format: Annotated[Format, Field(description="how pictures are encoded")] = "png"
    response_format: Annotated[
        Literal["image", "json"] | None,
        Field(
            description="image: the picture itself; json: base64, seeds and timings; default: image for one picture"
        ),
    ] = None
    stream: Annotated[
        bool,
        Field(description="answer with server-sent events while the one picture is made, previews before it"),
    ] = False
    previews: Annotated[
        int | None,
        Field(
            description="with stream: the most previews, spread over the steps; default: after every step but the last"
        ),
    ] = None


def parse_body(body: bytes) -> GenerateRequest:
    """Bytes → request of the native API. Raises as `parse_fields` does."""
    return parse_fields(GenerateRequest, body)


def parse_fields(model: type[Fields], body: bytes) -> Fields:
    """Bytes → the fields of `model`, of their types; values are not checked yet.

    Raises:
        MalformedBody: not JSON.
        InvalidRequest: a wrong type, an unknown field or a missing one.
    """
    try:
        return model.model_validate_json(body)
    except ValidationError as error:
        problems = error.errors(include_url=False, include_context=False)
    if problems[0]["type"] == "json_invalid":
        raise MalformedBody(f"the body is not JSON ({problems[0]['msg'].removeprefix('Invalid JSON: ')})")
    # A field of several types has a problem for each of them: one is enough.
    problems = list({problem["loc"][:1]: problem for problem in reversed(problems)}.values())[::-1]
    names = [".".join(str(part) for part in problem["loc"][:1]) or "body" for problem in problems]
    messages = [_type_message(model, name, problem) for name, problem in zip(names, problems, strict=True)]
    raise InvalidRequest("; ".join(messages), param=None if names[0] == "body" else names[0])


def _type_message(model: type[BaseModel], name: str, problem: Any) -> str:
    known = model.model_fields
    if problem["type"] == "missing":
        return f"{name} is required"
    if problem["type"] == "extra_forbidden":
        return f"{quoted(name)} is no field; fields: {', '.join(known)}"
    if problem["loc"] == ():
        return 'the body must be a JSON object such as {"prompt": "red apple"}'
    return f"{name}={quoted(problem['input'])} must be {_wanted(known[name].annotation)}"


def _wanted(annotation: Any) -> str:
    """What may stand in a field, in words: `int | Literal["auto"] | None` is "an integer or auto"."""
    parts = [part for part in get_args(annotation) or (annotation,) if part is not NoneType]
    flat = [option for part in parts for option in (get_args(part) or (part,))]
    names = [TYPE_NAMES[part] for part in flat if part in TYPE_NAMES]
    options = [str(option) for option in flat if option not in TYPE_NAMES]
    if not names and len(options) > 1:
        return f"one of {', '.join(options)}"
    return " or ".join([*names, *options])


def quoted(value: Any) -> str:
    """A client's value as JSON, cut to what an error message can carry."""
    text = json.dumps(value, ensure_ascii=True, default=str)
    return text if len(text) <= 80 else text[:77] + "..."


def number(value: int) -> str:
    return str(value) if abs(value) < 10**40 else f"an integer of {value.bit_length()} bits"


def listed(values: Any) -> str:
    return ", ".join(str(value) for value in values)
