"""A sweep's figures as PNG files: goodput, latency and steps over the offered rate, a line per variant.

plot_sweep(rows, Path("results"), "emoji on openvino bf16")      # results/goodput.png, latency.png, steps.png
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

Row = Mapping[str, Any]
RATE = "rate /s"


def plot_sweep(rows: Sequence[Row], folder: Path, title: str) -> list[Path]:
    """Draw `rows` (those that `summary` makes, each with `variant` and `rate /s`) into `folder`; the files."""
    folder.mkdir(parents=True, exist_ok=True)
    slos = [name for name in rows[0] if name.startswith("≤")]
    latencies = ["p50 ms", "p95 ms", "p99 ms"]
    return [
        _draw(rows, slos, folder / "goodput.png", title, "served in time, pictures/s", diagonal=True),
        _draw(rows, latencies, folder / "latency.png", title, "from the scheduled arrival, ms", log=True),
        _draw(rows, ["steps", "refused"], folder / "steps.png", title, ""),
    ]


def new_figure(width: float, height: float) -> Figure:
    """An empty figure of so many inches. Not pyplot's: that one keeps figures alive, and asks for a display."""
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _draw(
    rows: Sequence[Row],
    columns: Sequence[str],
    path: Path,
    title: str,
    label: str,
    *,
    log: bool = False,
    diagonal: bool = False,
) -> Path:
    figure = new_figure(4.5 * len(columns), 3.6)
    figure.suptitle(title, fontsize=10)
    for number, column in enumerate(columns, start=1):
        axes = figure.add_subplot(1, len(columns), number)
        _lines(axes, rows, column)
        axes.set(title=column, xlabel="offered, pictures/s", ylabel=label)
        if log:
            axes.set_yscale("log")
        if diagonal:  # what was offered: nothing can be above it
            most = max(float(row[RATE]) for row in rows)
            axes.plot([0, most], [0, most], color="0.8", linewidth=1, zorder=0)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    figure.savefig(path, dpi=120)
    return path


def _lines(axes: Axes, rows: Sequence[Row], column: str) -> None:
    for variant in dict.fromkeys(row["variant"] for row in rows):
        points = sorted(
            (row[RATE], row[column]) for row in rows if row["variant"] == variant and row[column] is not None
        )
        axes.plot([x for x, _ in points], [y for _, y in points], marker="o", label=variant)
