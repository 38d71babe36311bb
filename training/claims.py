"""Who is at what: processes that share a folder divide work among them, without knowing of each other.

    with locked(folder):                            # for the moment that looking and claiming takes
        mine = [key for key in wanted if key not in living(folder)][:100]
        claim = stack.enter_context(claimed(folder, mine))

A claim is a file locked by the kernel (`flock`) as long as its process lives: a killed one's is void, and is deleted by
whoever looks next. Where there are no such locks (another system, some network file systems) nobody sees another's
claims: work is done twice, and stays right.
"""

from __future__ import annotations

import os
import platform
import secrets
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from training.errors import TrainingError

fcntl: Any
try:
    import fcntl
except ImportError:  # not POSIX
    fcntl = None

LOCK = ".claiming"
CLAIM = ".claim"
KEY_BYTES = 32
RUNNING = ".running"
"""File in a run's folder, locked by the process that trains there."""


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """One process or thread at a time in the body, as far as `folder` can be locked."""
    descriptor = _lock(folder / LOCK, os.O_RDWR | os.O_CREAT)
    try:
        yield
    finally:
        if descriptor is not None:
            os.close(descriptor)


def living(folder: Path) -> set[bytes]:
    """Keys that others claim now; call it within `locked`."""
    keys: set[bytes] = set()
    for path in folder.glob(f".*{CLAIM}") if fcntl is not None else ():
        with suppress(OSError):  # it ended meanwhile
            descriptor = os.open(path, os.O_RDWR)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                path.unlink()
            except BlockingIOError:
                data = path.read_bytes()
                keys.update(data[at : at + KEY_BYTES] for at in range(0, len(data), KEY_BYTES))
            finally:
                os.close(descriptor)
    return keys


@contextmanager
def claimed(folder: Path, keys: Sequence[bytes]) -> Iterator[None]:
    """Claim `keys`, of `KEY_BYTES` each, for the body; enter it within `locked`."""
    path = folder / f".{secrets.token_hex(8)}{CLAIM}"
    descriptor = _lock(path, os.O_RDWR | os.O_CREAT | os.O_EXCL)
    try:
        if descriptor is not None:
            with suppress(OSError):  # a full disk: storing what was computed will tell
                os.write(descriptor, b"".join(keys))
        yield
    finally:
        if descriptor is not None:
            with suppress(OSError):
                path.unlink()
            os.close(descriptor)


def claim_folder(folder: Path) -> int | None:
    """Keep other processes out of `folder` as long as this one lives; the lock's descriptor, which stays open.

    A process may claim a folder again. None where there are no locks.

    Raises:
        TrainingError: another process has it.
    """
    if fcntl is None:
        return None
    path = folder / RUNNING
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError) as error:
        whose = os.read(descriptor, 100).decode(errors="replace").strip()
        os.close(descriptor)
        raise TrainingError(
            f"{folder} is being written by another process ({whose}); wait for it or stop it, or use another --out"
        ) from error
    except OSError:  # a file system without locks
        return descriptor
    os.ftruncate(descriptor, 0)
    os.write(descriptor, f"process {os.getpid()} on {platform.node()}\n".encode())
    return descriptor


def _lock(path: Path, flags: int) -> int | None:
    if fcntl is None:
        return None
    descriptor = None
    try:
        descriptor = os.open(path, flags, 0o666)
        fcntl.flock(descriptor, fcntl.LOCK_EX)
    except OSError:
        if descriptor is not None:
            os.close(descriptor)
        return None
    return descriptor
