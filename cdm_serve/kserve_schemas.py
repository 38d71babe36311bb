"""The JSON of the Open Inference Protocol's infer request: its fields and types, and what inputs and outputs there are.

Contracts: KServe's "Open Inference Protocol (V2)"; Triton's extensions "binary tensor data" and "schedule policy".
"""

from __future__ import annotations

from typing import Annotated, Any, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from cdm_serve.errors import InvalidRequest, MalformedBody
from cdm_serve.limits import MAX_DEADLINE_MS, MAX_PRIORITY
from cdm_serve.schemas import quoted

PRIORITIES = MAX_PRIORITY + 1
"""Triton's levels are 1 to this."""


class Spec(NamedTuple):
    """An input or output as the model's metadata shows it; −1: as the request says."""

    datatype: str
    shape: tuple[int, ...]


INPUTS = {
    "prompt": Spec("BYTES", (-1,)),
    "seed": Spec("INT64", (-1,)),
    "steps": Spec("INT32", (-1,)),
    "width": Spec("INT32", (1,)),
    "height": Spec("INT32", (1,)),
    "deadline_ms": Spec("INT32", (1,)),
}
OUTPUTS = {
    "image": Spec("UINT8", (-1, -1, -1, 3)),
    "encoded": Spec("BYTES", (-1,)),
    "seed": Spec("INT64", (-1,)),
    "steps": Spec("INT32", (-1,)),
}
DEFAULT_OUTPUTS = ("image", "seed", "steps")


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class InputParameters(_Strict):
    """How an input's values come: as that many bytes behind the JSON."""

    binary_data_size: Annotated[int, Field(ge=0)] | None = None


class Input(_Strict):
    """One input tensor, its values here (`data`) or behind the JSON."""

    name: str
    datatype: str
    shape: tuple[int, ...]
    parameters: InputParameters = InputParameters()
    data: list[Any] | None = None


class OutputParameters(_Strict):
    """How an output's values shall go."""

    binary_data: bool | None = None


class Output(_Strict):
    """One wanted output."""

    name: str
    parameters: OutputParameters = OutputParameters()


class Parameters(_Strict):
    """The request's parameters; units and meanings are Triton's (schedule policy and binary data extensions)."""

    binary_data_output: bool = False
    priority: Annotated[int, Field(ge=0, le=PRIORITIES)] = 0
    timeout: Annotated[int, Field(ge=0, le=MAX_DEADLINE_MS * 1000)] = 0


class InferBody(_Strict):
    """The JSON of an infer request. `model_name` is what some clients repeat of the URL, which alone decides."""

    id: str | None = None
    model_name: str | None = None
    parameters: Parameters = Parameters()
    inputs: tuple[Input, ...]
    outputs: tuple[Output, ...] = ()


def parse_json(text: bytes) -> InferBody:
    """Bytes → request.

    Raises:
        MalformedBody: not JSON.
        InvalidRequest: a wrong type, a missing field, or one that nothing here would follow.
    """
    try:
        return InferBody.model_validate_json(text)
    except ValidationError as error:
        problem = error.errors(include_url=False, include_context=False)[0]
    if problem["type"] == "json_invalid":
        raise MalformedBody(f"the request is not JSON ({problem['msg'].removeprefix('Invalid JSON: ')})")
    where = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in problem["loc"])[1:]
    where = where if len(where) <= 80 else where[:77] + "..."
    if problem["type"] == "extra_forbidden":
        raise InvalidRequest(f"{where} is nothing that this server knows; leave it out", param=where)
    if problem["type"] == "missing":
        raise InvalidRequest(f"{where} is required", param=where)
    # pydantic's sentence says what would be right; it never repeats the value
    raise InvalidRequest(
        f"{where or 'body'}={quoted(problem['input'])}: {problem['msg']}", param=where or None
    )


BODY_DOCS: dict[str, Any] = {
    "required": True,
    "content": {
        "application/json": {
            "schema": {
                "type": "object",
                "required": ["inputs"],
                "properties": {
                    "inputs": {
                        "type": "array",
                        "minItems": 1,
                        "items": {
                            "type": "object",
                            "required": ["name", "datatype", "shape"],
                            "properties": {
                                "name": {"enum": list(INPUTS)},
                                "datatype": {"enum": sorted({spec.datatype for spec in INPUTS.values()})},
                                "shape": {"type": "array", "items": {"type": "integer", "minimum": 1}},
                                "data": {"type": "array"},
                            },
                        },
                        "description": f"tensors: {', '.join(INPUTS)}; each with name, datatype, shape and data",
                    },
                    "outputs": {
                        "type": "array",
                        "items": {
                            "type": "object",
                            "required": ["name"],
                            "properties": {"name": {"enum": list(OUTPUTS)}},
                        },
                        "description": f"wanted tensors, by name: {', '.join(OUTPUTS)}",
                        "default": ", ".join(DEFAULT_OUTPUTS),
                    },
                    "parameters": {
                        "type": "object",
                        "description": f"binary_data_output; priority, 1 (goes first) to {PRIORITIES}; timeout, in µs",
                    },
                    "id": {"type": "string", "description": "is sent back"},
                },
                "example": {
                    "inputs": [{"name": "prompt", "datatype": "BYTES", "shape": [1], "data": ["red apple"]}],
                    "parameters": {"binary_data_output": True},
                },
            }
        },
        "application/octet-stream": {
            "schema": {
                "type": "string",
                "format": "binary",
                "description": "the same JSON, then raw tensors; Inference-Header-Content-Length is the JSON's length",
            }
        },
    },
}
"""The request's body for the OpenAPI document."""
