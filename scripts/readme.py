"""Write the README's settings tables anew from the settings classes (`make readme`); `--check` only compares.

Between `<!-- settings:module:Class -->` and `<!-- /settings -->` stands what `settings_table` says.
"""

from __future__ import annotations

import importlib
import re
import sys
from pathlib import Path

README = Path(__file__).resolve().parent.parent / "README.md"
BLOCK = re.compile(r"(<!-- settings:([\w.]+):(\w+) -->\n).*?(<!-- /settings -->)", re.DOTALL)


def rendered(text: str) -> str:
    """`text` with every settings table as the classes now are."""
    sys.path.insert(0, str(README.parent))
    from engines.cli import settings_table

    def table(block: re.Match[str]) -> str:
        begin, module, name, end = block.groups()
        return f"{begin}{settings_table(getattr(importlib.import_module(module), name))}{end}"

    return BLOCK.sub(table, text)


def main() -> int:
    """Exit code 1 when `--check` finds a difference."""
    old = README.read_text(encoding="utf-8")
    new = rendered(old)
    if "--check" in sys.argv[1:]:
        return int(old != new)
    README.write_text(new, encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
