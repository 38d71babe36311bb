"""Which tests of NVIDIA Triton Inference Server were skipped, by pytest's own log: CI is green without them.

python3 scripts/skipped.py LOG        # one line, or none where all of them ran
"""

from __future__ import annotations

import re
import sys
from collections import Counter
from pathlib import Path

SKIPPED = re.compile(r"^SKIPPED \[(\d+)\] \S*/test_triton\w*\.py(?::\d+)?: (.+)$", re.MULTILINE)
"""A line of pytest's summary (`-ra`): how many, where, why."""


def note(log: str) -> str:
    """What to say of a run that printed `log`; nothing if it skipped none of them."""
    reasons: Counter[str] = Counter()
    for count, reason in SKIPPED.findall(log):
        reasons[reason] += int(count)
    if not reasons:
        return ""
    told = "; ".join(reasons)
    return f"NOTE: {reasons.total()} tests of NVIDIA Triton Inference Server were SKIPPED, not passed: {told}"


if __name__ == "__main__":
    if line := note(Path(sys.argv[1]).read_text(encoding="utf-8", errors="replace")):
        print(line)
