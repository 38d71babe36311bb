"""One builder at a time: processes that want the same compiled model wait for the one that is building it.

with only_builder(folder, "denoiser"):
    …   # look again whether it is there, else build and store it

A lock is the kernel's (`flock`) on a file in the cache folder, so that it ends with whoever holds it, killed or not,
and the file left behind means nothing. Where there is no such lock (another system, some network file systems, a
folder that cannot be written) nobody waits: all build, and all store whole files.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

fcntl: Any
try:
    import fcntl
except ImportError:  # not POSIX
    fcntl = None

log = logging.getLogger("engines.cache")

LOCK = ".building"
"""Name of the file, one per folder: a folder's models are built one after the other anyway."""

PATIENCE_S = 3600.0
"""How long to wait for another's build: longer than any, for a process that hangs keeps its lock."""

POLL_S = 0.1


@contextmanager
def only_builder(folder: Path, name: str, patience_s: float = PATIENCE_S) -> Iterator[None]:
    """Run the body while no other process or thread runs it for `folder`; after `patience_s` run it all the same."""
    descriptor = _open(folder / LOCK)
    if descriptor is None:
        yield
        return
    try:
        _acquire(descriptor, folder, name, patience_s)
        yield
    finally:
        with suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_UN)  # not left to closing: a forked child has it open too
        os.close(descriptor)


def _open(path: Path) -> int | None:
    if fcntl is None:
        return None
    try:
        return os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    except OSError:  # what is built cannot be stored there either, and storing tells so
        return None


def _acquire(descriptor: int, folder: Path, name: str, patience_s: float) -> None:
    ends = time.monotonic() + patience_s
    told = False
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            pass
        except OSError:  # a file system without locks
            return
        if not told:
            log.info("another process is compiling for %s: waiting for its %s", folder, name)
            told = True
        if time.monotonic() >= ends:
            log.warning(
                "another process has been compiling for %s for over %g s: %s is compiled here too",
                folder,
                patience_s,
                name,
            )
            return
        time.sleep(POLL_S)
