"""What docs/load.md tells people to type is understood."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.main import main
from tests.benchmarks.test_locust import LOCUSTFILE
from tests.cdm_serve.test_main import ROOT, environment

LINES = [
    shlex.split(line, comments=True)
    for block in re.findall(
        r"```sh\n(.*?)```", (ROOT / "docs" / "load.md").read_text(encoding="utf-8"), re.DOTALL
    )
    for line in block.splitlines()
]
BENCH = [line[1:] for line in LINES if line[0] == "cdm-bench"]
LOCUST = [line[1:] for line in LINES if line[0] == "locust"]


def test_both_are_shown() -> None:
    assert BENCH
    assert LOCUST


@pytest.mark.parametrize("arguments", BENCH, ids=" ".join)
def test_bench_commands_are_understood(arguments: list[str]) -> None:
    assert main([*arguments, "--dry-run"]) == 0


@pytest.mark.parametrize("arguments", LOCUST, ids=" ".join)
def test_locust_commands_are_understood(arguments: list[str], tmp_path: Path) -> None:
    where = arguments.index("benchmarks/locustfile.py")
    arguments = [*arguments[:where], str(LOCUSTFILE), *arguments[where + 1 :]]
    if "--processes" in arguments:  # Locust would fork before it looks at the others
        arguments = _without(arguments, "--processes")
    command = [sys.executable, "-m", "locust", *arguments, "--list"]
    done = subprocess.run(
        command,
        cwd=tmp_path,
        env={**environment(), "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "OpenLoop" in done.stdout


def _without(arguments: list[str], flag: str) -> list[str]:
    where = arguments.index(flag)
    return [*arguments[:where], *arguments[where + 2 :]]
