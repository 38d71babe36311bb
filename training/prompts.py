"""Prompts, and their embeddings computed once.

    prompts = read_prompts(Path("prompts.txt"))
    table = embed_prompts(family, prompts.texts, torch.bfloat16)
    conditioning = table.rows(prompts.draw(rng, 32))

A list is a text file with one prompt a line, or JSON lines with `prompt` or `caption` and maybe `weight`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np
import torch
from numpy.typing import NDArray
from rich.progress import track
from torch import Tensor

from engines.families.base import Conditioning, Family
from training.errors import TrainingError

PROMPT_FIELDS = ("prompt", "caption")
SUFFIXES = (".txt", ".jsonl")


@dataclass(frozen=True)
class Prompts:
    """Distinct prompts and the probability of each."""

    texts: tuple[str, ...]
    cumulative: NDArray[np.float64]
    """Running sum of the probabilities; the last is 1."""

    @classmethod
    def of(cls, pairs: Iterable[tuple[str, float]], source: str) -> Self:
        """From (text, weight) pairs: weights of equal texts add up, none may be negative.

        Raises:
            TrainingError: no prompts, or weights that are no distribution; `source` is named.
        """
        weights: dict[str, float] = {}
        for text, weight in pairs:
            if not np.isfinite(weight) or weight < 0:
                raise TrainingError(
                    f"{source}: weight {weight} of {text!r}; a weight is a finite number of at least 0"
                )
            weights[text] = weights.get(text, 0.0) + weight
        if not weights:
            raise TrainingError(f"{source}: holds no prompts; put at least one in it")
        total = np.cumsum(list(weights.values()))
        if total[-1] <= 0:
            raise TrainingError(f"{source}: every weight is 0; give at least one prompt a positive weight")
        return cls(tuple(weights), total / total[-1])

    def draw(self, rng: np.random.Generator, count: int) -> NDArray[np.int64]:
        """Indices of `count` prompts, drawn with replacement by weight."""
        return np.searchsorted(self.cumulative, rng.random(count), side="right").astype(np.int64)

    def sha256(self) -> str:
        """Of texts and probabilities: another list is another run."""
        digest = hashlib.sha256(json.dumps(self.texts).encode())
        digest.update(np.round(self.cumulative, 12).tobytes())
        return digest.hexdigest()


def read_prompts(path: Path) -> Prompts:
    """Prompts from a `.txt` (one a line) or a `.jsonl` (objects with `prompt` or `caption`, and maybe `weight`).

    Raises:
        TrainingError: another kind of file, an unreadable one, or a line that is not as it should be.
    """
    if path.suffix not in SUFFIXES:
        raise TrainingError(f"{path} is no prompt list; a list ends in {' or '.join(SUFFIXES)}")
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise TrainingError(f"{path} cannot be read: {error}") from error
    numbered = [(number, line.strip()) for number, line in enumerate(lines, 1) if line.strip()]
    if path.suffix == ".txt":
        return Prompts.of(((line, 1.0) for _, line in numbered), str(path))
    return Prompts.of([_json_prompt(path, number, line) for number, line in numbered], str(path))


def _json_prompt(path: Path, number: int, line: str) -> tuple[str, float]:
    try:
        record = json.loads(line)
        text = next(record[field] for field in PROMPT_FIELDS if field in record)
        weight = float(record.get("weight", 1.0))
    except (ValueError, TypeError, AttributeError, StopIteration) as error:
        raise TrainingError(
            f"{path}:{number}: expected an object with {' or '.join(map(repr, PROMPT_FIELDS))} and maybe a 'weight'"
        ) from error
    if not isinstance(text, str):
        raise TrainingError(f"{path}:{number}: the prompt is {type(text).__name__}, expected text")
    return text, weight


@dataclass(frozen=True)
class EmbeddingTable:
    """Conditioning of every prompt, one row each, and that of the empty prompt."""

    tensors: Conditioning
    empty: Conditioning

    def rows(self, indices: NDArray[np.int64], device: torch.device | None = None) -> Conditioning:
        """Conditioning of prompts by index."""
        chosen = torch.from_numpy(indices)
        return {name: tensor[chosen].to(device) for name, tensor in self.tensors.items()}

    def unconditional(self, count: int, device: torch.device | None = None) -> Conditioning:
        """The empty prompt's conditioning, `count` times."""
        return {name: value.to(device).expand(count, *value.shape[1:]) for name, value in self.empty.items()}


def embed_prompts(
    family: Family, texts: Sequence[str], dtype: torch.dtype, limit_gb: float = 8.0, batch: int = 64
) -> EmbeddingTable:
    """Embeddings of all `texts`, kept in `dtype` in main memory. Shows its progress.

    Raises:
        TrainingError: they would take more than `limit_gb`.
    """
    empty = _encode(family, [""], dtype)
    each = sum(value.numel() * value.element_size() for value in empty.values())
    if each * len(texts) > limit_gb * 1e9:
        raise TrainingError(
            f"embeddings of {len(texts)} prompts take {each * len(texts) / 1e9:.1f} GB, the limit is {limit_gb:g} GB; "
            f"raise --max-embedding-gb, or give at most {int(limit_gb * 1e9 / each)} prompts"
        )
    tensors = {
        name: torch.empty((len(texts), *value.shape[1:]), dtype=dtype) for name, value in empty.items()
    }
    for start in track(range(0, len(texts), batch), description="embedding prompts"):
        for name, value in _encode(family, texts[start : start + batch], dtype).items():
            tensors[name][start : start + batch] = value
    return EmbeddingTable(tensors, empty)


def _encode(family: Family, texts: Sequence[str], dtype: torch.dtype) -> dict[str, Tensor]:
    return {name: value.to("cpu", dtype) for name, value in family.encode(texts).items()}
