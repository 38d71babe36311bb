"""Prompt embeddings on disk, each computed once: by whichever run, process or machine comes to it first.

    cache = EmbeddingCache.of(teacher, torch.bfloat16, Path("runs/embeddings"))
    cache.missing(texts)                      # [] where no text encoder needs to be loaded

`FOLDER/<encoder key>/` holds `layout.json` (shape of a row, by name) and safetensors shards. A shard is named by the
hash of its texts and says which they are, so that lists that overlap share rows, in any order. It appears whole or not
at all. Who computes texts holds a claim on them (`training/claims.py`): others compute other texts meanwhile.

Rows are computed in batches of a list's order; another batch may round the last bit otherwise, so that lists that
share a cache may find values a rounding away from what they would have computed themselves.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from functools import lru_cache
from pathlib import Path
from typing import Self

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from engines.families.base import Conditioning
from engines.files import remove_abandoned, write_atomically
from training import claims
from training.encoder_key import encoder_key
from training.errors import TrainingError

log = logging.getLogger("training.embeddings")

LAYOUT = "layout.json"
TEXTS = "texts_sha256"
"""Name of the tensor `(rows, 32)` uint8 in a shard: whose rows these are."""

Layout = dict[str, list[int]]
"""Shape of one prompt's row, by name."""


