"""Compiled models on disk, found again only if nothing that shaped them has changed.

    cache = CompiledCache.open(cache_dir, "openvino", model=graph_hashes(bundle.manifest), version="2026.4.1", …)
    cache.obtain("denoiser", read, build)         # read what is stored, or build and store it
    blob = cache.load("denoiser-1x8x16x16")       # bytes, or None: not there, or damaged
    cache.store("denoiser-1x8x16x16", blob)

A cache is never a reason to fail: what cannot be read or written is compiled anew, and the log says why.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from engines.bundle import Manifest, Precision
from engines.cache_lock import only_builder
from engines.files import remove_abandoned, sha256_files, write_atomically

log = logging.getLogger("engines.cache")

_DIGEST_BYTES = 32

Compiled = TypeVar("Compiled")
Stamp = tuple[int, int, int] | None
"""What tells a file from one written later under its name; None: there is none."""


@dataclass(frozen=True)
class CompiledCache:
    """One folder per key; without a folder it holds nothing. Files are a SHA-256 of the rest, then the rest."""

    folder: Path | None
    _unwritten: list[Path] = field(default_factory=list, compare=False)

    @classmethod
    def open(
        cls, root: Path | None, runtime: str, **key: str | int | float | Sequence[str | int]
    ) -> CompiledCache:
        """The folder under `root` for exactly this key: everything that shapes what the compiler makes.

        That is the graphs and weights (`graph_hashes`), precision, shapes (`shapes_of`), the runtime's version, the
        device and what it is capable of, threads, and the code here that turns a graph into what is compiled
        (`code_hash`).
        """
        if root is None:
            return cls(None)
        text = json.dumps({"runtime": runtime, **key}, sort_keys=True, indent=2)
        folder = root / f"{runtime}-{hashlib.sha256(text.encode()).hexdigest()[:16]}"
        remove_abandoned(folder)
        cache = cls(folder)
        if not (folder / "key.json").exists():  # a folder that came with a read-only image is used as it is
            cache._write(folder / "key.json", text.encode() + b"\n")
        return cache

    def obtain(
        self, name: str, read: Callable[[bytes], Compiled], build: Callable[[], tuple[Compiled, bytes]]
    ) -> Compiled:
        """What `read` makes of the bytes stored as `name`, or else what `build` gives, whose bytes are then stored.

        Where several processes want it at once, one builds and the others wait and read its result. What `read` raises
        is logged, and the model built anew; what `build` raises is the caller's.
        """
        seen = self._stamp(name)
        found = self._read(name, read)
        if found is None and self.folder is not None:
            with only_builder(self.folder, name):
                if self._stamp(name) != seen:  # written since, perhaps by the one that was waited for
                    found = self._read(name, read)
                return found[0] if found is not None else self._build(name, build)
        return found[0] if found is not None else self._build(name, build)

    def _read(self, name: str, read: Callable[[bytes], Compiled]) -> tuple[Compiled] | None:
        if (body := self.load(name)) is None:
            return None
        try:
            return (read(body),)
        except (
            Exception
        ) as error:  # whole, but not to this machine's liking; the runtimes' errors share no base
            log.warning("the stored %s cannot be used, it is compiled anew: %s", name, error)
            return None

    def _build(self, name: str, build: Callable[[], tuple[Compiled, bytes]]) -> Compiled:
        compiled, body = build()
        self.store(name, body)
        return compiled

    def _stamp(self, name: str) -> Stamp:
        if self.folder is None:
            return None
        try:
            stat = (self.folder / f"{name}.blob").stat()
        except OSError:
            return None
        return stat.st_ino, stat.st_size, stat.st_mtime_ns

    def load(self, name: str) -> bytes | None:
        """What was stored as `name` (component and shapes), whole and unaltered, or None."""
        if self.folder is None:
            return None
        path = self.folder / f"{name}.blob"
        try:
            with path.open("rb") as file:
                digest, body = file.read(_DIGEST_BYTES), file.read()
        except (FileNotFoundError, NotADirectoryError):  # storing tells of the latter
            return None
        except OSError as error:
            log.warning("%s cannot be read, its model is compiled anew: %s", path, error.strerror or error)
            return None
        if hashlib.sha256(body).digest() != digest:
            log.warning("%s is damaged, its model is compiled anew", path)
            return None
        return body

    def store(self, name: str, body: bytes) -> None:
        """Keep `body` as `name`; two servers that store the same name at once both leave a whole file."""
        if self.folder is not None:
            self._write(self.folder / f"{name}.blob", hashlib.sha256(body).digest(), body)

    def _write(self, path: Path, *parts: bytes) -> None:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(path, *parts)
        except OSError as error:
            if not self._unwritten:
                log.warning(
                    "%s could not be written (%s): the next start compiles again; make room there or choose another "
                    "folder",
                    path,
                    error.strerror or error,
                )
            else:
                log.info("%s could not be written either (%s)", path, error.strerror or error)
            self._unwritten.append(path)


def graph_hashes(manifest: Manifest, precision: Precision | None = None) -> list[str]:
    """Hashes of all graphs and weights, of one precision or of all."""
    return [
        graph.sha256
        for component in manifest.components.values()
        for name, graph in component.graphs.items()
        if precision in (None, name)
    ]


def shapes_of(manifest: Manifest) -> list[str]:
    """What fixes the dimensions that a graph leaves open: sizes, the default first, and the lengths of text."""
    sizes = dict.fromkeys((manifest.default_size, *manifest.sizes))
    lengths = sorted(manifest.text_lengths.items())
    return [
        *(f"{size.width}x{size.height}" for size in sizes),
        *(f"{name} {length}" for name, length in lengths),
    ]


def code_hash(*files: str) -> str:
    """Hash of modules (their `__file__`) of one folder: what they make of a graph may change as they do."""
    paths = [Path(file) for file in files]
    return sha256_files(paths[0].parent, paths)
