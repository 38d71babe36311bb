"""Pictures with captions to fine-tune on, and their latents.

    pictures = read_pictures(Path("my-pictures"))   # metadata.jsonl: {"file_name": "a.png", "text": "a red apple"}
    latents_NCHW = encode_pictures(family, pictures)

A folder is Hugging Face's `imagefolder` (`metadata.jsonl` beside or above the pictures), or a dataset folder of
`cdm-train emoji-data`. N pictures; latents are scaled ones, as `Family.decode` takes them.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from engines.families.base import Family
from engines.files import sha256_files
from training.errors import TrainingError
from training.prompts import Prompts

METADATA = "metadata.jsonl"
EMOJI = "dataset.json"


@dataclass(frozen=True)
class Pictures:
    """N captioned pictures; `read` gives one as RGB, whatever its size."""

    captions_N: tuple[str, ...]
    weights_N: NDArray[np.float64]
    """Probability of each."""
    read: Callable[[int], Image.Image]
    sha256: str
    """Of captions and files."""

    def prompts(self) -> Prompts:
        """Their captions; equal ones are one prompt."""
        return Prompts.of(
            zip(self.captions_N, self.weights_N.tolist(), strict=True), "the pictures' captions"
        )


def read_pictures(folder: Path) -> Pictures:
    """What `folder` holds; files are opened when they are read.

    Raises:
        TrainingError: no `metadata.jsonl`, a line that is not as it should be, an empty caption, a missing file.
    """
    if (folder / EMOJI).is_file():
        return _emoji(folder)
    path = folder / METADATA
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise TrainingError(
            f"{folder} has no readable {METADATA} ({error}); write one beside the pictures, a line each: "
            '{"file_name": "a.png", "text": "what is on it"}'
        ) from error
    pairs = [_line(path, number, line) for number, line in enumerate(lines, 1) if line.strip()]
    if not pairs:
        raise TrainingError(f"{path} names no pictures; add a line for each")
    names, captions = zip(*pairs, strict=True)
    files = [folder / name for name in names]

    def read(row: int) -> Image.Image:
        try:
            with Image.open(files[row]) as opened:
                # Transparent pixels have colours that nobody has seen: they become white.
                upright = ImageOps.exif_transpose(opened).convert("RGBA")
        except (OSError, UnidentifiedImageError, Image.DecompressionBombError, SyntaxError) as error:
            raise TrainingError(
                f"{files[row]} cannot be read as a picture ({error}); replace it, or take it out of {path}"
            ) from error
        ground = Image.new("RGBA", upright.size, "white")
        return Image.alpha_composite(ground, upright).convert("RGB")

    digest = sha256_files(folder, [path, *sorted(set(files))])
    return Pictures(captions, np.full(len(files), 1 / len(files)), read, digest)


def _line(path: Path, number: int, line: str) -> tuple[str, str]:
    try:
        record = json.loads(line)
        name, text = record["file_name"], record["text"]
    except (ValueError, TypeError, KeyError) as error:
        raise TrainingError(
            f"{path}:{number}: expected an object with 'file_name' and 'text', found {line[:80]!r}"
        ) from error
    if not isinstance(name, str) or not isinstance(text, str) or not text.strip():
        raise TrainingError(
            f"{path}:{number}: file_name {name!r} has the caption {text!r}; say in words what is on the picture"
        )
    if not (path.parent / name).is_file():
        raise TrainingError(
            f"{path}:{number}: there is no file {path.parent / name}; paths are relative to {path.parent}"
        )
    return name, text.strip()


def _emoji(folder: Path) -> Pictures:
    from training.emoji.dataset import EmojiDataset
    from training.emoji.fetch import DataError

    try:
        data = EmojiDataset.load(folder)
    except DataError as error:
        raise TrainingError(str(error)) from error
    rows = data.indices("train")
    captions = tuple(data.caption(data.records[row]) for row in rows)
    digest = hashlib.sha256(json.dumps([data.sha256(), captions]).encode()).hexdigest()
    weights_N = data.concept_weights(rows)
    return Pictures(
        captions, weights_N / weights_N.sum(), lambda row: Image.fromarray(data.images[rows[row]]), digest
    )


def square(picture: Image.Image, height: int, width: int) -> NDArray[np.uint8]:
    """Scaled and centre-cropped to `(height, width, 3)`."""
    fitted = ImageOps.fit(picture, (width, height), Image.Resampling.LANCZOS)
    return np.asarray(fitted, dtype=np.uint8)


@torch.no_grad()
def encode_pictures(
    family: Family, pictures: Pictures, rows: Sequence[int] | None = None, dtype: torch.dtype = torch.float32,
    batch: int = 16,
) -> Tensor:  # fmt: skip
    """Scaled latents `(N, C, H, W)` of all pictures, or of `rows`, in main memory: `Family.decode`'s inverse.

    Pictures are fitted to the family's size. Of a KL autoencoder's distribution the mode is taken.

    Raises:
        TrainingError: a picture cannot be read.
    """
    side = (family.latent_size[0] * family.downscale, family.latent_size[1] * family.downscale)
    first = next(family.vae.parameters())
    chosen = range(len(pictures.captions_N)) if rows is None else rows
    parts = []
    for at in range(0, len(chosen), batch):
        made = np.stack([square(pictures.read(row), *side) for row in chosen[at : at + batch]])
        inputs = torch.from_numpy(made).permute(0, 3, 1, 2).to(first.device).float() / 127.5 - 1
        encoded = family.vae.encode(inputs.to(first.dtype))  # type: ignore[operator]
        latents = encoded.latent_dist.mode() if hasattr(encoded, "latent_dist") else encoded.latents
        scaled = (latents.float() - family.shift_factor) * family.scaling_factor
        parts.append(scaled.to("cpu", dtype))
    return torch.cat(parts)
