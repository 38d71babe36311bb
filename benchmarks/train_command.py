"""`cdm-train` in a process of its own, for benchmarks that train."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping, Sequence

from engines.cli import UsageError


def cdm_train(command: Sequence[str], flags: Mapping[str, object]) -> None:
    """Run `cdm-train COMMAND --name value …` to its end.

    Raises:
        UsageError: it failed; with the end of what it printed.
    """
    given = [str(part) for name, value in flags.items() for part in (f"--{name}", value)]
    line = [sys.executable, "-m", "training.main", *command, *given]
    done = subprocess.run(line, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    if done.returncode:
        raise UsageError(f"{' '.join(line[2:])} ended with {done.returncode}: {done.stdout.strip()[-2000:]}")
