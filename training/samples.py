"""`cdm-train samples`: the picture that shows what distillation does: fixed prompts × teacher and student step counts.

    cdm-train samples --teacher training/assets/teacher --student runs/student/model --out docs/samples.png

Every column starts from the same noise, so that a row differs by model and steps only. Prompts whose caption is in a
held-out split of the dataset are marked; which ones is looked up, not written down.
"""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from pydantic import Field

from engines.cli import CommandSettings
from engines.families.base import Family
from training.emoji.dataset import EmojiDataset
from training.evalset import SEEN_SPLIT
from training.evaluate import load_model
from training.prompts import read_prompts
from training.sampling import generate

PROMPTS = Path(__file__).parent / "assets" / "sample_prompts.txt"
LABEL, HEADER, GAP, LINE = 150, 40, 24, 16
"""Width of a row's label, height of the column titles, space between the blocks, line height; pixels."""


class SamplesSettings(CommandSettings, env_prefix="CDM_SAMPLES_"):
    """Draw a sheet of fixed prompts: teacher and student, side by side."""

    teacher: Path = Field(description="diffusers folder of the teacher")
    student: Path | None = Field(None, description="diffusers folder of the student; none: the teacher alone")
    teacher_steps: list[Annotated[int, Field(ge=1)]] = Field(
        [50, 4], min_length=1, description="step counts of the teacher, a column each"
    )
    student_steps: list[Annotated[int, Field(ge=1)]] = Field(
        [1, 2, 4], min_length=1, description="step counts of the student, a column each"
    )
    guidance: float = Field(4.0, ge=0, description="the teacher's guidance; other than 1 it doubles the NFE")
    prompts: Path | None = Field(None, description="prompt list (.txt or .jsonl); none: the one that ships")
    data: Path = Field(Path("data/emoji"), description="dataset folder: tells which prompts are held out")
    out: Path = Field(Path("docs/samples.png"), description="PNG of the whole sheet")
    row: Path | None = Field(None, description="PNG of one row: the last column's pictures of some prompts")
    row_count: int = Field(8, ge=1, description="pictures in that row")
    batch: int = Field(16, ge=1, description="pictures made at once")
    dtype: Literal["bfloat16", "float32"] = Field(
        "bfloat16", description="precision of transformer and autoencoder"
    )
    seed: int = Field(0, ge=0, le=1_000_000, description="prompt i starts from noise seed + i")
    threads: int = Field(1, ge=1, description="CPU threads")


@dataclass(frozen=True)
class Column:
    """One model at one step count, over all prompts."""

    title: str
    pictures_NHWC: NDArray[np.uint8]


def samples(settings: SamplesSettings) -> int:
    """Draw and write the sheet, and the row if asked for."""
    torch.set_num_threads(settings.threads)
    prompts = read_prompts(settings.prompts or PROMPTS).texts
    data = EmojiDataset.load(settings.data)
    held = held_out(data, prompts)
    columns = draw(load_model(settings.teacher, settings.dtype), "teacher", prompts, settings)
    if settings.student is not None:
        columns += draw(load_model(settings.student, settings.dtype), "student", prompts, settings)
    # Two blocks side by side, seen prompts left: a sheet of one block would be four times as tall as wide.
    order = sorted(range(len(prompts)), key=lambda position: held[position])
    blocks = [order[: (len(order) + 1) // 2], order[(len(order) + 1) // 2 :]]
    save(sheet(prompts, held, columns, [block for block in blocks if block]), settings.out)
    if settings.row is not None:
        chosen = np.linspace(0, len(order) - 1, min(settings.row_count, len(order))).round().astype(int)
        some = [order[position] for position in chosen]
        save(strip([prompts[position] for position in some], columns[-1].pictures_NHWC[some]), settings.row)
    return 0


def held_out(data: EmojiDataset, prompts: Sequence[str]) -> list[bool]:
    """Whether the picture that a prompt is the caption of was kept from training (unknown captions count as seen)."""
    trained = {data.caption(record) for record in data.records if record.split == SEEN_SPLIT}
    kept = {data.caption(record) for record in data.records if record.split != SEEN_SPLIT}
    return [prompt in kept and prompt not in trained for prompt in prompts]


def draw(family: Family, role: str, prompts: Sequence[str], settings: SamplesSettings) -> list[Column]:
    """One column per step count of `role` (`teacher` with guidance, `student` without)."""
    guidance = settings.guidance if role == "teacher" else 1.0
    columns = []
    for steps in settings.teacher_steps if role == "teacher" else settings.student_steps:
        seeds = [settings.seed + position for position in range(len(prompts))]
        pictures = generate(family, prompts, seeds, steps, guidance, settings.batch)
        nfe = steps * (1 if guidance == 1.0 else 2)
        title = f"{role}\n{steps} step{'s' if steps > 1 else ''}" + (f", {nfe} NFE" if nfe != steps else "")
        columns.append(Column(title, pictures))
    return columns


def sheet(
    prompts: Sequence[str], held: Sequence[bool], columns: Sequence[Column], blocks: Sequence[Sequence[int]]
) -> Image.Image:
    """Blocks of rows side by side; a row is a prompt, its label at the left, a picture per column."""
    height, width = columns[0].pictures_NHWC.shape[1:3]
    block_width = LABEL + width * len(columns)
    canvas = Image.new(
        "RGB",
        (block_width * len(blocks) + GAP * (len(blocks) - 1), HEADER + height * max(map(len, blocks))),
        "white",
    )
    pen = ImageDraw.Draw(canvas)
    for number, block in enumerate(blocks):
        left = number * (block_width + GAP)
        for place, column in enumerate(columns):
            x = left + LABEL + place * width
            pen.multiline_text(
                (x + width // 2, 2), column.title, "black", _font(14), anchor="ma", align="center", spacing=2
            )
            for line, position in enumerate(block):
                picture = Image.fromarray(column.pictures_NHWC[position])
                canvas.paste(picture, (x, HEADER + line * height))
        for line, position in enumerate(block):
            label = "\n".join(textwrap.wrap(prompts[position], 19))
            middle = HEADER + line * height + height // 2
            pen.multiline_text((left + 6, middle), label, "black", _font(13), anchor="lm", spacing=3)
            if held[position]:
                below = middle + (label.count("\n") + 1) * LINE // 2 + 10
                pen.text((left + 6, below), "held out", (190, 60, 20), _font(11), anchor="lm")
    return canvas


def strip(prompts: Sequence[str], pictures_NHWC: NDArray[np.uint8]) -> Image.Image:
    """Pictures in one row, each above its prompt."""
    height, width = pictures_NHWC.shape[1:3]
    labels = ["\n".join(textwrap.wrap(prompt, 18)) for prompt in prompts]
    below = max(label.count("\n") + 1 for label in labels) * LINE + 8
    canvas = Image.new("RGB", (width * len(prompts), height + below), "white")
    pen = ImageDraw.Draw(canvas)
    for place, (label, picture) in enumerate(zip(labels, pictures_NHWC, strict=True)):
        canvas.paste(Image.fromarray(picture), (place * width, 0))
        middle = place * width + width // 2
        pen.multiline_text(
            (middle, height + 4), label, "black", _font(12), anchor="ma", align="center", spacing=3
        )
    return canvas


def save(image: Image.Image, path: Path) -> None:
    """Write a PNG, making its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, optimize=True)
    print(f"{path}: {image.width} × {image.height}")


def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)  # Pillow's own: the same on every machine
