"""Prompt embeddings for a distillation: computed once onto disk, read from there row by row.

    cache = EmbeddingCache.of(teacher, torch.bfloat16, Path("runs/embeddings"))
    table = embed_prompts(family, prompts.texts, cache)
    conditioning = table.rows(prompts.draw(rng, 32), device)

A table is memory-mapped: 100,000 prompts of 3.7 MB each take disk, and main memory only as far as it is free.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor

from engines.families.base import Conditioning, Family
from training.embedding_cache import EmbeddingCache
from training.errors import TrainingError

SHARD_ROWS = 1024
SHARD_BYTES = 256_000_000
"""A shard is full at either: what a kill can cost is one shard's work."""

BATCH = 64
POLL_S = 0.1


class EmbeddingTable:
    """Conditioning of every prompt, one row each, and that of the empty prompt."""

    def __init__(
        self, shards: Sequence[Conditioning], places: Sequence[tuple[int, int]], empty: Conditioning
    ) -> None:
        """Row i is row `places[i][1]` of `shards[places[i][0]]`; `empty` has one row."""
        self._shards = shards
        self._shard_P, self._row_P = np.array(places, dtype=np.int64).reshape(-1, 2).T
        self.empty = empty

    def rows(self, indices: NDArray[np.int64], device: torch.device | None = None) -> Conditioning:
        """Conditioning of prompts by index, in their order: new tensors on `device` (None: in main memory)."""
        shard_B, row_B = self._shard_P[indices], torch.from_numpy(self._row_P[indices])
        used = np.unique(shard_B)
        if len(used) == 1:
            return {name: value[row_B].to(device) for name, value in self._shards[used[0]].items()}
        rows = {name: value.new_empty((len(indices), *value.shape[1:])) for name, value in self.empty.items()}
        for number in used:
            where = torch.from_numpy(np.flatnonzero(shard_B == number))
            for name, value in self._shards[number].items():
                rows[name][where] = value[row_B[where]]
        return {name: value.to(device) for name, value in rows.items()}

    def unconditional(self, count: int, device: torch.device | None = None) -> Conditioning:
        """The empty prompt's conditioning, `count` times."""
        return {name: value.to(device).expand(count, *value.shape[1:]) for name, value in self.empty.items()}


def embed_in_memory(
    family: Family, texts: Sequence[str], dtype: torch.dtype, batch: int = BATCH
) -> EmbeddingTable:
    """A table of few prompts that is kept nowhere: for measurements, and families without files."""
    parts = [_encode(family, texts[at : at + batch], dtype) for at in range(0, len(texts), batch)]
    whole = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    return EmbeddingTable([whole], [(0, row) for row in range(len(texts))], _encode(family, [""], dtype))


def embed_prompts(
    family: Family,
    texts: Sequence[str],
    cache: EmbeddingCache,
    *,
    limit_gb: float = 1000.0,
    batch: int = BATCH,
    rank: int = 0,
    world: int = 1,
    barrier: Callable[[], None] = lambda: None,
) -> EmbeddingTable:
    """Embeddings of all `texts` and of the empty prompt: those that `cache` lacks are computed into it first.

    All processes of a run call it and divide what is missing among them, with other runs too. `family` needs its text
    encoders only where `cache.missing(texts)`. Rank 0 tells the size beforehand, and shows progress.

    Raises:
        TrainingError: all of them take more than `limit_gb` of disk, or the missing ones more than is free; the disk
            cannot be written; a value is not finite.
    """
    missing = cache.missing(texts, rank, world)
    barrier()  # nobody deletes a shard that another is reading
    if family.text_modules():
        first = _encode(family, [""], cache.dtype)
        layout = {name: list(value.shape[1:]) for name, value in first.items()}
        each = sum(value.numel() * value.element_size() for value in first.values())
        cache.repair(layout)
        barrier()
        missing = cache.missing(texts, rank, world)
        _require_room(cache, len(texts) + 1, len(missing), each, limit_gb)
        if missing:
            rows = max(1, min(SHARD_ROWS, SHARD_BYTES // each))
            _compute(family, missing, cache, rows, batch, each, shown=rank == 0)
    elif missing:
        raise TrainingError(
            f"{len(missing)} prompts are not embedded in {cache.folder} (the first is {missing[0]!r}), and the text "
            "encoders are not loaded; run the same command again"
        )
    barrier()
    missing = cache.missing(texts, rank, world)
    assert not missing, missing[:3]
    shards, places = cache.places(["", *texts])
    number, row = places[0]
    empty = {name: value[row : row + 1].clone() for name, value in shards[number].items()}
    return EmbeddingTable(shards, places[1:], empty)


def _compute(
    family: Family, texts: Sequence[str], cache: EmbeddingCache, rows: int, batch: int, each: int, shown: bool
) -> None:
    """Shard by shard, whatever nobody else is at; until none is missing."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, disable=not shown) as progress:
        if shown:
            progress.console.print(
                f"embedding {len(texts)} prompts: {len(texts) * each / 1e9:.2f} GB into {cache.folder}"
            )
        task = progress.add_task("embedding prompts", total=len(texts))
        left = list(texts)
        while left:
            with cache.claim(left, rows) as mine:
                parts: list[Conditioning] = []
                for at in range(0, len(mine), batch):
                    parts.append(_encode(family, mine[at : at + batch], cache.dtype))
                    progress.advance(task, len(mine[at : at + batch]))
                if mine:
                    cache.store(mine, {name: torch.cat([part[name] for part in parts]) for name in parts[0]})
            if not mine:  # others are at the rest
                time.sleep(POLL_S)
            lacking = set(cache.missing(left))
            left = [text for text in left if text in lacking]
            progress.update(task, completed=len(texts) - len(left))


def _require_room(cache: EmbeddingCache, rows: int, missing: int, each: int, limit_gb: float) -> None:
    if rows * each > limit_gb * 1e9:
        raise TrainingError(
            f"embeddings of {rows} prompts take {rows * each / 1e9:.1f} GB of disk, the limit is {limit_gb:g} GB; "
            f"raise --max-embedding-gb, or give at most {int(limit_gb * 1e9 / each)} prompts"
        )
    free = shutil.disk_usage(cache.folder).free
    if missing * each > free:
        raise TrainingError(
            f"embeddings of {missing} prompts take {missing * each / 1e9:.1f} GB, and {cache.folder} has "
            f"{free / 1e9:.1f} GB free; make room, name another folder, or give fewer prompts"
        )


def _encode(family: Family, texts: Sequence[str], dtype: torch.dtype) -> dict[str, Tensor]:
    return {name: value.to("cpu", dtype) for name, value in family.encode(texts).items()}
