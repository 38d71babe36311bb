"""A process's vital signs over time, read from Linux's /proc: memory, open files, threads, processor time.

vitals = Vitals(process.pid)
vitals.sample()                                      # once a second
vitals.growth(window_s=300)                          # {"first MB": …, "last MB": …, "MB per hour": …}
"""

from __future__ import annotations

import csv
import os
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

MB = 1e6
PAIRS = 2000
"""Points at most whose pairs make a slope: their number is its square."""


@dataclass(frozen=True, slots=True)
class Sign:
    """One sample: seconds since the first, resident memory in MB, open files, threads, processor seconds so far."""

    at: float
    rss_mb: float
    files: int
    threads: int
    cpu_s: float


class Vitals:
    """Samples of one process."""

    def __init__(self, pid: int) -> None:
        self.signs: list[Sign] = []
        self._folder = Path("/proc", str(pid))
        self._began = time.monotonic()

    def sample(self) -> None:
        """Read everything now, and keep it. Raises `OSError` if the process has ended."""
        self.signs.append(self.read())

    def read(self) -> Sign:
        """Read everything now."""
        status = dict(
            line.split(":", 1)
            for line in (self._folder / "status").read_text("utf-8").splitlines()
            if ":" in line
        )
        return Sign(
            at=time.monotonic() - self._began,
            rss_mb=int(status["VmRSS"].split()[0]) * 1024 / MB,
            files=len(os.listdir(self._folder / "fd")),
            threads=int(status["Threads"]),
            cpu_s=cpu_seconds(self._folder),
        )

    def growth(self, window_s: float) -> dict[str, float]:
        """Medians of memory over the first and the last `window_s` seconds, its maximum, and its slope after the first.

        The slope is Theil and Sen's, the median of all pairs' slopes: no burst and no single jump can make it.
        """
        at = np.array([sign.at for sign in self.signs])
        rss = np.array([sign.rss_mb for sign in self.signs])
        later = at > at[0] + window_s
        first, last = rss[at <= at[0] + window_s], rss[at >= at[-1] - window_s]
        return {
            "first MB": round(float(np.median(first)), 2),
            "last MB": round(float(np.median(last)), 2),
            "most MB": round(float(rss.max()), 2),
            "MB per hour": round(slope(at[later], rss[later]) * 3600, 2),
        }

    def write(self, folder: Path, title: str) -> None:
        """`vitals.csv`, and `vitals.png` that shows it."""
        with (folder / "vitals.csv").open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, list(asdict(self.signs[0])))
            writer.writeheader()
            writer.writerows(asdict(sign) for sign in self.signs)
        figure = Figure(figsize=(12, 3.6), layout="constrained")
        FigureCanvasAgg(figure)
        figure.suptitle(title, fontsize=10)
        at = [sign.at / 60 for sign in self.signs]
        columns = {
            "resident memory, MB": [sign.rss_mb for sign in self.signs],
            "open files": [float(sign.files) for sign in self.signs],
            "threads": [float(sign.threads) for sign in self.signs],
        }
        for number, (name, values) in enumerate(columns.items(), start=1):
            axes = figure.add_subplot(1, len(columns), number)
            axes.plot(at, values, linewidth=0.8)
            axes.set(title=name, xlabel="minutes")
            axes.set_ylim(0, max(values) * 1.1)
            axes.grid(alpha=0.3)
        figure.savefig(folder / "vitals.png", dpi=120)


def slope(x: np.ndarray, y: np.ndarray) -> float:
    """Theil and Sen's: the median slope of all pairs of points (of at most `PAIRS` points, evenly taken)."""
    step = max(1, len(x) // PAIRS)
    x, y = x[::step], y[::step]
    before, after = np.triu_indices(len(x), k=1)
    across = x[after] - x[before]
    return float(np.median((y[after] - y[before])[across > 0] / across[across > 0])) if len(x) > 1 else 0.0


def cpu_seconds(process: Path) -> float:
    """Processor time, user's and system's, that `/proc/PID` says was used so far."""
    # The second field is the name in brackets, which may have spaces; utime and stime are the 14th and 15th.
    fields = (process / "stat").read_text("utf-8").rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
