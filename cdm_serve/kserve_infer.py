"""An infer request of the Open Inference Protocol ↔ orders and finished pictures.

infer = parse_infer(body, header_length, limits)
made = await service.generate_all(infer.orders)
content, header_length = infer.answer("emoji", "1", made)
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from cdm_serve.delivery import Made
from cdm_serve.errors import InvalidRequest
from cdm_serve.kserve_rows import row_orders, row_output
from cdm_serve.kserve_schemas import (
    DEFAULT_OUTPUTS,
    INPUTS,
    OUTPUTS,
    InferBody,
    Input,
    Output,
    parse_json,
)
from cdm_serve.kserve_tensors import Tensor, decode_binary, decode_json, encode_binary, encode_json
from cdm_serve.limits import Limits, Order
from cdm_serve.schemas import listed, number, quoted

# A picture as text is four times its pixels, and takes long to write: beyond this, clients must take bytes.
MAX_JSON_VALUES = 1 << 22


@dataclass(frozen=True)
class Infer:
    """A request whose every value was checked. `outputs`: name → whether its values go as raw bytes."""

    id: str | None
    orders: tuple[Order, ...]
    outputs: Mapping[str, bool]

    def answer(self, model: str, version: str, made: Sequence[Made]) -> tuple[bytes, int | None]:
        """The answer's body, and its JSON's length if raw bytes follow that."""
        tensors, raw = [], []
        for name, binary in self.outputs.items():
            tensor = row_output(name, made)
            head = {"name": name, "datatype": tensor.datatype, "shape": tensor.shape}
            if binary:
                raw.append(encode_binary(tensor))
                tensors.append(json.dumps({**head, "parameters": {"binary_data_size": len(raw[-1])}}))
            else:
                tensors.append(f'{json.dumps(head)[:-1]}, "data": {encode_json(tensor)}}}')
        about = {
            "model_name": model,
            "model_version": version,
            **({} if self.id is None else {"id": self.id}),
        }
        text = f'{json.dumps(about)[:-1]}, "outputs": [{", ".join(tensors)}]}}'.encode()
        return b"".join((text, *raw)), len(text) if raw else None


def parse_infer(body: bytes, header_length: str | None, limits: Limits) -> Infer:
    """Bytes and the `Inference-Header-Content-Length` header → request.

    Raises:
        MalformedBody: no JSON where it should be.
        InvalidRequest: a tensor or parameter that cannot be served; the message names it.
    """
    split = _header_length(body, header_length)
    parsed = parse_json(body[:split])
    tensors = _tensors(parsed.inputs, body[split:])
    outputs = _outputs(parsed)
    pixels, file = "image" in outputs, "encoded" in outputs
    orders = tuple(
        replace(order, file=file, pixels=pixels) for order in row_orders(tensors, parsed.parameters, limits)
    )
    values = sum(3 * order.width * order.height for order in orders)
    if values > MAX_JSON_VALUES and outputs.get("image") is False:
        raise InvalidRequest(
            f"image would be {values} numbers of JSON, the limit is {MAX_JSON_VALUES}; ask for it with "
            "binary_data=true",
            param="image",
        )
    return Infer(parsed.id, orders, outputs)


def _header_length(body: bytes, given: str | None) -> int:
    if given is None:
        return len(body)
    length = int(given) if given.isdecimal() and len(given) < 20 else -1
    if not 0 < length <= len(body):
        raise InvalidRequest(
            f"Inference-Header-Content-Length={quoted(given)} must be the length of the JSON that "
            f"the body begins with, 1 to {len(body)} here"
        )
    return length


def _tensors(inputs: Sequence[Input], raw: bytes) -> dict[str, Tensor]:
    """The inputs by name, each of its right datatype; their raw bytes use `raw` up."""
    tensors: dict[str, Tensor] = {}
    start = 0
    for given in inputs:
        name = given.name
        if name not in INPUTS:
            raise InvalidRequest(f"{quoted(name)} is no input; inputs: {listed(INPUTS)}")
        if name in tensors:
            raise InvalidRequest(f"{name} is there twice; send it once", param=name)
        if given.datatype != INPUTS[name].datatype:
            raise InvalidRequest(
                f"{name} has datatype {quoted(given.datatype)}; allowed: {INPUTS[name].datatype}", param=name
            )
        size = given.parameters.binary_data_size
        if (size is None) == (given.data is None):
            raise InvalidRequest(
                f"{name} must have either data, or parameters.binary_data_size and bytes behind the JSON",
                param=name,
            )
        if given.data is not None:
            tensors[name] = decode_json(name, given.datatype, given.shape, given.data)
            continue
        assert size is not None
        if size > len(raw) - start:
            raise InvalidRequest(
                f"{name} has binary_data_size={number(size)}, {len(raw) - start} bytes are left behind the JSON; "
                "Inference-Header-Content-Length says where the JSON ends",
                param=name,
            )
        tensors[name] = decode_binary(name, given.datatype, given.shape, raw[start : start + size])
        start += size
    if start < len(raw):
        raise InvalidRequest(f"{len(raw) - start} bytes behind the JSON belong to no input; leave them out")
    return tensors


def _outputs(parsed: InferBody) -> dict[str, bool]:
    outputs: dict[str, bool] = {}
    for wanted in parsed.outputs or [Output(name=name) for name in DEFAULT_OUTPUTS]:
        name, binary = wanted.name, wanted.parameters.binary_data
        if name not in OUTPUTS:
            raise InvalidRequest(f"{quoted(name)} is no output; outputs: {listed(OUTPUTS)}")
        if name in outputs:
            raise InvalidRequest(f"output {name} is there twice; ask for it once", param=name)
        outputs[name] = parsed.parameters.binary_data_output if binary is None else binary
    if outputs.get("encoded") is False:
        raise InvalidRequest(
            "encoded is the bytes of PNG files, which JSON cannot carry; ask for it with binary_data=true",
            param="encoded",
        )
    return outputs
