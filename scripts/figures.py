"""The README's tables of figures, from what the benchmarks wrote to benchmarks/results/ (`make readme`).

Between `<!-- figures:NAME -->` and `<!-- /figures -->` stands what `TABLES[NAME]` makes: no number is typed in.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).resolve().parent.parent / "benchmarks" / "results"

Row = dict[str, Any]


def _json_line(name: str) -> Any:
    """The last line of a benchmark's printed output."""
    return json.loads((RESULTS / name).read_text(encoding="utf-8").splitlines()[-1])


def _quality_rows() -> list[Row]:
    files = ("quality-teacher.json", "quality-student.json")
    return [row for file in files for row in json.loads((RESULTS / file).read_text(encoding="utf-8"))["rows"]]


def _table(header: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    names = list(header)
    lines = [names, ["---", *["--:"] * (len(names) - 1)], *map(list, rows)]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def _percent(scores: Row) -> str:
    return f"{scores['alignment']:.1%} ± {scores['alignment_error']:.1%}"


def _quality_cells(row: Row) -> list[str]:
    overall, seen, heldout = (row["scores"][group] for group in ("overall", "seen", "heldout"))
    spread = row.get("diversity")
    distances = [f"{scores['frechet']:.1f}" for scores in (overall, seen, heldout)]
    return [
        row["name"], str(row.get("nfe") or ""), _percent(seen), _percent(heldout), *distances,
        "" if spread is None else f"{spread:.3f}",
    ]  # fmt: skip


def quality() -> str:
    """Alignment, Fréchet distance and diversity of everything that `cdm-train evaluate` measured."""
    header = "pictures", "NFE", "alignment, seen", "held out", "Fréchet, all", "seen", "held out", "diversity"
    return _table(header, map(_quality_cells, _quality_rows()))


def _row(start: str) -> Row:
    return next(row for row in _quality_rows() if row["name"].startswith(start))


def goals() -> str:
    """What the student and the teacher reach of what was aimed at, over both halves of the prompts."""
    real, teacher = (_row(name)["scores"]["overall"] for name in ("real", "teacher, 50"))
    plain, student = (_row(name)["scores"]["overall"] for name in ("teacher, 4", "student, 4"))
    lines = [
        ("teacher, 100 NFE: alignment of real pictures'", teacher["alignment"] / real["alignment"], "≥ 80 %"),
        (
            "student, 4 steps: alignment of the teacher's",
            student["alignment"] / teacher["alignment"],
            "≥ 95 %",
        ),
        (
            "student, 4 steps: Fréchet distance of the teacher's",
            student["frechet"] / teacher["frechet"],
            "≤ 115 %",
        ),
        (
            "undistilled teacher, 4 steps: alignment of its 100 NFE",
            plain["alignment"] / teacher["alignment"],
            "below the student's",
        ),
        (
            "undistilled teacher, 4 steps: Fréchet of its 100 NFE",
            plain["frechet"] / teacher["frechet"],
            "above the student's",
        ),
    ]
    return _table(
        ("over all 400 prompts", "measured", "goal"), ((what, f"{of:.0%}", goal) for what, of, goal in lines)
    )


def engine() -> str:
    """One request through the bundle, diffusers and the teacher."""
    cells = []
    for row in _json_line("engine.txt")["rows"]:
        steps = "step" if row["steps"] == 1 else "steps"
        p95 = f"{row['p95 ms']:.1f}" if row.get("p95 ms") else ""
        ours = row["contender"].startswith("bundle")
        ratio = (
            ""
            if ours
            else f"{row['ratio']:.1f}× the bundle at {row['to engine at'].replace('1 steps', '1 step')}"
        )
        cells.append(
            [
                f"{row['contender']}, {row['steps']} {steps}",
                str(row["NFE"]),
                f"{row['p50 ms']:.1f}",
                p95,
                ratio,
            ]
        )
    return _table(("", "NFE", "p50, ms", "p95, ms", "p50 ratio"), cells)


def http() -> str:
    """Where the time of one `POST /generate` goes."""
    rows = _json_line("http.txt")["rows"]
    return _table(
        ("part of `POST /generate`", "p50, ms", "p95, ms"),
        ([row["part, ms"], f"{row['p50']:.1f}", f"{row['p95']:.1f}"] for row in rows),
    )


def coldstart() -> str:
    """From the start of the process to the first picture, and what an installation takes."""
    result = _json_line("coldstart.txt")
    cells = [[row["first picture, s"], f"{row['p50']:.2f} s", str(row["n"])] for row in result["rows"]]
    install = result["install"]
    cells.append(
        ["installation, without torch", f"{install['install seconds']:.1f} s, {install['MB']:.0f} MB", "1"]
    )
    return _table(("from `cdm-serve` to the first picture", "p50", "runs"), cells)


TABLES: dict[str, Callable[[], str]] = {
    "quality": quality, "goals": goals, "engine": engine, "http": http, "coldstart": coldstart
}  # fmt: skip
