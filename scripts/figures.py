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
    lines = [
        ("teacher, 100 NFE, of real pictures'", teacher["alignment"] / real["alignment"], None, "≥ 80 %")
    ]
    for name, goal in (
        ("teacher, 4 steps", "the student's must be better"), ("student, 1 step", "≥ 85 %"), ("student, 2 steps", ""),
        ("student, 4 steps", "≥ 98 %, ≤ 100 %"), ("student, 8 steps", ""),
    ):  # fmt: skip
        row = _row(name)["scores"]["overall"]
        of = row["alignment"] / teacher["alignment"], row["frechet"] / teacher["frechet"]
        lines.append((f"{name}, of the teacher's at 100 NFE", *of, goal))
    cells = ([what, f"{of:.0%}", "" if far is None else f"{far:.0%}", goal] for what, of, far, goal in lines)
    return _table(("over all prompts", "alignment", "Fréchet", "goal"), cells)


def _steps(count: int) -> str:
    return "1 step" if count == 1 else f"{count} steps"


def engine() -> str:
    """One request through the bundle, diffusers and the teacher."""
    cells = []
    for row in _json_line("engine.txt")["rows"]:
        ours = row["contender"].startswith("bundle")
        at = _steps(int(row["to engine at"].split()[0]))
        cells.append([
            f"{row['contender']}, {_steps(row['steps'])}", str(row["NFE"]), f"{row['p50 ms']:.1f}",
            f"{row['p95 ms']:.1f}" if row["p95 ms"] else "", "" if ours else f"{row['ratio']:.1f}× the bundle at {at}",
        ])  # fmt: skip
    return _table(("", "NFE", "p50, ms", "p95, ms", "p50 ratio"), cells)


def parity() -> str:
    """Largest difference of a colour value between the bundle's picture and diffusers' (float32), of 255."""
    runs = [_json_line(name) for name in ("engine-f32.txt", "engine.txt")]
    header = ["largest difference from diffusers, of 255", *map(_steps, map(int, runs[0]["max_difference"]))]
    return _table(header, ([run["engine"], *map(str, run["max_difference"].values())] for run in runs))


def http() -> str:
    """Where the time of one `POST /generate` goes, alone and among others."""
    names = (
        "wall",
        "others",
        "encode",
        "denoise",
        "decode",
        "overhead",
        "of it image_encode",
        "without waiting",
    )
    return _table(
        ("p50, ms", "at once", *names),
        (
            [row["p50, ms"], str(row["concurrency"]), *(f"{row[name]:.1f}" for name in names)]
            for row in _json_line("http.txt")["rows"]
        ),
    )


def surface() -> str:
    """Requests a second beside a bare FastAPI route."""
    names = "requests/s", "of bare", "of bare, encoding", "server CPU, ms/request"
    return _table(
        ("", "format", *names),
        (
            [row["surface"], row["format"], *(f"{row[name]:.2f}" for name in names)]
            for row in _json_line("http.txt")["surface"]
        ),
    )


RUNS = {
    "serve.txt": "measured, 4 steps",
    "simulate-gpu.txt": "simulated, GPU-like costs, 4 steps",
    "simulate-gpu-mixed.txt": "simulated, GPU-like costs, 1 2 4 8 steps",
}
"""Result → what it is."""


def knees() -> str:
    """Up to which rate each policy keeps 95 % in time, and how ours compares with whole-request batching."""
    variants = ["none", "request", "step", "step+deadline", "step+auto"]
    cells = []
    for file, name in RUNS.items():
        found = _json_line(file)["knees"]
        for slo in found["request"]:
            base = found["request"][slo]
            ratios = [
                f"{found[variant][slo] / base:.2f}×" if base else "–"
                for variant in ("step", "step+deadline", "step+auto")
                if variant in found
            ]
            known = (f"{found[variant][slo]:.1f}" if variant in found else "" for variant in variants)
            cells.append([name, slo, *known, " / ".join(ratios)])
    header = ("pictures/s", "within", *variants, "step / +deadline / +auto over request")
    return _table(header, cells)


def curve() -> str:
    """What an engine call costs by its batch, as the server of the sweep measured it."""
    costs = _json_line("serve.txt")["costs"]
    batches = sorted({row["batch"] for row in costs})
    cells = []
    for stage in dict.fromkeys(row["stage"] for row in costs):
        of = {row["batch"]: row["seconds"] * 1e3 for row in costs if row["stage"] == stage}
        cells.append([stage, *(f"{of[batch]:.1f}" for batch in batches), f"{of[batches[-1]] / of[1]:.1f}×"])
    return _table(("ms, by batch", *map(str, batches), f"{batches[-1]} against 1"), cells)


def sweep() -> str:
    """Goodput and tail over the sweep of rates, measured."""
    rows = _json_line("serve.txt")["rows"]
    slos = [name for name in rows[0] if name.startswith("≤")]
    names = ["served", "refused", "failed", *slos, "p50 ms", "p95 ms", "p99 ms", "p99.9 ms", "steps", "batch"]

    def cell(value: float | int | None) -> str:
        return "" if value is None else str(value) if isinstance(value, int) else f"{value:.1f}"

    return _table(
        ("rate /s", "variant", *names),
        ([f"{row['rate /s']:.1f}", row["variant"], *(cell(row[name]) for name in names)] for row in rows),
    )


def invariance() -> str:
    """What byte-identical pictures cost."""
    rows = _json_line("invariance.txt")["rows"]
    names = list(dict.fromkeys(name for row in rows for name in row))
    return _table(names, ([str(row.get(name, "")) for name in names] for row in rows))


def coldstart() -> str:
    """From the start of the process to the first picture, and what an installation takes."""
    result = _json_line("coldstart.txt")
    cells = [[row["first picture, s"], f"{row['p50']:.2f} s", str(row["n"])] for row in result["rows"]]
    install = result["install"]
    cells.append(
        ["installation, without torch", f"{install['install seconds']:.1f} s, {install['MB']:.0f} MB", "1"]
    )
    return _table(("from `cdm-serve` to the first picture", "p50", "runs"), cells)


def plan() -> str:
    """What the planner predicts of small runs on the CPU, over what they took."""
    names = [
        "rollout, memory", "fake step, memory", "student step, memory", "time ratio",
        "rollout, time", "fake step, time", "student step, time",
    ]  # fmt: skip
    header = ["predicted / measured", "dtype", "M parameters", "peak, MB", "peak", *names]
    return _table(
        [name.replace("time ratio", "time") for name in header],
        (
            [
                row["run"],
                row["dtype"],
                f"{row['M parameters']:.1f}",
                f"{row['peak, MB']:.1f}",
                f"{row['ratio']:.3f}",
            ]
            + [f"{row[name]:.2f}" for name in names]
            for row in _json_line("plan.txt")["rows"]
        ),
    )


def plan_saved() -> str:
    """What a forward leaves in memory at full width, over what a plan says."""
    rows = _json_line("plan-blocks.txt")["rows"]
    return _table(rows[0], (["" if value is None else str(value) for value in row.values()] for row in rows))


TABLES: dict[str, Callable[[], str]] = {
    "quality": quality, "goals": goals, "engine": engine, "parity": parity, "http": http, "surface": surface,
    "knees": knees, "sweep": sweep, "curve": curve,
    "invariance": invariance,
    "coldstart": coldstart,
    "plan": plan, "plan_saved": plan_saved,
}  # fmt: skip
