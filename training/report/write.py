"""`cdm-train report RUN`: one self-contained `report.html` of a run: what it was, what it did, what came out.

    cdm-train report runs/emoji-cdm
    cdm-train report runs/emoji-cdm --out shared/emoji.html --grids 8

Opens from disk, needs no network and no JavaScript, prints, and follows the reader's light or dark theme. It can be
written at any time: of a run in progress, of one that was killed, of one without pictures.
"""

from __future__ import annotations

import base64
import hashlib
import importlib.metadata
import time
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from pydantic import Field
from pydantic_settings import CliPositionalArg

from engines.cli import DISTRIBUTION, CommandSettings
from engines.files import write_text_atomically
from training.keys import GROUPS, LOSSES, THROUGHPUT, Key, key_info, reading_order
from training.report import chart, grids, tables
from training.report.read import REPORT, Curve, Event, RunData, read_run
from training.report.series import rates, smooth, span, working_seconds
from training.report.words import duration, moment, number, size

HERE = Path(__file__).parent
MARKED = 40
"""Most events drawn into the curves: more would hide them. All are listed."""


class ReportSettings(CommandSettings, env_prefix="CDM_REPORT_"):
    """Write one self-contained HTML page of a run: curves, pictures, tables, settings, environment."""

    run: CliPositionalArg[Path] = Field(description="run folder: the --out of a cdm-train recipe")
    out: Path | None = Field(None, description="file to write; none: RUN/report.html")
    grids: int = Field(24, ge=0, description="most sample grids to include, evenly over the run")


def report(settings: ReportSettings) -> int:
    """Write the page and say where."""
    print(write_report(settings.run, settings.out, settings.grids))
    return 0


def write_report(run: Path, out: Path | None = None, most_grids: int = 24) -> Path:
    """The page of the run folder `run`, written to `out` (none: `run/report.html`); its path.

    Raises:
        TrainingError: `run` is no run's folder.
    """
    data = read_run(run)
    path = out or run / REPORT
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text_atomically(path, render(data, most_grids))
    return path


def render(run: RunData, most_grids: int) -> str:
    """The page as text. Every value from the run is escaped by the template engine."""
    environment = Environment(
        loader=FileSystemLoader(HERE), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )  # fmt: skip
    script = (HERE / "page.js").read_text(encoding="utf-8")
    pictures = grids.load_grids(run, most_grids)
    settings, known = tables.settings_table(run)
    events = _events(run)
    return environment.get_template("page.html").render(
        title=run.folder.resolve().name,
        style=Markup((HERE / "page.css").read_text(encoding="utf-8")),
        script=Markup(script),
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        written=moment(time.time()),
        version=importlib.metadata.version(DISTRIBUTION),
        summary=_summary(run),
        grids=pictures,
        grids_of=len(run.grids),
        captions=grids.captions(run),
        grid_rows=grids.rows(run),
        evaluations=[tables.evaluation_table(evaluation) for evaluation in run.evaluations],
        groups=_groups(run, events),
        span=span(max((len(curve.values) for curve in run.log.curves.values()), default=0)),
        statistics=_statistics(run),
        chart=chart,
        events=events,
        settings=settings,
        recipe_known=known,
        recipe=tables.recipe_of(run),
        starts=run.starts,
        files=[(entry.name, entry.files, size(entry.bytes)) for entry in run.files],
        files_total=size(sum(entry.bytes for entry in run.files)),
        notes=run.notes,
        moment=moment,
        licences=[str(licence) for licence in run.provenance.get("licences") or ()],
    )


def _events(run: RunData) -> list[Event]:
    """Starts, kept checkpoints and what the log tells, in the order of iterations."""
    found = [
        Event(start["step"], "resume" if index else "start", "resumed" if index else "started", start["time"])
        for index, start in enumerate(run.starts)
    ]
    found += [Event(step, "checkpoint", "checkpoint kept") for step in run.checkpoints]
    return sorted([*found, *run.log.events], key=lambda event: (event.step, event.time or 0))


