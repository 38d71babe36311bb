"""The measures of `cdm-bench finetune`: a domain made by a transform that undoes itself, its ground, and blur."""

from __future__ import annotations

import numpy as np

from benchmarks.finetune import dark_ground, sharpness, turned_over


def pictures() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (3, 16, 16, 3), dtype=np.uint8)


def test_turning_over_twice_gives_the_picture_back_and_keeps_its_chroma():
    made = pictures()
    over = turned_over(made)
    assert (turned_over(over) == made).all()
    assert (np.ptp(over, axis=-1) == np.ptp(made, axis=-1)).all()
    assert (over.argmax(-1) == made.argmax(-1)).all()
    assert (turned_over(np.full((1, 2, 2, 3), 255, np.uint8)) == 0).all()


def test_ground_is_dark_where_the_border_is():
    white = np.full((2, 16, 16, 3), 255, np.uint8)
    dark_middle = white.copy()
    dark_middle[:, 4:-4, 4:-4] = 0
    half = white.copy()
    half[0] = 10
    assert [dark_ground(each) for each in (white, dark_middle, half)] == [0.0, 0.0, 0.5]


def test_a_blurred_picture_is_less_sharp():
    made = pictures().astype(np.float32)
    soft = (made + np.roll(made, 1, 1) + np.roll(made, 1, 2)) / 3
    assert sharpness(soft) < 0.8 * sharpness(made)
