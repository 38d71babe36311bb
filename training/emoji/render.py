"""SVG → RGB picture: an icon body is wrapped in a square, white, 128×128 canvas and drawn by resvg.

pixels = render(Icon("noto", "rocket", body, left=0, top=0, width=128, height=128), size=128)
"""

from __future__ import annotations

import io
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from training.emoji.fetch import DataError

if TYPE_CHECKING:
    from training.emoji.fetch import Icon


def svg_document(icon: Icon) -> str:
    """A square document whose viewBox grows on the short side, so that the drawing is centred, never stretched."""
    side = max(icon.width, icon.height)
    left = icon.left - (side - icon.width) / 2
    top = icon.top - (side - icon.height) / 2
    return (
        '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'width="{side:g}" height="{side:g}" viewBox="{left:g} {top:g} {side:g} {side:g}">{icon.body}</svg>'
    )


def render(icon: Icon, size: int) -> NDArray[np.uint8]:
    """(size, size, 3) uint8 on white. No system fonts: text in an SVG must not depend on the machine."""
    import resvg_py  # the `train` extra; importing a caption helper must not need it

    try:
        png = resvg_py.svg_to_bytes(
            svg_string=svg_document(icon),
            background="#ffffff",
            width=size,
            height=size,
            skip_system_fonts=True,
        )
        with Image.open(io.BytesIO(bytes(png))) as picture:
            pixels = np.asarray(picture.convert("RGB"), dtype=np.uint8)
    except (ValueError, OSError) as error:
        raise DataError(
            f"{icon.set}:{icon.name}: resvg cannot read this SVG ({error}); "
            f"leave the set out with --sets or clear the cache folder and fetch again"
        ) from error
    if pixels.shape != (size, size, 3):
        raise DataError(f"{icon.set}:{icon.name}: rendered to {pixels.shape}, expected ({size}, {size}, 3)")
    return pixels
