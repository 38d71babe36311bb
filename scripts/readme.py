"""Write the tables of README.md and docs/settings.md anew (`make readme`): settings from their classes, figures from
benchmarks/results/ (`scripts/figures.py`).

In the README, what stands between `<!-- settings:module:Class -->` and `<!-- /settings -->` is what `settings_table`
says; docs/settings.md is made whole, one table per sub-command. `--check` only compares.
"""

from __future__ import annotations

import importlib
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
SETTINGS = ROOT / "docs" / "settings.md"
FIGURES = re.compile(r"(<!-- figures:(\w+) -->\n).*?(<!-- /figures -->)", re.DOTALL)
BLOCK = re.compile(r"(<!-- settings:([\w.]+):(\w+) -->\n).*?(<!-- /settings -->)", re.DOTALL)
GROUPS = {"cdm-train": "training.main", "cdm-bench": "benchmarks.main"}


def _table(module: str, name: str) -> str:
    sys.path.insert(0, str(ROOT))
    from engines.cli import settings_table

    return settings_table(getattr(importlib.import_module(module), name))


def rendered(text: str) -> str:
    """`text` with every settings table as the classes now are, and every figure as it was measured."""
    sys.path.insert(0, str(ROOT))
    from scripts.figures import TABLES

    def table(block: re.Match[str]) -> str:
        begin, module, name, end = block.groups()
        return f"{begin}{_table(module, name)}{end}"

    def figures(block: re.Match[str]) -> str:
        begin, name, end = block.groups()
        return f"{begin}{TABLES[name]()}{end}"

    return FIGURES.sub(figures, BLOCK.sub(table, text))


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
    wanted = {README: rendered(README.read_text(encoding="utf-8")), SETTINGS: settings_page()}
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
