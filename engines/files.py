"""Files and folders that are whole or not there: replaced in one step, named by their hash.

replace_folder(partial, target)                    # both in one parent folder
write_text_atomically(Path("config.json"), text)
write_atomically(Path("denoiser.blob"), data)
sha256_file(Path("model.onnx"))
"""

from __future__ import annotations

import contextlib
import glob
import hashlib
import os
import secrets
import shutil
import time
from collections.abc import Iterable
from pathlib import Path

PARTIAL = ".partial"
ABANDONED_S = 3600
"""Age from which a partial file is nobody's: whoever was writing it has been killed."""
ABANDONED_FOLDER_S = 86400


def replace_folder(partial: Path, target: Path) -> None:
    """Make the finished folder `partial` be `target`; what `target` was is deleted once the new one stands.

    Two renames: a kill leaves the old folder, the new one or, between the two, the old one as `.NAME.old` beside it,
    never half of either. Both must lie on one file system.
    """
    for path in (*partial.rglob("*"), partial):
        to_disk(path)
    old = target.with_name(f".{target.name}.old")
    if target.exists():
        shutil.rmtree(old, ignore_errors=True)
        target.rename(old)
        try:
            partial.rename(target)
        except OSError:
            old.rename(target)
            raise
    else:
        partial.rename(target)
    to_disk(target.parent)
    shutil.rmtree(old, ignore_errors=True)


def write_text_atomically(path: Path, text: str) -> None:
    """`write_atomically` of UTF-8 `text`."""
    write_atomically(path, text.encode())


def write_atomically(path: Path, *parts: bytes) -> None:
    """Write `parts` in a row: whoever reads `path` finds the old bytes or the new, whole, whenever this is killed.

    The partial file's name is drawn, so that several writers of one path, on several machines even, do not mix theirs.
    """
    partial = path.with_name(f".{path.name}.{secrets.token_hex(8)}{PARTIAL}")
    try:
        with partial.open("wb") as file:
            for part in parts:
                file.write(part)
        to_disk(partial)
        partial.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):  # what went wrong first is what is told
            partial.unlink()
        raise


def remove_abandoned(folder: Path) -> None:
    """Delete partial files that killed processes left in `folder` over an hour ago. Nothing to delete is no error."""
    with contextlib.suppress(OSError):
        for path in folder.glob(f".*{PARTIAL}"):
            with contextlib.suppress(OSError):
                if time.time() - path.stat().st_mtime > ABANDONED_S:
                    path.unlink()


def remove_abandoned_folders(target: Path) -> None:
    """Delete folders `.NAME-…` beside `target` (of that name) that killed processes left over a day ago.

    They are `tempfile.mkdtemp`'s; one that anything in it was written to since is somebody's.
    """
    for folder in target.parent.glob(f".{glob.escape(target.name)}-????????"):
        with contextlib.suppress(OSError):
            newest = max(path.stat().st_mtime for path in (folder, *folder.rglob("*")))
            if folder.is_dir() and time.time() - newest > ABANDONED_FOLDER_S:
                shutil.rmtree(folder, ignore_errors=True)


def link(source: Path, target: Path) -> None:
    """A hard link, or a copy where there can be none. The hub's cache has symbolic links, which are followed."""
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(source.resolve(), target)
    except OSError:
        shutil.copyfile(source, target)


def sha256_file(path: Path) -> str:
    """Hex SHA-256 of a file, read in blocks."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_files(root: Path, paths: Iterable[Path]) -> str:
    """Hex SHA-256 of files below `root`: of their names there and their bytes, whatever their order."""
    digest = hashlib.sha256()
    for path in sorted(paths):
        digest.update(f"{path.relative_to(root).as_posix()}\n{sha256_file(path)}\n".encode())
    return digest.hexdigest()


def to_disk(path: Path) -> None:
    """Have the bytes (of a folder: its names) on disk before a rename makes them count."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
