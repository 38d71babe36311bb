"""Pictures keep their pixels and their parameters."""

from __future__ import annotations

import io

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from cdm_serve.images import encode_image, read_parameters
from cdm_serve.schemas import FORMATS, Format
from cdm_serve.settings import MAX_PROMPT_CHARS

RAMP = np.stack([np.add.outer(np.arange(48), np.arange(64)) * k for k in (1, 2, 0)], axis=-1).astype(np.uint8)


@pytest.mark.parametrize("format", FORMATS)
@given(prompt=st.text())
@settings(max_examples=30, deadline=None)
def test_any_prompt_is_read_back(format: Format, prompt: str) -> None:
    parameters = {"prompt": prompt, "seed": 2**63 - 1, "steps": 4}
    assert read_parameters(encode_image(RAMP, format, parameters)) == parameters


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("character", ["a", "é", "\U0001f600", '"'])
def test_longest_prompt_fits_every_format(format: Format, character: str) -> None:
    parameters = {"prompt": character * MAX_PROMPT_CHARS, "model": "m" * 128, "seed": 2**63 - 1}
    assert read_parameters(encode_image(RAMP, format, parameters)) == parameters


@pytest.mark.parametrize(("format", "tolerance"), [("png", 0.0), ("jpeg", 2.0), ("webp", 3.0)])
def test_pixels_survive(format: Format, tolerance: float) -> None:
    smooth = np.broadcast_to(np.linspace(0, 255, 64)[None, :, None], (48, 64, 3)).astype(np.uint8)
    with Image.open(io.BytesIO(encode_image(smooth, format, {}))) as image:
        assert image.format == format.upper()
        assert image.size == (64, 48)
        assert image.mode == "RGB"
        assert np.abs(np.asarray(image).astype(float) - smooth).mean() <= tolerance


def test_picture_without_parameters_is_told() -> None:
    out = io.BytesIO()
    Image.fromarray(RAMP).save(out, "JPEG")
    with pytest.raises(ValueError, match="no generation parameters"):
        read_parameters(out.getvalue())


def test_bytes_that_are_no_picture_are_told() -> None:
    with pytest.raises(ValueError, match="no picture"):
        read_parameters(b"hello")