def _groups(run: RunData, events: list[Event]) -> list[tuple[Any, list[chart.Chart]]]:
    """Charts by group, in the groups' order."""
    marked = [event for event in events if event.kind != "start"][:MARKED]
    charts: dict[str, list[chart.Chart]] = {}
    last = max(run.log.done - 1, 1)
    for key in sorted(map(key_info, run.log.curves), key=reading_order):
        curve = run.log.curves[key.name]
        drawn = chart.draw(key, curve, marked, last, chart.reference_of(key, run.config))
        charts.setdefault(key.group.name, []).append(drawn)
    speed, axis = _speed(run)
    if speed.values:
        first = chart.draw(Key("", THROUGHPUT, "Speed", axis, ""), speed, marked, last)
        charts.setdefault(THROUGHPUT.name, []).insert(0, first)
    return [(group, charts[group.name]) for group in GROUPS if group.name in charts]


def _speed(run: RunData) -> tuple[Curve, str]:
    """Samples per second where the batch is known, else iterations per second; and which."""
    found = rates(run.log.times, [start["time"] for start in run.starts])
    batch = run.config.get("batch")
    if isinstance(batch, int):
        return Curve(found.steps, [value * batch for value in found.values]), "samples per second"
    return found, "iterations per second"


def _statistics(run: RunData) -> tables.Table:
    return tables.statistics_table(run.log.curves, sorted(map(key_info, run.log.curves), key=reading_order))


def _summary(run: RunData) -> dict[str, Any]:
    """What stands at the top."""
    log, times = run.log, run.log.times
    total = run.config.get("steps")
    total = total if isinstance(total, int) and total > 0 else None
    done = max([log.done, *run.checkpoints])
    seconds = working_seconds(times, [start["time"] for start in run.starts])
    batch = run.config.get("batch")
    facts = {
        "Recipe": tables.recipe_of(run),
        "Teacher": run.provenance.get("teacher") or run.config.get("teacher", ""),
        "Teacher sha256": run.config.get("teacher_sha256", ""),
        "Prompts": run.config.get("prompts", ""),
        "General prompts": run.config.get("general", ""),
        "Pictures": run.config.get("pictures", ""),
        "Student begun from": run.config.get("student", ""),
        "Began": moment(min([times.values[0], *(start["time"] for start in run.starts)]))
        if times.values
        else "",
        "Last logged": moment(times.values[-1]) if times.values else "",
        "Device": _device(run),
        "Config sha256": run.provenance.get("config_sha256", ""),
    }
    losses = [key for key in sorted(map(key_info, log.curves), key=reading_order) if key.group is LOSSES]
    per_second = log.done / seconds if seconds and log.done else None
    return {
        "done": number(done),
        "total": number(total) if total else "",
        "share": min(done / total, 1.0) if total else None,
        "complete": total is not None and done >= total,
        "seconds": duration(seconds) if seconds else "",
        "starts": len(run.starts),
        "iteration": f"{1 / per_second:.3g}" if per_second else "",
        "samples": number(round(per_second * batch, 2)) if per_second and isinstance(batch, int) else "",
        "losses": [(key, number(smooth(log.curves[key.name].values)[-1])) for key in losses],
        "best": tables.headline(run.evaluations),
        # Why it ended: unless it was resumed, and went past it.
        "stopped": [event for event in log.events if event.kind == "stop" and event.step >= log.done - 1],
        "facts": [(name, str(value)) for name, value in facts.items() if value],
    }


def _device(run: RunData) -> str:
    """Of the last start."""
    if not run.starts:
        return ""
    start = run.starts[-1]
    gpus = start.get("gpus") or []
    if str(start.get("device", "")).startswith("cuda") and gpus:
        return f"{start.get('processes', 1)} × {gpus[0].get('name')}, {gpus[0].get('memory_gib')} GiB"
    threads = start.get("threads", 1)
    return f"{start.get('cpu')}, {threads} thread{'' if threads == 1 else 's'}"
