"""What a user can get wrong in training.

TrainingError        base: bad input, another run's folder, a missing file
└── Diverged         a loss or a weight stopped being finite; the last good checkpoint is kept
    └── Collapsed    every number is finite, yet the watchdog sees the student failing
"""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError


class TrainingError(Exception):
    """A mistake the user can mend; the message says what was wrong, what is allowed and what to do."""


class Diverged(TrainingError):
    """A loss or gradient is not finite. Nothing of that step reaches a checkpoint."""


class Collapsed(Diverged):
    """The watchdog's limits are exceeded for longer than its patience; the message is its diagnosis."""


@contextmanager
def told_if_full(what: str, folder: Path) -> Iterator[None]:
    """Within the block a disk that fills up is a sentence.

    Raises:
        TrainingError: it did.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        if not disk_is_full(error):
            raise
        raise TrainingError(
            f"no space for {what} in {folder}; make room or use another disk, then run the same command again"
        ) from error


def disk_is_full(error: Exception) -> bool:
    """Whether that is what a failed write says; safetensors has no errno."""
    if isinstance(error, OSError):
        return error.errno in (errno.ENOSPC, errno.EDQUOT)
    return "os error 28" in str(error) or "os error 122" in str(error)
