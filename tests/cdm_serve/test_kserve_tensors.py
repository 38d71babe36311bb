"""Laws of the Open Inference Protocol's tensors: what goes in comes out, and what cannot be a tensor is refused."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays
from numpy.typing import NDArray
from tritonclient.utils import deserialize_bytes_tensor, serialize_byte_tensor, triton_to_np_dtype

from cdm_serve.errors import InvalidRequest
from cdm_serve.kserve_tensors import (
    DATATYPES,
    NUMBERS,
    PIECE,
    Tensor,
    decode_binary,
    decode_json,
    encode_binary,
    encode_json,
)

SHAPES = array_shapes(min_dims=1, max_dims=4, min_side=0, max_side=4) | st.just(())
ANY_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner),
    max_leaves=8,
)


@st.composite
def numbers(draw: st.DrawFn, finite: bool = False) -> tuple[str, NDArray[Any]]:
    """A datatype and an array of it, any shape."""
    datatype = draw(st.sampled_from(sorted(NUMBERS)))
    elements: dict[str, Any] = {"allow_nan": False, "allow_infinity": False}
    options = {"elements": elements} if finite and datatype.startswith("FP") else {}
    return datatype, draw(arrays(NUMBERS[datatype], draw(SHAPES), **options))


@st.composite
def texts(draw: st.DrawFn, of: st.SearchStrategy[bytes]) -> NDArray[Any]:
    """An array of bytes objects, any shape."""
    shape = draw(SHAPES)
    return arrays_of_objects(draw(st.lists(of, min_size=(n := int(np.prod(shape))), max_size=n)), shape)


def arrays_of_objects(values: list[bytes], shape: tuple[int, ...]) -> NDArray[Any]:
    flat = np.empty(len(values), np.object_)
    flat[:] = values
    return flat.reshape(shape)


def same(tensor: Tensor, datatype: str, array: NDArray[Any]) -> bool:
    equal = np.array_equal(tensor.values, array.ravel(), equal_nan=datatype.startswith("FP"))
    return (tensor.datatype, tensor.shape) == (datatype, array.shape) and equal


@given(numbers())
def test_numbers_survive_as_the_clients_raw_bytes(case: tuple[str, NDArray[Any]]) -> None:
    datatype, array = case
    assert array.dtype == np.dtype(triton_to_np_dtype(datatype))
    raw = array.tobytes()  # as tritonclient sends it
    tensor = decode_binary("x", datatype, array.shape, raw)
    assert same(tensor, datatype, array)
    assert encode_binary(tensor) == raw


@given(numbers(finite=True), st.booleans())
def test_numbers_survive_as_json_flat_and_nested(case: tuple[str, NDArray[Any]], nested: bool) -> None:
    datatype, array = case
    data = json.loads(json.dumps(array.tolist() if nested and array.shape else array.ravel().tolist()))
    tensor = decode_json("x", datatype, array.shape, data)
    assert same(tensor, datatype, array)
    assert json.loads(encode_json(tensor)) == array.ravel().tolist()


@given(texts(st.binary(max_size=20)))
def test_bytes_survive_as_the_clients_raw_bytes(array: NDArray[Any]) -> None:
    serialized = serialize_byte_tensor(array)
    raw = serialized.item() if serialized.size else b""
    tensor = decode_binary("x", "BYTES", array.shape, raw)
    assert same(tensor, "BYTES", array)
    assert encode_binary(tensor) == raw
    assert deserialize_bytes_tensor(encode_binary(tensor)).tolist() == array.ravel().tolist()


@given(texts(st.text(max_size=20).map(str.encode)), st.booleans())
def test_texts_survive_as_json_flat_and_nested(array: NDArray[Any], nested: bool) -> None:
    words = np.vectorize(bytes.decode, otypes=[object])(array) if array.size else array
    data = words.tolist() if nested and array.shape else words.ravel().tolist()
    tensor = decode_json("x", "BYTES", array.shape, data)
    assert same(tensor, "BYTES", array)
    assert json.loads(encode_json(tensor)) == words.ravel().tolist()


def test_raw_numbers_are_little_endian_and_bytes_follow_their_length() -> None:
    assert encode_binary(decode_json("x", "INT32", (2,), [1, -2])) == struct.pack("<ii", 1, -2)
    assert encode_binary(decode_json("x", "BYTES", (2,), ["ab", ""])) == b"\x02\0\0\0ab\0\0\0\0"


def test_long_json_is_whole() -> None:
    values = np.arange(2 * PIECE + 3, dtype=np.uint8)
    assert json.loads(encode_json(Tensor("x", "UINT8", values.shape, values))) == values.tolist()


def decoded(decode: Callable[..., Tensor], *args: Any) -> Tensor | None:
    """The tensor; none if it was refused, by its name and in few words."""
    try:
        return decode("steps", *args)
    except InvalidRequest as error:
        refusal = error
    assert refusal.param == "steps"
    assert refusal.message.startswith("steps")
    assert len(refusal.message) < 300
    return None


@given(st.sampled_from(DATATYPES), SHAPES, st.binary(max_size=64))
def test_any_bytes_are_that_tensor_or_refused(datatype: str, shape: tuple[int, ...], raw: bytes) -> None:
    if (tensor := decoded(decode_binary, datatype, shape, raw)) is not None:
        assert tensor.values.size == np.prod(shape)
        assert encode_binary(tensor) == raw


@given(st.sampled_from(DATATYPES), st.lists(ANY_JSON, max_size=3), st.none() | SHAPES)
def test_any_json_is_that_tensor_or_refused(
    datatype: str, data: list[Any], shape: tuple[int, ...] | None
) -> None:
    shape = (len(data),) if shape is None else shape
    if (tensor := decoded(decode_json, datatype, shape, data)) is not None:
        assert tensor.values.size == np.prod(shape)
        if tensor.values.size:
            values = np.array(data, object).ravel().tolist()
            assert json.loads(encode_json(tensor)) == [
                NUMBERS[datatype].type(value) if datatype.startswith("FP") else value for value in values
            ]


REFUSED: list[tuple[str, tuple[int, ...], list[Any], list[str]]] = [
    ("INT32", (2,), [1], ["1 values", "[2]", "2"]),
    ("INT32", (1,), [2**31], [str(2**31), "INT32"]),
    ("INT32", (1,), [True], ["true", "INT32"]),
    ("INT32", (1,), [4.0], ["4.0", "INT32"]),
    ("INT32", (1,), ["4"], ['"4"', "INT32"]),
    ("UINT8", (2,), [0, -1], ["steps[1]=-1", "UINT8"]),
    ("FP16", (1,), [70000.0], ["70000.0", "FP16"]),
    ("FP64", (1,), [10**400], ["FP64"]),
    ("BOOL", (1,), [1], ["=1", "BOOL"]),
    ("BYTES", (1,), [5], ["=5", "BYTES"]),
    ("INT32", (2, 2), [[1, 2], [3]], ["nested", "[2, 2]"]),
    ("INT32", (2, 2), [[1, 2], 3], ["nested", "[2, 2]"]),
    ("INT32", (4,), [[1, 2], [3, 4]], ["nested", "[4]"]),
    ("INT32", (-1,), [1], ["[-1]"]),
    ("INT32", (10**30,), [1], [str(10**30)]),
    ("INT32", (10**4000,), [1], ["bits"]),
    ("INT32", (1,) * 9, [1], ["9 dimensions", "8"]),
    ("BF16", (1,), [1.0], ['"BF16"', "FP16", "BYTES"]),
]


@pytest.mark.parametrize(("datatype", "shape", "data", "fragments"), REFUSED)
def test_impossible_tensor_is_refused_with_given_and_allowed(
    datatype: str, shape: tuple[int, ...], data: list[Any], fragments: list[str]
) -> None:
    with pytest.raises(InvalidRequest) as caught:
        decode_json("steps", datatype, shape, data)
    assert all(fragment in caught.value.message for fragment in ["steps", *fragments])
    assert len(caught.value.message) < 300


@pytest.mark.parametrize(
    ("datatype", "shape", "raw", "fragments"),
    [
        ("INT32", (2,), b"\0" * 7, ["7 bytes", "[2]", "8"]),
        ("BOOL", (1,), b"\2", ["neither 0 nor 1"]),
        ("BYTES", (1,), b"\1\0", ["length"]),
        ("BYTES", (1,), b"\xff\xff\xff\xffa", ["steps[0]", str(2**32 - 1), "1 are left"]),
        ("BYTES", (2,), b"\0\0\0\0", ["1 elements", "2"]),
        ("BYTES", (10**30,), b"\0\0\0\0", [str(10**30)]),
    ],
)
def test_impossible_bytes_are_refused_with_given_and_allowed(
    datatype: str, shape: tuple[int, ...], raw: bytes, fragments: list[str]
) -> None:
    with pytest.raises(InvalidRequest) as caught:
        decode_binary("steps", datatype, shape, raw)
    assert all(fragment in caught.value.message for fragment in ["steps", *fragments])
