"""uint8 pictures ↔ PNG, JPEG and WebP bytes that carry the parameters they were made with.

    data = encode_image(picture, "png", {"prompt": "red apple", "seed": 7})
    read_parameters(data)                            # {'prompt': 'red apple', 'seed': 7}

PNG holds them in an iTXt chunk `parameters`, JPEG and WebP in EXIF's UserComment; both as JSON, so that a prompt may
be any Unicode.
"""

from __future__ import annotations

import io
import json
import struct
import zlib
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from cdm_serve.schemas import Format

MEDIA_TYPES: dict[Format, str] = {"png": "image/png", "jpeg": "image/jpeg", "webp": "image/webp"}
PNG_KEY = "parameters"
EXIF_IFD = 0x8769
USER_COMMENT = 0x9286
ASCII = b"ASCII\x00\x00\x00"
"""EXIF 2.3, section 4.6.5: UserComment begins with eight bytes that name its character code."""

PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
PNG_RGB8 = bytes((8, 2, 0, 0, 0))
"""Of IHDR: 8 bits a channel, RGB, deflate, the five filters, no interlacing."""
PNG_SUB = 1
"""The filter that stores each pixel as its difference from the one to its left."""
QUALITY = 92
"""Of JPEG and WebP, where nobody asks for another."""
WEBP_METHOD = 2


def encode_image(
    picture: NDArray[np.uint8], format: Format, parameters: Mapping[str, Any], quality: int = QUALITY
) -> bytes:
    """Encode one RGB picture `(height, width, 3)` with its parameters inside.

    `quality`: of JPEG and WebP, 0 (smallest) to 100 (best). PNG loses nothing and has none.
    """
    if format == "png":
        return _png(picture, json.dumps(parameters, ensure_ascii=False))
    image = Image.fromarray(picture)
    out = io.BytesIO()
    if format == "jpeg":
        image.save(out, "JPEG", quality=quality, subsampling=0, exif=_exif(parameters))
    else:
        image.save(out, "WEBP", quality=quality, method=WEBP_METHOD, exif=_exif(parameters))
    return out.getvalue()


def _png(picture: NDArray[np.uint8], text: str) -> bytes:
    """A PNG file (ISO/IEC 15948) with `text` in it.

    Written here because Pillow tries five filters on every row, which takes longer than a step of a small model. One
    filter, and run lengths in place of a search for repetitions (pictures have noise, which repeats nothing), take a
    third of the time for pictures of the bundled model, and the files are no larger (benchmarks/LOG.md).
    """
    height, width, _ = picture.shape
    pixels = picture.reshape(height, 3 * width)
    rows = np.empty((height, 1 + 3 * width), np.uint8)
    rows[:, 0] = PNG_SUB
    rows[:, 1:4] = pixels[:, :3]
    np.subtract(pixels[:, 3:], pixels[:, :-3], out=rows[:, 4:])
    deflate = zlib.compressobj(level=1, strategy=zlib.Z_RLE)
    chunks = (
        (b"IHDR", struct.pack(">II", width, height) + PNG_RGB8),
        # Neither compressed nor in any language: three zeros and two empty names lie between the key and the text.
        (b"iTXt", PNG_KEY.encode() + bytes(5) + text.encode()),
        (b"IDAT", deflate.compress(rows.data) + deflate.flush()),
        (b"IEND", b""),
    )
    return PNG_SIGNATURE + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in chunks
    )


def read_parameters(data: bytes) -> dict[str, Any]:
    """The parameters that `encode_image` wrote.

    Raises:
        ValueError: not a picture, or one without parameters.
    """
    try:
        with Image.open(io.BytesIO(data)) as image:
            text = image.info.get(PNG_KEY)
            if text is None:
                comment = image.getexif().get_ifd(EXIF_IFD).get(USER_COMMENT, b"")
                text = comment.removeprefix(ASCII).decode("ascii") if comment.startswith(ASCII) else None
    except UnidentifiedImageError as error:
        raise ValueError("these bytes are no picture") from error
    if text is None:
        raise ValueError("this picture carries no generation parameters")
    parameters: dict[str, Any] = json.loads(text)
    return parameters


def _exif(parameters: Mapping[str, Any]) -> Image.Exif:
    exif = Image.Exif()
    exif.get_ifd(EXIF_IFD)[USER_COMMENT] = ASCII + json.dumps(parameters, ensure_ascii=True).encode("ascii")
    return exif
