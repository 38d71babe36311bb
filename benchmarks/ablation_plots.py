"""The ablation as one picture: scores over steps, and what training logged, each row the mean of its seeds.

plot(ladder, logs, Path("docs/ablation.png"))
"""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.plots import new_figure
from training.report.read import Curve, Log
from training.report.series import smooth

SCORES = {"frechet": "Fréchet distance", "alignment": "alignment", "diversity": "diversity"}
CURVES = {
    "x0_std": "standard deviation of x̂0",
    "dm_distance": "mean |x̂0 − teacher's x̂0| (DM)",
    "fake": "loss of the fake teacher",
}
"""What every objective logs of itself → title."""

Scores = Mapping[str, Mapping[int, Mapping[str, Sequence[float]]]]
"""Row → steps → score → a value per seed."""


def plot(ladder: Scores, logs: Mapping[str, Sequence[Log]], path: Path) -> None:
    """Write the picture as a PNG file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draw(ladder, logs).savefig(path, dpi=90)


def draw(ladder: Scores, logs: Mapping[str, Sequence[Log]]) -> Figure:
    """Scores over steps with all seeds between a band's edges; smoothed training curves."""
    figure = new_figure(13.5, 7.6)
    panels = figure.subplots(2, 3)
    colors = {row: f"C{number}" for number, row in enumerate(dict.fromkeys([*ladder, *logs]))}
    for axes, (score, title) in zip(panels[0], SCORES.items(), strict=True):
        for row, by_steps in ladder.items():
            _band(axes, {steps: each[score] for steps, each in by_steps.items()}, row, colors[row])
        axes.set(title=f"{title}, by steps", xlabel="steps")
    for axes, (key, title) in zip(panels[1], CURVES.items(), strict=True):
        for row, seeds in logs.items():
            mean = _mean([log.curves[key] for log in seeds if key in log.curves])
            if mean.steps:  # a row without DM has no distance of it
                axes.plot(mean.steps, smooth(mean.values), color=colors[row], label=row, linewidth=1)
        axes.set(title=title, xlabel="iteration")
    for axes in panels.flat:
        axes.grid(alpha=0.3)
        if axes.lines:
            axes.legend(fontsize=7)
    return figure


def _band(axes: Axes, values: Mapping[int, Sequence[float]], label: str, color: str) -> None:
    steps = sorted(values)
    axes.plot(steps, [statistics.mean(values[each]) for each in steps], marker="o", color=color, label=label)
    least, greatest = [min(values[each]) for each in steps], [max(values[each]) for each in steps]
    axes.fill_between(steps, least, greatest, color=color, alpha=0.15, linewidth=0)


def _mean(curves: Sequence[Curve]) -> Curve:
    """Mean over the seeds that logged an iteration."""
    values: dict[int, list[float]] = defaultdict(list)
    for curve in curves:
        for step, value in zip(curve.steps, curve.values, strict=True):
            values[step].append(value)
    steps = sorted(values)
    return Curve(steps, [statistics.mean(values[step]) for step in steps])


def scores(values: Sequence[Mapping[str, Any]]) -> Scores:
    """Lines of the ladder, each with `objective`, `schedule` and `values`, for `plot`; numbers of steps only."""
    found: dict[str, dict[int, Mapping[str, Sequence[float]]]] = {}
    for line in values:
        if line["schedule"].isdigit():
            found.setdefault(line["objective"], {})[int(line["schedule"])] = line["values"]
    return found
