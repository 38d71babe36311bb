"""Is it the picture that was asked for? Every load client decodes every one: rubbish that comes fast is no service."""

from __future__ import annotations

import io

import numpy as np
from numpy.typing import NDArray
from PIL import Image


def problem_with(data: bytes, width: int, height: int, format: str) -> str:
    """`no_picture`, `wrong_size` or `wrong_format`; empty where `data` decodes to what was asked for."""
    try:
        with Image.open(io.BytesIO(data)) as image:
            image.load()
            size, kind = image.size, (image.format or "").lower()
    except (OSError, SyntaxError, ValueError):  # Pillow's for what is no, or half, a picture
        return "no_picture"
    if size != (width, height):
        return "wrong_size"
    return "" if kind == format else "wrong_format"


def difference(a: NDArray[np.uint8], b: NDArray[np.uint8]) -> int:
    """The largest of a colour value between two pictures, of 255."""
    return int(np.abs(a.astype(np.int16) - b.astype(np.int16)).max())
