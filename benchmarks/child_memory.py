"""What memory a child process takes, from outside: its peak, and what of it is its own, phase by phase.

child = run_watched([sys.executable, "-m", "engines.export.main", …], phase_of)
child.peak_mb["stages"], child.own_mb["stages"], child.seconds
"""

from __future__ import annotations

import subprocess
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

INTERVAL_S = 0.02
MB = 1e6

Phase = Callable[[str], str]
"""A line that the child wrote to stderr → the phase that begins with it; empty: the same goes on."""


@dataclass
class Watched:
    """How a child process went. Megabytes are 10⁶ bytes."""

    phase: str
    code: int = 0
    seconds: float = 0.0
    peak_mb: dict[str, float] = field(default_factory=dict)
    """By phase, the kernel's high-water mark at its end (`VmHWM`, resident): mapped files and libraries count too."""
    own_mb: dict[str, float] = field(default_factory=dict)
    """By phase, the most that was the process's own (`Anonymous`), looked at every `INTERVAL_S`."""
    began_s: dict[str, float] = field(default_factory=dict)
    """By phase, seconds after the start."""
    output: str = ""
    """Standard output."""
    messages: list[str] = field(default_factory=list)
    """Lines of standard error."""


def run_watched(command: Sequence[str], phase_of: Phase, first: str) -> Watched:
    """Run `command` to its end. `first` is the phase that it starts in."""
    began = time.perf_counter()
    found = Watched(first, began_s={first: 0.0})
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    def read_messages() -> None:
        assert process.stderr is not None
        for line in process.stderr:
            found.messages.append(line.rstrip())
            if phase := phase_of(line):
                found.phase = phase
                found.began_s.setdefault(phase, time.perf_counter() - began)

    def watch() -> None:
        while process.poll() is None:
            _look(process.pid, found)
            time.sleep(INTERVAL_S)

    threads = [threading.Thread(target=target) for target in (read_messages, watch)]
    for thread in threads:
        thread.start()
    try:
        assert process.stdout is not None
        found.output = process.stdout.read()
        found.code = process.wait()
    except BaseException:
        process.kill()
        process.wait()
        raise
    finally:
        for thread in threads:
            thread.join()
        for pipe in (process.stdout, process.stderr):
            if pipe is not None:
                pipe.close()
    found.seconds = time.perf_counter() - began
    return found


def _look(pid: int, found: Watched) -> None:
    phase = found.phase
    for peaks, file, name in (
        (found.peak_mb, "status", "VmHWM"),
        (found.own_mb, "smaps_rollup", "Anonymous"),
    ):
        if kibibytes := _kibibytes(Path(f"/proc/{pid}/{file}"), name):
            peaks[phase] = max(peaks.get(phase, 0.0), kibibytes * 1024 / MB)


def _kibibytes(path: Path, name: str) -> int:
    """0 where the process has ended, or the system does not say."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in lines if line.startswith(f"{name}:")), 0)
