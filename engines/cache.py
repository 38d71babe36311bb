"""Compiled models on disk, found again only if nothing that shaped them has changed.

    cache = CompiledCache.open(cache_dir, "openvino", model=graph_hashes(bundle.manifest), version="2026.4.1", …)
    blob = cache.load("denoiser-1x8x16x16")       # bytes, or None: not there, or damaged
    cache.store("denoiser-1x8x16x16", blob)

A cache is never a reason to fail: what cannot be read or written is compiled anew, and the log says why.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from engines.bundle import Manifest, Precision
from engines.files import remove_abandoned, write_atomically

log = logging.getLogger("engines.cache")

_DIGEST_BYTES = 32


@dataclass(frozen=True)
class CompiledCache:
    """One folder per key; without a folder it holds nothing. Files are a SHA-256 of the rest, then the rest."""

    folder: Path | None

    @classmethod
    def open(
        cls, root: Path | None, runtime: str, **key: str | int | float | Sequence[str | int]
    ) -> CompiledCache:
        """The folder under `root` for exactly this key: everything that shapes what the compiler makes.

        That is the graphs and weights (`graph_hashes`), the runtime's version, device, precision, shapes and threads.
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

    def load(self, name: str) -> bytes | None:
        """What was stored as `name` (component and shapes), whole and unaltered, or None."""
        if self.folder is None:
            return None
        path = self.folder / f"{name}.blob"
        try:
            data = path.read_bytes()
        except FileNotFoundError:
            return None
        except OSError as error:
            log.warning("%s cannot be read, its model is compiled anew: %s", path, error.strerror or error)
            return None
        digest, body = data[:_DIGEST_BYTES], data[_DIGEST_BYTES:]
        if hashlib.sha256(body).digest() != digest:
            log.warning("%s is damaged, its model is compiled anew", path)
            return None
        return body

    def store(self, name: str, body: bytes) -> None:
        """Keep `body` as `name`; two servers that store the same name at once both leave a whole file."""
        if self.folder is not None:
            self._write(self.folder / f"{name}.blob", hashlib.sha256(body).digest() + body)

    @staticmethod
    def _write(path: Path, data: bytes) -> None:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(path, data)
        except OSError as error:
            log.warning(
                "%s could not be written (%s): the next start compiles again; make room there or choose another folder",
                path,
                error.strerror or error,
            )


def graph_hashes(manifest: Manifest, precision: Precision | None = None) -> list[str]:
    """Hashes of all graphs and weights, of one precision or of all: nothing else changes what is compiled."""
    return [
        graph.sha256
        for component in manifest.components.values()
        for name, graph in component.graphs.items()
        if precision in (None, name)
    ]
