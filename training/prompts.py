"""Prompts to train on, and how often each is drawn.

    prompts = read_prompts(Path("prompts.txt"))
    prompts = read_prompts([Path("captions.jsonl"), Path("laion-parts/")])
    indices = prompts.draw(rng, 32)

A list is a text file with one prompt a line, or JSON lines or a Parquet table with `prompt` or `caption` and maybe
`weight`; or a folder of such files.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from training.errors import TrainingError

PROMPT_FIELDS = ("prompt", "caption")
SUFFIXES = (".txt", ".jsonl", ".parquet")


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
            if reason := _bad_weight(weight, text):
                raise TrainingError(f"{source}: {reason}")
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


def read_prompts(paths: Path | Sequence[Path]) -> Prompts:
    """Prompts of files, or of all lists that lie in folders (in the order of their names; folders within are not
    looked into); weights of equal texts add up.

    `.txt`: one a line. `.jsonl`: objects with `prompt` or `caption`, and maybe `weight`. `.parquet`: such columns.
    Empty lines are skipped, and spaces around a text are no part of it.

    Raises:
        TrainingError: another kind of file, an unreadable one, or a line or row that is not as it should be.
    """
    given = [paths] if isinstance(paths, Path) else list(paths)
    files = [file for path in given for file in _files(path)]
    return Prompts.of((pair for file in files for pair in _read(file)), ", ".join(map(str, given)))


def _files(path: Path) -> list[Path]:
    found = sorted(file for file in path.iterdir() if _suffix(file) in SUFFIXES) if path.is_dir() else [path]
    if not found:
        raise TrainingError(f"{path} has no prompt lists in it; a list ends in {_or(SUFFIXES)}")
    return found


def _read(path: Path) -> Iterator[tuple[str, float]]:
    suffix = _suffix(path)
    if suffix not in SUFFIXES:
        raise TrainingError(f"{path} is no prompt list; a list ends in {_or(SUFFIXES)}")
    try:
        if suffix == ".parquet":
            yield from _parquet_prompts(path)
            return
        with path.open(encoding="utf-8-sig") as lines:  # with or without the mark that Windows puts first
            for number, line in enumerate(lines, 1):
                if line.strip():
                    yield (line.strip(), 1.0) if suffix == ".txt" else _json_prompt(path, number, line)
    except (OSError, UnicodeDecodeError) as error:
        raise TrainingError(f"{path} cannot be read: {error}") from error


def _suffix(path: Path) -> str:
    return path.suffix.lower()


def _json_prompt(path: Path, number: int, line: str) -> tuple[str, float]:
    try:
        record = json.loads(line)
        text = next(record[field] for field in PROMPT_FIELDS if field in record)
        weight = record.get("weight", 1.0)
    except (ValueError, TypeError, AttributeError, StopIteration) as error:
        raise TrainingError(
            f"{path}:{number}: expected an object with {_or(map(repr, PROMPT_FIELDS))} and maybe a 'weight'"
        ) from error
    return _pair(f"{path}:{number}", text, weight)


def _parquet_prompts(path: Path) -> Iterator[tuple[str, float]]:
    """Row group by row group: a table may be larger than main memory."""
    import pyarrow as arrow
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(path) as table:
            names = table.schema_arrow.names
            columns = [field for field in PROMPT_FIELDS if field in names][:1]
            if not columns:
                raise TrainingError(
                    f"{path} has no column {_or(map(repr, PROMPT_FIELDS))}, but {', '.join(names[:8])}"
                )
            weighted = [*columns, *(["weight"] if "weight" in names else [])]
            number = 0
            for group in table.iter_batches(columns=weighted):
                texts = group.column(columns[0]).to_pylist()
                weights = group.column("weight").to_pylist() if "weight" in names else [1.0] * len(texts)
                for text, weight in zip(texts, weights, strict=True):
                    number += 1
                    yield _pair(f"{path}, row {number}", text, weight)
    except arrow.ArrowException as error:
        raise TrainingError(f"{path} cannot be read: {error}") from error


def _pair(place: str, text: Any, weight: Any) -> tuple[str, float]:
    if not isinstance(text, str):
        raise TrainingError(f"{place}: the prompt is {type(text).__name__}, expected text")
    if not text.strip():
        raise TrainingError(f"{place}: the prompt is empty; leave it out")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise TrainingError(
            f"{place}: {text!r} is no text ({error.reason} at character {error.start}: half of a pair, as cut captions "
            "have); mend it or leave it out"
        ) from error
    if isinstance(weight, bool) or not isinstance(weight, int | float):
        raise TrainingError(f"{place}: weight {weight!r} of {text!r} is no number")
    if reason := _bad_weight(weight, text):
        raise TrainingError(f"{place}: {reason}")
    return text.strip(), float(weight)


def _bad_weight(weight: float, text: str) -> str:
    if np.isfinite(weight) and weight >= 0:
        return ""
    return f"weight {weight} of {text!r}; a weight is a finite number of at least 0"


def _or(names: Iterable[str]) -> str:
    *first, last = names
    return f"{', '.join(first)} or {last}"
