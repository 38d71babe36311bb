from __future__ import annotations

import numpy as np
import pytest

from training.emoji.fetch import DataError, Icon
from training.emoji.render import render

pytest.importorskip("resvg_py")

BLACK = '<rect x="{x}" y="{y}" width="{w}" height="{h}"/>'


def icon(x: float, y: float, width: float, height: float) -> Icon:
    """An icon that is black all over its viewBox."""
    return Icon("noto", "test", BLACK.format(x=x, y=y, w=width, h=height), x, y, width, height)


def test_a_square_icon_fills_the_picture() -> None:
    pixels = render(icon(0, 0, 32, 32), 16)
    assert pixels.dtype == np.uint8
    assert pixels.shape == (16, 16, 3)
    assert not pixels.any()


def test_a_wide_icon_is_centred_on_white_not_stretched() -> None:
    pixels = render(icon(0, 0, 32, 16), 16)
    assert (pixels[:4] == 255).all()
    assert not pixels[4:12].any()
    assert (pixels[12:] == 255).all()


def test_the_view_box_may_start_anywhere() -> None:
    pixels = render(icon(-10, 5, 16, 32), 16)
    assert (pixels[:, :4] == 255).all()
    assert not pixels[:, 4:12].any()


def test_torn_svg_names_set_and_icon() -> None:
    with pytest.raises(DataError, match="noto:torn: resvg cannot read this SVG"):
        render(Icon("noto", "torn", "<path d=", 0, 0, 8, 8), 16)
