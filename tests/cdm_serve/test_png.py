"""The PNG files that `images.py` writes itself: every decoder's checks pass, and no pixel is lost."""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from cdm_serve.images import PNG_SIGNATURE, encode_image, read_parameters

RANDOM = np.random.default_rng(0)


def chunks(data: bytes) -> list[tuple[bytes, bytes]]:
    """(kind, content) of each, their checksums verified."""
    assert data.startswith(PNG_SIGNATURE)
    found, at = [], len(PNG_SIGNATURE)
    while at < len(data):
        (length,) = struct.unpack_from(">I", data, at)
        kind, content = data[at + 4 : at + 8], data[at + 8 : at + 8 + length]
        assert struct.unpack_from(">I", data, at + 8 + length) == (zlib.crc32(kind + content),)
        found.append((kind, content))
        at += 12 + length
    return found


@pytest.mark.parametrize("shape", [(1, 1), (1, 7), (7, 1), (33, 20)])
@pytest.mark.parametrize("high", [1, 256])
def test_no_pixel_is_lost(shape: tuple[int, int], high: int) -> None:
    picture = RANDOM.integers(0, high, (*shape, 3), np.uint8)
    with Image.open(io.BytesIO(encode_image(picture, "png", {}))) as image:
        image.verify()
    with Image.open(io.BytesIO(encode_image(picture, "png", {}))) as image:
        assert image.mode == "RGB"
        assert np.array_equal(np.asarray(image), picture)


def test_pictures_need_not_lie_in_one_piece_of_memory() -> None:
    picture = RANDOM.integers(0, 256, (8, 12, 3), np.uint8)
    view = picture.transpose(1, 0, 2)[::-1]
    same = encode_image(np.ascontiguousarray(view), "png", {"seed": 1})
    assert encode_image(view, "png", {"seed": 1}) == same


def test_chunks_are_those_of_the_standard_and_their_checksums_right() -> None:
    data = encode_image(np.zeros((4, 6, 3), np.uint8), "png", {"prompt": "späť 🍎"})
    found = chunks(data)
    assert [kind for kind, _ in found] == [b"IHDR", b"iTXt", b"IDAT", b"IEND"]
    assert found[0][1] == struct.pack(">IIBBBBB", 6, 4, 8, 2, 0, 0, 0)
    # The key's end; not compressed, and not by any method; no language; no translated key.
    assert found[1][1] == b"parameters\0" + b"\0\0" + b"\0" + b"\0" + '{"prompt": "späť 🍎"}'.encode()
    assert read_parameters(data) == {"prompt": "späť 🍎"}


def test_a_smooth_picture_is_smaller_than_its_pixels() -> None:
    across = np.linspace(0, 255, 128).astype(np.uint8)
    picture = np.broadcast_to(across[None, :, None], (128, 128, 3))
    assert len(encode_image(picture, "png", {})) < picture.size / 8
