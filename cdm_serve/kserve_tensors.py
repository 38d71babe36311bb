"""Tensors of the Open Inference Protocol: their values as JSON, or as raw bytes behind it.

    tensor = decode_binary("steps", "INT32", (2,), b"\\4\\0\\0\\0\\1\\0\\0\\0")
    tensor.values                                    # array([4, 1], dtype=int32)
    encode_json(tensor)                              # '[4,1]'

Contracts: KServe's "Open Inference Protocol (V2)", tensor data: row-major, flat or nested in JSON; Triton's "Binary
Tensor Data Extension": little-endian without padding, a BYTES element behind its length in 4 bytes.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cdm_serve.errors import InvalidRequest
from cdm_serve.schemas import listed, number, quoted

NUMBERS: dict[str, np.dtype[Any]] = {
    "BOOL": np.dtype(np.bool_),
    **{
        f"{kind}{bits}": np.dtype(f"<{kind[0].lower()}{bits // 8}")
        for kind in ("UINT", "INT")
        for bits in (8, 16, 32, 64)
    },
    **{f"FP{bits}": np.dtype(f"<f{bits // 8}") for bits in (16, 32, 64)},
}
"""Datatype → the elements' layout. (Triton's BF16 is left out: numpy has no such numbers.)"""
DATATYPES = (*NUMBERS, "BYTES")

MAX_DIMENSIONS = 8
# Text is encoded in pieces, so that other threads get their turn in between.
PIECE = 1 << 16
LENGTH = struct.Struct("<I")


@dataclass(frozen=True)
class Tensor:
    """A named tensor. `values` is flat and row-major: numbers of `NUMBERS[datatype]`, or objects (bytes) for BYTES."""

    name: str
    datatype: str
    shape: tuple[int, ...]
    values: NDArray[Any]


def decode_json(name: str, datatype: str, shape: Sequence[int], data: Sequence[Any]) -> Tensor:
    """A tensor whose values came as a JSON list, flat or nested as `shape` says. BYTES are strings there, in UTF-8.

    Raises:
        InvalidRequest: an unknown datatype, an impossible shape, as many values as another shape has, or a value that
            the datatype cannot hold.
    """
    count = _count(name, datatype, shape)
    flat = data if not any(isinstance(value, list) for value in data) else _flattened(name, shape, data)
    if len(flat) != count:
        raise InvalidRequest(
            f"{name} has {len(flat)} values, its shape {shown(shape)} needs {number(count)}", param=name
        )
    for index, value in enumerate(flat):
        if not _fits(datatype, value):
            raise InvalidRequest(f"{name}[{index}]={quoted(value)} is no {datatype}", param=name)
    if datatype == "BYTES":
        return _bytes_tensor(name, shape, [value.encode() for value in flat])
    return Tensor(name, datatype, tuple(shape), np.array(flat, NUMBERS[datatype]))


def decode_binary(name: str, datatype: str, shape: Sequence[int], raw: bytes) -> Tensor:
    """A tensor whose values came as raw bytes.

    Raises:
        InvalidRequest: an unknown datatype, an impossible shape, or another number of bytes than they need.
    """
    count = _count(name, datatype, shape)
    if datatype == "BYTES":
        return _bytes_tensor(name, shape, _elements(name, count, raw))
    layout = NUMBERS[datatype]
    if len(raw) != count * layout.itemsize:
        raise InvalidRequest(
            f"{name} has {len(raw)} bytes, {datatype} of shape {shown(shape)} needs {number(count * layout.itemsize)}",
            param=name,
        )
    if datatype == "BOOL" and any(byte > 1 for byte in raw):
        raise InvalidRequest(f"{name} has a byte that is neither 0 nor 1, which is no BOOL", param=name)
    return Tensor(name, datatype, tuple(shape), np.frombuffer(raw, layout))


def encode_json(tensor: Tensor) -> str:
    """The values as a flat JSON list. BYTES must be UTF-8, numbers finite: JSON has nothing else."""
    pieces = []
    for start in range(0, tensor.values.size, PIECE):
        values = tensor.values[start : start + PIECE].tolist()
        if tensor.datatype == "BYTES":
            values = [value.decode() for value in values]
        pieces.append(json.dumps(values, separators=(",", ":"), allow_nan=False)[1:-1])
    return f"[{','.join(pieces)}]"


def encode_binary(tensor: Tensor) -> bytes:
    """The values as raw bytes."""
    if tensor.datatype == "BYTES":
        return b"".join(part for value in tensor.values for part in (LENGTH.pack(len(value)), value))
    return tensor.values.astype(NUMBERS[tensor.datatype], copy=False).tobytes()


def _bytes_tensor(name: str, shape: Sequence[int], elements: Sequence[bytes]) -> Tensor:
    return Tensor(name, "BYTES", tuple(shape), np.array(elements, np.object_))


def _count(name: str, datatype: str, shape: Sequence[int]) -> int:
    """How many elements a tensor of `shape` has."""
    if datatype not in DATATYPES:
        raise InvalidRequest(
            f"{name} has datatype {quoted(datatype)}; allowed: {listed(DATATYPES)}", param=name
        )
    if len(shape) > MAX_DIMENSIONS:
        raise InvalidRequest(f"{name} has {len(shape)} dimensions, the limit is {MAX_DIMENSIONS}", param=name)
    if any(size < 0 for size in shape):
        raise InvalidRequest(f"{name} has shape {shown(shape)}; sizes must be 0 or more", param=name)
    return math.prod(shape)


def _flattened(name: str, shape: Sequence[int], data: Sequence[Any]) -> Sequence[Any]:
    level: list[Any] = [data]
    for size in shape:
        if any(not isinstance(part, (list, tuple)) or len(part) != size for part in level):
            raise InvalidRequest(f"{name}'s nested values have not its shape {shown(shape)}", param=name)
        level = [value for part in level for value in part]
    return level


def _fits(datatype: str, value: Any) -> bool:
    """Whether a JSON value is one of `datatype`; true is no 1, and 4.0 is no integer."""
    if datatype == "BYTES":
        return isinstance(value, str)
    if datatype == "BOOL":
        return isinstance(value, bool)
    if isinstance(value, bool):
        return False
    if datatype.startswith("FP"):
        return isinstance(value, (int, float)) and abs(value) <= np.finfo(NUMBERS[datatype]).max.item()
    limits = np.iinfo(NUMBERS[datatype])
    return isinstance(value, int) and limits.min <= value <= limits.max


def _elements(name: str, count: int, raw: bytes) -> list[bytes]:
    """Split BYTES into its elements, which must be `count` and use `raw` up."""
    elements: list[bytes] = []
    start = 0
    while start < len(raw):
        end = start + LENGTH.size
        if end > len(raw):
            raise InvalidRequest(f"{name} ends in the middle of an element's length (4 bytes)", param=name)
        (length,) = LENGTH.unpack_from(raw, start)
        if end + length > len(raw):
            raise InvalidRequest(
                f"{name}[{len(elements)}] says that it has {length} bytes, {len(raw) - end} are left",
                param=name,
            )
        elements.append(raw[end : end + length])
        start = end + length
    if len(elements) != count:
        raise InvalidRequest(
            f"{name} has {len(elements)} elements, its shape needs {number(count)}", param=name
        )
    return elements


def shown(shape: Sequence[int]) -> str:
    """A shape as an error message carries it."""
    return f"[{listed(number(size) for size in shape)}]"
