"""What a user can get wrong in training.

TrainingError        base: bad input, another run's folder, a missing file
└── Diverged         a loss or a weight stopped being finite; the last good checkpoint is kept
    └── Collapsed    every number is finite, yet the watchdog sees the student failing
"""

from __future__ import annotations


class TrainingError(Exception):
    """A mistake the user can mend; the message says what was wrong, what is allowed and what to do."""


class Diverged(TrainingError):
    """A loss or gradient is not finite. Nothing of that step reaches a checkpoint."""


class Collapsed(Diverged):
    """The watchdog's limits are exceeded for longer than its patience; the message is its diagnosis."""
