"""Tables of a report: evaluations, settings beside their recipe's, statistics of the curves."""

from __future__ import annotations

import importlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from training.keys import Key
from training.report.read import Curve, Evaluation, RunData
from training.report.series import smooth
from training.report.words import number


@dataclass(frozen=True)
class Cell:
    """One value; `best` of its column, `text` rather than a number."""

    shown: str
    best: bool = False
    text: bool = False


@dataclass(frozen=True)
class Table:
    """A head and rows of cells, with what it depends on."""

    name: str
    head: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    note: str = ""


@dataclass(frozen=True)
class Column:
    """A measured number: where it stands in a row, how it is shown, which end is better (+1, −1, 0: neither)."""

    title: str
    path: tuple[str, ...]
    form: str
    better: int = 0
    error: tuple[str, ...] = ()


KNOWN = (
    Column("NFE", ("nfe",), "d"),
    Column(
        "alignment", ("scores", "overall", "alignment"), ".1%", 1, ("scores", "overall", "alignment_error")
    ),
    Column(
        "alignment, seen", ("scores", "seen", "alignment"), ".1%", 1, ("scores", "seen", "alignment_error")
    ),
    Column(
        "held out", ("scores", "heldout", "alignment"), ".1%", 1, ("scores", "heldout", "alignment_error")
    ),
    Column("Fréchet", ("scores", "overall", "frechet"), ".2f", -1),
    Column("Fréchet, seen", ("scores", "seen", "frechet"), ".2f", -1),
    Column("held out", ("scores", "heldout", "frechet"), ".2f", -1),
    Column("diversity", ("diversity",), ".3f", 1),
    Column("s/picture", ("seconds_per_picture",), ".3f"),
)
"""What `cdm-train evaluate` writes."""


def evaluation_table(evaluation: Evaluation) -> Table:
    """Known columns that a row has; of rows of another making every number, by its path."""
    rows = evaluation.result["rows"]
    columns: Sequence[Column] = [
        column for column in KNOWN if any(_at(row, column.path) is not None for row in rows)
    ]
    if not any(column.path[0] == "scores" for column in columns):
        paths = dict.fromkeys(path for row in rows for path in _numbers(row))
        columns = [Column(".".join(path), path, "g") for path in paths]
    best = {column: _best(rows, column) for column in columns if column.better}
    cells = [
        [Cell(str(row.get("name", "")), text=True)]
        + [_cell(row, column, best.get(column)) for column in columns]
        for row in rows
    ]
    told = ("model", "prompts", "reference", "choices", "seed", "dtype")
    note = ", ".join(f"{name} {evaluation.result[name]}" for name in told if name in evaluation.result)
    return Table(evaluation.name, ["pictures", *(column.title for column in columns)], cells, note)


def _at(row: Mapping[str, Any], path: Sequence[str]) -> float | None:
    value: Any = row
    for name in path:
        value = value.get(name) if isinstance(value, dict) else None
    number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    return value if number else None


def _numbers(row: Mapping[str, Any], above: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    found: list[tuple[str, ...]] = []
    for name, value in row.items():
        if isinstance(value, dict):
            found += _numbers(value, (*above, name))
        elif _at(row, (name,)) is not None:
            found.append((*above, name))
    return found


def _best(rows: Sequence[Mapping[str, Any]], column: Column) -> float | None:
    """Of generated rows: real pictures are no contender. None if they do not differ."""
    values = [value for row in rows if "nfe" in row and (value := _at(row, column.path)) is not None]
    if len(set(values)) < 2:
        return None
    return max(values) if column.better > 0 else min(values)


def _cell(row: Mapping[str, Any], column: Column, best: float | None) -> Cell:
    value = _at(row, column.path)
    if value is None:
        return Cell("")
    form = "g" if column.form == "d" and value != int(value) else column.form
    shown = format(int(value) if form == "d" else value, form).replace("-", "−")
    error = _at(row, column.error) if column.error else None
    if error is not None:
        shown += f" ± {error:{column.form}}"
    return Cell(shown, best is not None and value == best and "nfe" in row)


def headline(evaluations: Sequence[Evaluation]) -> dict[str, str] | None:
    """The measured row with the best alignment, for the top of the page; None if none has one."""
    rows = [row for evaluation in evaluations for row in evaluation.result["rows"] if "nfe" in row]
    measured = [(value, row) for row in rows if (value := _at(row, KNOWN[1].path)) is not None]
    if not measured:
        return None
    value, row = max(measured, key=lambda pair: pair[0])
    distance = _at(row, ("scores", "overall", "frechet"))
    also = f", Fréchet {distance:.2f}" if distance is not None else ""
    return {"value": f"{value:.1%}", "what": f"best alignment: {row.get('name', '')}{also}"}


@dataclass(frozen=True)
class Setting:
    """A setting of the run beside its recipe's default (None: the same, or not known)."""

    name: str
    value: str
    default: str | None
    meaning: str


def recipe_of(run: RunData) -> str:
    """The recipe's name, from the student or from how the run was started; empty if neither says."""
    named = run.provenance.get("recipe") or next((start.get("recipe") for start in reversed(run.starts)), "")
    return str(named or "")


def settings_table(run: RunData) -> tuple[list[Setting], bool]:
    """Every setting of `config.json`, and whether defaults of the run's recipe are known."""
    fields = _fields(recipe_of(run))
    found = []
    for name, value in run.config.items():
        default, info = None, fields.get(name)
        if info is not None and not info.is_required():
            expected = json.loads(json.dumps(info.get_default(call_default_factory=True), default=str))
            default = None if expected == value else _shown(expected)
        meaning = (info.description or "") if info is not None else ""
        found.append(Setting(name, _shown(value), default, meaning))
    return found, bool(fields)


def _fields(recipe: str) -> Mapping[str, Any]:
    from training.main import COMMANDS  # not above: it names every command, this report's too

    # "emoji_cdm dmd2" is a variant of the recipe that the command emoji-cdm runs.
    command = COMMANDS.get(recipe.partition(" ")[0].replace("_", "-"))
    if command is None:
        return {}
    module, _, name = command.settings.partition(":")
    fields: Mapping[str, Any] = getattr(importlib.import_module(module), name).model_fields
    return fields


def _shown(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def statistics_table(curves: Mapping[str, Curve], keys: Sequence[Key]) -> Table:
    """Every logged number: how often, where it began and ended (smoothed), its extremes and where."""
    rows = []
    for key in keys:
        curve = curves[key.name]
        line = smooth(curve.values)
        low, high = min(curve.values), max(curve.values)
        at_low, at_high = (curve.steps[curve.values.index(value)] for value in (low, high))
        rows.append([
            Cell(key.name, text=True), Cell(number(len(curve.values))), Cell(number(line[0])), Cell(number(line[-1])),
            Cell(f"{number(low)} at {at_low}"), Cell(f"{number(high)} at {at_high}"),
        ])  # fmt: skip
    return Table("", ["logged as", "values", "begins", "ends", "least", "greatest"], rows)
