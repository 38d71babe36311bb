"""Write the tables of README.md and of docs/{settings,engines,planning,training,observability}.md anew (`make readme`).

Settings come from their classes, figures from benchmarks/results/ (`scripts/figures.py`, `scripts/figures_engines.py`).

In the README, what stands between `<!-- settings:module:Class -->` and `<!-- /settings -->` is what `settings_table`
says; docs/settings.md is made whole, one table per sub-command; docs/observability.md gets the metrics of
cdm_serve/metrics.py. `--check` only compares.
"""

from __future__ import annotations

import importlib
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
ENGINES = ROOT / "docs" / "engines.md"
PLANNING = ROOT / "docs" / "planning.md"
TRAINING = ROOT / "docs" / "training.md"
SETTINGS = ROOT / "docs" / "settings.md"
FIGURES = re.compile(r"(<!-- figures:(\w+) -->\n).*?(<!-- /figures -->)", re.DOTALL)
BLOCK = re.compile(r"(<!-- settings:([\w.]+):(\w+) -->\n).*?(<!-- /settings -->)", re.DOTALL)
OBSERVABILITY = ROOT / "docs" / "observability.md"
METRICS = re.compile(r"(<!-- metrics -->\n).*?(<!-- /metrics -->)", re.DOTALL)
GROUPS = {"cdm-train": "training.main", "cdm-bench": "benchmarks.main"}


def _table(module: str, name: str) -> str:
    sys.path.insert(0, str(ROOT))
    from engines.cli import settings_table

    return settings_table(getattr(importlib.import_module(module), name))


def rendered(text: str) -> str:
    """`text` with every settings table as the classes now are, and every figure as it was measured."""
    sys.path.insert(0, str(ROOT))
    from scripts.figures import TABLES
    from scripts.figures_engines import TABLES as ENGINE_TABLES

    def table(block: re.Match[str]) -> str:
        begin, module, name, end = block.groups()
        return f"{begin}{_table(module, name)}{end}"

    def figures(block: re.Match[str]) -> str:
        begin, name, end = block.groups()
        return f"{begin}{(TABLES | ENGINE_TABLES)[name]()}{end}"

    return FIGURES.sub(figures, BLOCK.sub(table, text))


def metrics_table() -> str:
    """Every metric with its labels, from `cdm_serve/metrics.py`; of process_… ones the client library tells."""
    sys.path.insert(0, str(ROOT))
    from prometheus_client.metrics import MetricWrapperBase

    from cdm_serve.metrics import Metrics

    found = [metric for metric in vars(Metrics()).values() if isinstance(metric, MetricWrapperBase)]
    lines = [
        f"| `{metric._name}{'_total' if metric._type == 'counter' else ''}` | {metric._type} | "
        f"{', '.join(f'`{label}`' for label in metric._labelnames)} | {metric._documentation} |\n"
        for metric in found
    ]
    return "| metric | kind | labels | |\n|---|---|---|---|\n" + "".join(lines)


def observability_page() -> str:
    """docs/observability.md with the metrics as they now are."""
    return METRICS.sub(
        lambda block: block[1] + metrics_table() + block[2], OBSERVABILITY.read_text(encoding="utf-8")
    )


def settings_page() -> str:
    """docs/settings.md: every sub-command of `cdm-train` and `cdm-bench`."""
    sys.path.insert(0, str(ROOT))
    parts = [
        "# Settings of every sub-command\n",
        "`make readme` writes this page; `cdm-serve` and `cdm-export` are in the README.\n",
    ]
    for prog, module in GROUPS.items():
        for name, command in importlib.import_module(module).COMMANDS.items():
            parts.append(f"## `{prog} {name}`\n\n{command.help[:1].upper()}{command.help[1:]}.\n")
            parts.append(_table(*command.settings.split(":")))
    return "\n".join(parts)


def main() -> int:
    """Exit code 1 when `--check` finds a difference."""
    wanted = {
        README: rendered(README.read_text(encoding="utf-8")),
        ENGINES: rendered(ENGINES.read_text(encoding="utf-8")),
        PLANNING: rendered(PLANNING.read_text(encoding="utf-8")),
        TRAINING: rendered(TRAINING.read_text(encoding="utf-8")),
        SETTINGS: settings_page(),
        OBSERVABILITY: observability_page(),
    }
    changed = {
        path: text for path, text in wanted.items() if not path.is_file() or path.read_text("utf-8") != text
    }
    if "--check" in sys.argv[1:]:
        return int(bool(changed))
    for path, text in changed.items():
        path.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
