"""uint8 pictures ↔ PNG, JPEG and WebP bytes that carry the parameters they were made with.

    data = encode_image(picture, "png", {"prompt": "red apple", "seed": 7})
    read_parameters(data)                            # {'prompt': 'red apple', 'seed': 7}

PNG holds them in an iTXt chunk `parameters`, JPEG and WebP in EXIF's UserComment; both as JSON, so that a prompt may
be any Unicode.
"""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, PngImagePlugin, UnidentifiedImageError

from cdm_serve.schemas import Format

MEDIA_TYPES: dict[Format, str] = {"png": "image/png", "jpeg": "image/jpeg", "webp": "image/webp"}
PNG_KEY = "parameters"
EXIF_IFD = 0x8769
USER_COMMENT = 0x9286
ASCII = b"ASCII\x00\x00\x00"
"""EXIF 2.3, section 4.6.5: UserComment begins with eight bytes that name its character code."""

# Pictures here are small and made in milliseconds: a smaller file is not worth waiting for.
PNG_LEVEL = 2
QUALITY = 92
"""Of JPEG and WebP, where nobody asks for another."""
WEBP_METHOD = 2


def encode_image(
    picture: NDArray[np.uint8], format: Format, parameters: Mapping[str, Any], quality: int = QUALITY
) -> bytes:
    """Encode one RGB picture `(height, width, 3)` with its parameters inside.

    `quality`: of JPEG and WebP, 0 (smallest) to 100 (best). PNG loses nothing and has none.
    """
    image = Image.fromarray(picture)
    out = io.BytesIO()
    if format == "png":
        info = PngImagePlugin.PngInfo()
        info.add_itxt(PNG_KEY, json.dumps(parameters, ensure_ascii=False))
        image.save(out, "PNG", pnginfo=info, compress_level=PNG_LEVEL)
    elif format == "jpeg":
        image.save(out, "JPEG", quality=quality, subsampling=0, exif=_exif(parameters))
    else:
        image.save(out, "WEBP", quality=quality, method=WEBP_METHOD, exif=_exif(parameters))
    return out.getvalue()


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
