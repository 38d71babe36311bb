"""Sample grids as data URIs, few and small enough for one file."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from training.report.read import RunData

MAX_WIDTH = 1600
"""Pixels; a wider sheet is shrunk, and kept as WebP, which is a tenth of its PNG."""


@dataclass(frozen=True)
class Grid:
    """One sheet: drawn after `step` iterations."""

    step: int
    uri: str
    width: int
    height: int


def chosen(count: int, most: int) -> list[int]:
    """Indices of at most `most` of `count` grids, evenly apart, first and last among them."""
    if count <= most:
        return list(range(count))
    if most == 1:
        return [count - 1]
    return sorted({round(index * (count - 1) / (most - 1)) for index in range(most)})


def load_grids(run: RunData, most: int) -> list[Grid]:
    """Grids over time; one that is damaged is left out, with a note in `run.notes`."""
    found = []
    for index in chosen(len(run.grids), most):
        step, path = run.grids[index]
        try:
            found.append(_load(step, path))
        except (OSError, ValueError, SyntaxError) as error:  # Pillow's words for a damaged PNG
            run.notes.append(f"samples/{path.name} could not be read ({error})")
    return found


def captions(run: RunData) -> Sequence[str]:
    """What the columns were asked for; none if that is not known."""
    listed = run.grid_info.get("columns")
    return [str(prompt) for prompt in listed] if isinstance(listed, list) else []


def rows(run: RunData) -> Sequence[str]:
    """What the rows are."""
    steps = run.grid_info.get("rows_are_steps")
    if not isinstance(steps, list):
        return []
    return [f"{count} step{'' if count == 1 else 's'}" for count in steps]


def _load(step: int, path: Path) -> Grid:
    data, kind = path.read_bytes(), "png"
    with Image.open(io.BytesIO(data)) as picture:
        picture.load()
        width, height = picture.size
        if width > MAX_WIDTH:
            height, width = round(height * MAX_WIDTH / width), MAX_WIDTH
            buffer, kind = io.BytesIO(), "webp"
            picture.convert("RGB").resize((width, height), Image.Resampling.LANCZOS).save(
                buffer, "WEBP", quality=90
            )
            data = buffer.getvalue()
    uri = f"data:image/{kind};base64,{base64.b64encode(data).decode()}"
    return Grid(step, uri, width, height)
