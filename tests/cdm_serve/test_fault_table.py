"""`docs/faults.md` claims that each of its rows is proven: the tests that it names must be there."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
COLUMNS = 6
TEST = re.compile(r"`(test_\w+)`")


def rows() -> list[list[str]]:
    lines = (ROOT / "docs" / "faults.md").read_text(encoding="utf-8").splitlines()
    table = [line.strip("|").split("|") for line in lines if line.startswith("|")]
    return [[cell.strip() for cell in row] for row in table[2:]]


def test_every_fault_is_proven_by_tests_that_exist() -> None:
    sources = [path.read_text(encoding="utf-8") for path in (ROOT / "tests").rglob("test_*.py")]
    there = {
        name for source in sources for name in re.findall(r"^(?:async )?def (test_\w+)", source, re.MULTILINE)
    }
    assert len(rows()) >= 20
    for row in rows():
        assert len(row) == COLUMNS, row
        assert all(row), row
        named = TEST.findall(row[-1])
        assert named, row
        assert set(named) <= there, set(named) - there


def test_every_test_of_a_fault_is_in_the_table() -> None:
    named = {name for row in rows() for name in TEST.findall(row[-1])}
    for path in (ROOT / "tests" / "cdm_serve").glob("test_fault*.py"):
        if path != Path(__file__).resolve():
            source = path.read_text(encoding="utf-8")
            assert set(re.findall(r"^def (test_\w+)", source, re.MULTILINE)) <= named, path.name
