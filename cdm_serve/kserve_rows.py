"""Tensors → orders, finished pictures → tensors: the rows of an infer request.

Rows are pictures: N prompts make N of them, taken in together or not at all. Inputs (all but `prompt` optional):

    prompt       BYTES [N] or [N, 1]   UTF-8
    seed         INT64 [N] or [1]      one for all: the next row has seed + 1; none: drawn, and told by the output
    steps        INT32 [N] or [1]      0: "auto" of POST /generate (the default, or fewer where the deadline needs it)
    width height INT32 [1]
    deadline_ms  INT32 [1]             the request parameter `timeout` says the same in microseconds

The request parameter `priority` has Triton's meaning: 1 goes first, the largest last, 0 is the default (the last).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from cdm_serve.delivery import Made
from cdm_serve.errors import InvalidRequest
from cdm_serve.kserve_schemas import OUTPUTS, PRIORITIES, Parameters
from cdm_serve.kserve_tensors import Tensor, shown
from cdm_serve.limits import Limits, Order
from cdm_serve.schemas import GenerateRequest, listed, number
from engines.noise import MAX_SEED


def row_orders(tensors: Mapping[str, Tensor], parameters: Parameters, limits: Limits) -> list[Order]:
    """One order per row, every value within its limit.

    Raises:
        InvalidRequest: a shape or value that cannot be served; the message names tensor, value, limit and row.
    """
    prompts = _prompts(tensors, limits)
    rows = len(prompts)
    seeds, steps = _column(tensors, "seed", rows), _column(tensors, "steps", rows)
    width, height = _column(tensors, "width", 1), _column(tensors, "height", 1)
    deadline = _column(tensors, "deadline_ms", 1)
    if deadline and parameters.timeout:
        raise InvalidRequest(
            "deadline_ms and the parameter timeout say the same; send one of them", param="deadline_ms"
        )
    rounded_up = -(-parameters.timeout // 1000)
    orders = []
    for row, prompt in enumerate(prompts):
        wish = GenerateRequest(
            prompt=prompt,
            seed=_seed(seeds, row),
            steps=_steps(steps, row),
            width=width[0] if width else None,
            height=height[0] if height else None,
            deadline_ms=deadline[0] if deadline else rounded_up or None,
            priority=PRIORITIES - parameters.priority if parameters.priority else 0,
        )
        try:
            orders.append(limits.order(wish))
        except InvalidRequest as error:
            where = f"row {row}: " if rows > 1 else ""
            raise InvalidRequest(where + error.message, param=error.param) from error
    return orders


def _prompts(tensors: Mapping[str, Tensor], limits: Limits) -> list[str]:
    if "prompt" not in tensors:
        raise InvalidRequest("the input prompt (BYTES) is required", param="prompt")
    tensor = tensors["prompt"]
    if tensor.shape[1:] not in ((), (1,)) or not tensor.shape:
        raise InvalidRequest(
            f"prompt has shape {shown(tensor.shape)}; allowed: [N] and [N, 1]", param="prompt"
        )
    if not 1 <= tensor.shape[0] <= limits.max_images:
        raise InvalidRequest(
            f"prompt has {number(tensor.shape[0])} rows; allowed: 1 to {limits.max_images}, a picture each",
            param="prompt",
        )
    prompts = []
    for row, value in enumerate(tensor.values):
        try:
            prompts.append(value.decode())
        except UnicodeDecodeError as error:
            raise InvalidRequest(f"prompt[{row}] is not UTF-8 ({error.reason})", param="prompt") from error
    return prompts


def _column(tensors: Mapping[str, Tensor], name: str, rows: int) -> list[int]:
    """One value, or one for each of `rows`; none if it was not sent."""
    if name not in tensors:
        return []
    tensor = tensors[name]
    allowed = [(1,), (1, 1)] if rows == 1 else [(1,), (1, 1), (rows,), (rows, 1)]
    if tensor.shape not in allowed:
        raise InvalidRequest(
            f"{name} has shape {shown(tensor.shape)}; allowed: {listed(shown(shape) for shape in allowed)}",
            param=name,
        )
    values: list[int] = tensor.values.tolist()
    return values


def _seed(seeds: Sequence[int], row: int) -> int | None:
    if len(seeds) == 1:
        return seeds[0] + row if seeds[0] + row <= MAX_SEED else seeds[0] + row - MAX_SEED - 1
    return seeds[row] if seeds else None


def _steps(steps: Sequence[int], row: int) -> int | Literal["auto"] | None:
    if not steps:
        return None
    return steps[row if len(steps) > 1 else 0] or "auto"


def row_output(name: str, made: Sequence[Made]) -> Tensor:
    """The output `name` of all rows, which were ordered with what it needs."""
    values: NDArray[Any]
    if name == "image":
        values = np.stack([image.pixels for image in made if image.pixels is not None])
    elif name == "encoded":
        values = np.array([image.data for image in made], np.object_)
    else:
        values = np.array([getattr(image, name) for image in made])
    return Tensor(name, OUTPUTS[name].datatype, values.shape, values.ravel())
