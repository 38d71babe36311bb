"""A dataset folder of coloured shapes in two styles, small enough for a test: `build_tiny_data(tmp_path / "data")`."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

COLOURS = {"red": (220, 30, 30), "green": (30, 160, 60), "blue": (40, 60, 220), "black": (10, 10, 10)}
SHAPES = ("circle", "square", "bar", "cross")
SIZE = 64


def draw(colour: tuple[int, int, int], shape: str, style: str) -> np.ndarray:
    """Style `outline` draws the edge only, `solid` fills."""
    image = Image.new("RGB", (SIZE, SIZE), "white")
    pen = ImageDraw.Draw(image)
    paint = {"fill": colour} if style == "solid" else {"outline": colour, "width": 4}
    if shape == "circle":
        pen.ellipse((12, 12, 52, 52), **paint)
    elif shape == "square":
        pen.rectangle((14, 14, 50, 50), **paint)
    elif shape == "bar":
        pen.rectangle((26, 6, 38, 58), **paint)
    else:
        pen.line((10, 10, 54, 54), fill=colour, width=8 if style == "solid" else 3)
        pen.line((10, 54, 54, 10), fill=colour, width=8 if style == "solid" else 3)
    return np.asarray(image)


def build_tiny_data(folder: Path) -> Path:
    """16 names × 2 styles; of every fourth name one style is held out, and the black ones' attributes whole."""
    folder.mkdir(parents=True, exist_ok=True)
    pictures, lines = [], []
    for colour, paint in COLOURS.items():
        for shape in SHAPES:
            for style in ("solid", "outline"):
                split = "train"
                if colour == "black" and shape in ("circle", "bar"):
                    split = "heldout_combination"
                elif style == "outline" and shape == "cross":
                    split = "heldout_pair"
                lines.append({
                    "index": len(lines), "set": "shapes", "style": style, "icon": f"{colour}-{shape}",
                    "name": f"{colour} {shape}", "concept": shape, "attributes": {"colour": colour},
                    "keywords": ["geometry", shape], "licence": "MIT", "attribution": "nobody", "split": split,
                })  # fmt: skip
                pictures.append(draw(paint, shape, style))
    np.save(folder / "images.npy", np.stack(pictures))
    (folder / "records.jsonl").write_text(
        "".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8"
    )
    (folder / "dataset.json").write_text(json.dumps({"format_version": 1, "sha256": {}}), encoding="utf-8")
    return folder
