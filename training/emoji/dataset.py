"""The data set on disk, read.

data = EmojiDataset.load(Path("data/emoji"))
rows = data.indices("train")
row = rng.choice(rows, p=data.concept_weights(rows))
data.images[row], caption(data.records[row], rng)     # (128, 128, 3) uint8, "noto rocket"
"""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from training.emoji.fetch import DataError
from training.emoji.splits import SPLITS, Split

FORMAT_VERSION = 1


@dataclass(frozen=True)
class Record:
    """One picture: `index` is its row in `EmojiDataset.images`."""

    index: int
    set: str
    style: str
    icon: str
    name: str
    concept: str
    attributes: Mapping[str, str]
    keywords: tuple[str, ...]
    licence: str
    attribution: str
    split: Split


def caption(record: Record, rng: np.random.Generator | None = None) -> str:
    """ "noto rocket"; with a generator one of the wordings training should understand."""
    canonical = f"{record.style} {record.name}"
    if rng is None:
        return canonical
    draw = rng.random()
    if draw < 0.70:
        return canonical
    if draw < 0.85:
        return record.name
    if draw < 0.95:
        if not record.keywords:
            return canonical
        return f"{canonical} {record.keywords[rng.integers(len(record.keywords))]}"
    if len(record.keywords) < 2:
        return canonical
    count = min(int(rng.integers(2, 4)), len(record.keywords))
    chosen = rng.choice(len(record.keywords), size=count, replace=False)
    return " ".join([record.style, *(record.keywords[i] for i in chosen)])


@dataclass(frozen=True)
class EmojiDataset:
    images: NDArray[np.uint8]  # a memory map: rows are read when they are asked for
    records: tuple[Record, ...]
    info: Mapping[str, Any]  # dataset.json

    caption = staticmethod(caption)

    @classmethod
    def load(cls, path: Path) -> Self:
        info = read_info(path)
        try:
            images = np.load(path / "images.npy", mmap_mode="r")
            with (path / "records.jsonl").open(encoding="utf-8") as lines:
                records = tuple(_record(json.loads(line)) for line in lines)
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise DataError(f"{path}: cannot read the data set ({error}); {_REMEDY}") from error
        if images.dtype != np.uint8 or images.ndim != 4 or len(images) != len(records):
            raise DataError(
                f"{path}: images.npy is {images.dtype} {images.shape}, expected uint8 ({len(records)}, …); {_REMEDY}"
            )
        return cls(images, records, info)

    def sha256(self) -> str:
        """Of the files' hashes that dataset.json holds: equal data, equal hash, wherever the folder lies."""
        return hashlib.sha256(json.dumps(self.info.get("sha256", {}), sort_keys=True).encode()).hexdigest()

    def indices(self, split: Split) -> NDArray[np.int64]:
        if split not in SPLITS:
            raise DataError(f"split={split!r} is not one of {', '.join(SPLITS)}")
        return np.array([record.index for record in self.records if record.split == split], dtype=np.int64)

    def concept_weights(self, indices: Sequence[int] | NDArray[np.int64]) -> NDArray[np.float64]:
        """Probability of each of `indices`: uniform over concepts, then over a concept's names, then over a name's
        styles. Skin-tone and gender variants of people outnumber everything else otherwise."""
        tree: defaultdict[str, defaultdict[str, defaultdict[str, int]]] = defaultdict(
            lambda: defaultdict(lambda: defaultdict(int))
        )
        chosen = [self.records[int(index)] for index in indices]
        for record in chosen:
            tree[record.concept][record.name][record.style] += 1
        weights = np.empty(len(chosen), dtype=np.float64)
        for at, record in enumerate(chosen):
            names = tree[record.concept]
            styles = names[record.name]
            weights[at] = 1.0 / (len(tree) * len(names) * len(styles) * styles[record.style])
        return weights


_REMEDY = "build it again with `cdm-train emoji-data --force`"


def read_info(path: Path) -> dict[str, Any]:
    """dataset.json, checked for its version."""
    try:
        info: dict[str, Any] = json.loads((path / "dataset.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: no readable dataset.json ({error}); build the data set first") from error
    if info.get("format_version") != FORMAT_VERSION:
        raise DataError(
            f"{path}: format version {info.get('format_version')}, expected {FORMAT_VERSION}; {_REMEDY}"
        )
    return info


def _record(line: dict[str, Any]) -> Record:
    return Record(**{**line, "keywords": tuple(line["keywords"])})