class EmbeddingCache:
    """The embeddings of one set of text encoders in one dtype."""

    def __init__(self, folder: Path, dtype: torch.dtype) -> None:
        """Opens `folder`, and makes it if needed.

        Raises:
            TrainingError: it cannot be made.
        """
        self.folder, self.dtype = folder, dtype
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise TrainingError(
                f"no embeddings can be kept in {folder}: {error}; name another folder"
            ) from error
        remove_abandoned(folder)
        self._shards: dict[str, Conditioning] = {}
        self._places: dict[bytes, tuple[str, int]] = {}
        self._sound: set[str] = set()
        self._damaged: dict[str, str] = {}
        self._stamps: dict[str, tuple[int, int, int]] = {}

    @classmethod
    def of(cls, teacher: Path, dtype: torch.dtype, folder: Path) -> Self:
        """The part of `folder` for the text encoders of the diffusers folder `teacher`."""
        return cls(folder / encoder_key(teacher, dtype)[:32], dtype)

    def missing(self, texts: Sequence[str], rank: int = 0, world: int = 1) -> list[str]:
        """Those of `texts`, and of the empty prompt, that are to be computed, once each and in order.

        Damaged shards count as absent. Every number in use is read once to tell; processes share that reading, so
        with several each knows but its part, and they must agree (`Parallel.agree`) on whether to load encoders.
        """
        self._refresh()
        wanted = {_sha256(text): text for text in ("", *texts)}
        used = sorted({self._places[key][0] for key in wanted if key in self._places})
        for name in used[rank::world]:
            if name in self._sound or _finite(self._shards[name]):
                self._sound.add(name)
            else:
                self._drop(name, "holds NaN or infinity")
        return [text for key, text in wanted.items() if key not in self._places]

    def places(self, texts: Sequence[str]) -> tuple[list[Conditioning], list[tuple[int, int]]]:
        """Memory-mapped shards, and (shard, row) of each text; none may be missing."""
        found = [self._places[_sha256(text)] for text in texts]
        number = {name: index for index, name in enumerate(dict.fromkeys(name for name, _ in found))}
        return [self._shards[name] for name in number], [(number[name], row) for name, row in found]

    @property
    def layout(self) -> Layout | None:
        """Shape of one prompt's row, by name; None where nothing was computed yet, or the note of it is damaged."""
        try:
            layout: Layout = json.loads((self.folder / LAYOUT).read_text(encoding="utf-8"))
            return layout if all(isinstance(shape, list) for shape in layout.values()) else None
        except (OSError, ValueError, AttributeError):
            return None

    def repair(self, layout: Layout) -> None:
        """What the encoders really give is `layout`: note it, and delete shards that are damaged, saying so.

        Raises:
            TrainingError: the folder cannot be written.
        """
        with claims.locked(self.folder):
            if self.layout != layout:
                self._write(self.folder / LAYOUT, json.dumps(layout).encode())
                for name in list(self._damaged):  # they were held against another layout
                    self._forget(name)
            self._refresh()
            for name, reason in self._damaged.items():
                path = self.folder / name
                with suppress(OSError):
                    # Another process may have put a sound one in its place meanwhile.
                    if isinstance(found := self._read(path, layout), str) or not _finite(found[1]):
                        log.warning("%s %s: its prompts are embedded again", path, reason)
                        path.unlink()
        self._refresh()

    @contextmanager
    def claim(self, texts: Sequence[str], count: int) -> Iterator[list[str]]:
        """At most `count` of `texts` for this process to compute within the block; none if others are at all those."""
        with ExitStack() as held:
            with claims.locked(self.folder):
                self._refresh()
                taken = claims.living(self.folder)
                keys = [(text, _sha256(text)) for text in texts]
                free = [text for text, key in keys if key not in self._places and key not in taken]
                mine = free[:count]
                if mine:
                    held.enter_context(claims.claimed(self.folder, [_sha256(text) for text in mine]))
            yield mine

    def store(self, texts: Sequence[str], tensors: Conditioning) -> None:
        """Write a shard: row i of every tensor is that of `texts[i]`.

        Raises:
            TrainingError: a value is not finite, or the disk is full or cannot be written; no part of it stays.
        """
        for name, value in tensors.items():
            if not bool(torch.isfinite(value).all()):
                row = int((~torch.isfinite(value.flatten(1)).all(1)).nonzero()[0])
                raise TrainingError(
                    f"the text encoders give NaN or infinity for {texts[row]!r} ({name}, {self.dtype}); leave the "
                    "prompt out, or train in float32"
                )
        keys = b"".join(_sha256(text) for text in texts)
        listed = torch.frombuffer(bytearray(keys), dtype=torch.uint8).view(len(texts), 32)
        data = save({**{name: value.contiguous() for name, value in tensors.items()}, TEXTS: listed})
        self._write(self.folder / f"{hashlib.sha256(keys).hexdigest()[:32]}.safetensors", data)

    def _write(self, path: Path, data: bytes) -> None:
        try:
            write_atomically(path, data)
        except OSError as error:
            raise TrainingError(
                f"embeddings cannot be written to {self.folder} ({error}); make room or name another folder, and run "
                "the same command again: what is finished is kept"
            ) from error

    # what is there

    def _refresh(self) -> None:
        """Learn of shards written since, and of those deleted."""
        layout = self.layout
        names = {path.name for path in self.folder.glob("*.safetensors")} if layout else set()
        stamps = {name: stamp for name in names if (stamp := _stamp(self.folder / name))}
        for name in [name for name, stamp in self._stamps.items() if stamps.get(name) != stamp]:
            self._forget(name)  # deleted, or replaced
        for name in sorted(stamps.keys() - self._stamps.keys()):
            assert layout is not None
            found = self._read(self.folder / name, layout)
            self._stamps[name] = stamps[name]
            if isinstance(found, str):
                self._damaged[name] = found
                continue
            keys, self._shards[name] = found
            for row, key in enumerate(keys):
                self._places.setdefault(key, (name, row))

    def _read(self, path: Path, layout: Layout) -> tuple[list[bytes], Conditioning] | str:
        """Texts' hashes and memory-mapped rows of a shard, or what is wrong with it."""
        try:
            with safe_open(path, "pt") as file:
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (OSError, SafetensorError) as error:
            return f"cannot be read ({error})"
        listed = tensors.pop(TEXTS, torch.empty(0))
        wanted = {name: ([len(listed), *shape], self.dtype) for name, shape in layout.items()}
        held = {name: (list(value.shape), value.dtype) for name, value in tensors.items()}
        if listed.dtype != torch.uint8 or listed.shape[1:] != (32,) or held != wanted:
            return f"holds {held}, expected {wanted}"
        data = listed.numpy().tobytes()
        return [data[at : at + 32] for at in range(0, len(data), 32)], tensors

    def _drop(self, name: str, reason: str) -> None:
        stamp = self._stamps[name]
        self._forget(name)
        self._stamps[name], self._damaged[name] = stamp, reason

    def _forget(self, name: str) -> None:
        self._shards.pop(name, None)
        self._damaged.pop(name, None)
        del self._stamps[name]
        self._sound.discard(name)
        self._places = {key: place for key, place in self._places.items() if place[0] != name}


def _finite(tensors: Conditioning) -> bool:
    """In one pass without a copy: extremes show NaN and infinity."""
    return all(_extremes_finite(value) for value in tensors.values())


def _extremes_finite(value: Tensor) -> bool:
    return not value.numel() or bool(torch.isfinite(torch.stack(torch.aminmax(value))).all())


def _stamp(path: Path) -> tuple[int, int, int] | None:
    """Another one is another file, whatever its name; None where there is none."""
    with suppress(OSError):
        stat = path.stat()
        return stat.st_ino, stat.st_size, stat.st_mtime_ns
    return None


@lru_cache(maxsize=2**20)
def _sha256(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()
