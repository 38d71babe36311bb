"""What CI says of tests that it could not run."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

LOG = """\
SKIPPED [1] tests/engines/kernels/test_launch.py:12: needs a GPU
{skipped}=========== 900 passed, 4 skipped in 600.00s ===========
"""
LACKS = (
    "Triton's Python backend lacks a library: libpython3.11.so.1.0 => not found (Debian: apt-get install …)"
)
SKIPPED = f"""\
SKIPPED [1] tests/engines/test_triton_recovery.py:43: {LACKS}
SKIPPED [2] tests/engines/test_triton_recovery.py:104: {LACKS}
SKIPPED [30] tests/engines/test_triton_server.py: {LACKS}
SKIPPED [1] tests/engines/test_triton_cuda.py:18: could not import 'cuda.bindings.runtime'
"""


def said(tmp_path: Path, skipped: str) -> str:
    """What `.ci/run` prints before pytest's closing line."""
    log = tmp_path / "log"
    log.write_text(LOG.format(skipped=skipped), encoding="utf-8")
    command = [sys.executable, str(ROOT / "scripts" / "skipped.py"), str(log)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def test_skipped_tests_of_the_real_triton_are_one_line_with_their_number_and_reasons(tmp_path: Path) -> None:
    assert said(tmp_path, SKIPPED) == (
        "NOTE: 34 tests of NVIDIA Triton Inference Server were SKIPPED, not passed: "
        f"{LACKS}; could not import 'cuda.bindings.runtime'\n"
    )
    assert "python3 scripts/skipped.py" in (ROOT / ".ci" / "run").read_text(encoding="utf-8")


def test_where_all_of_them_ran_nothing_is_said(tmp_path: Path) -> None:
    assert said(tmp_path, "") == ""
