"""Costs survive a restart, and a damaged file is no reason to fail."""

from __future__ import annotations

from pathlib import Path

import pytest

from cdm_serve.cost_cache import read_costs, write_costs
from cdm_serve.costs import TEXT, CostModel


def test_what_was_measured_is_there_again(tmp_path: Path) -> None:
    measured = CostModel()
    for batch in (1, 4):
        measured.record("encode", TEXT, batch, 0.1 * batch)
        measured.record("denoise", (128, 64), batch, 0.2 * batch)
        measured.record("decode", (128, 64), batch, 0.3)
    path = tmp_path / "folder" / "costs.json"
    write_costs(path, measured)
    again = CostModel()
    assert read_costs(path, again) == 6
    assert again.rows() == measured.rows()


@pytest.mark.parametrize(
    "text",
    [
     # whole JSON, but nothing that was ever measured
     "[" * 100_000, '[["encode", [], 1, 1' + "0" * 400 + "]]", '[["encode", [], true, 0.1]]',
     '[["encode", [8, 8], 1, 0.1]]', '[["denoise", [8], 1, 0.1]]', '[["denoise", [8, 0], 1, 0.1]]',
     '[["denoise", [8, 8], 100000, 0.1]]', '[["decode", "ab", 1, 0.1]]', '[["encode", [], 1, "1"]]', "[null]",
     "", "nonsense", "{}]", "[1]", '[["paint", [], 1, 0.1]]', '[["encode", [], 0, 0.1]]',
     '[["encode", [], 1, -1]]', '[["encode", [], 1, NaN]]', '[["decode", ["x"], 1, 0.1]]', "7"],
)  # fmt: skip
def test_damaged_file_is_measured_anew(tmp_path: Path, text: str) -> None:
    path = tmp_path / "costs.json"
    path.write_text(text, encoding="utf-8")
    costs = CostModel()
    assert read_costs(path, costs) == 0
    assert costs.rows() == []
    assert read_costs(tmp_path / "none.json", costs) == 0


def test_full_or_forbidden_disk_stops_nobody(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").write_text("", encoding="utf-8")
    write_costs(tmp_path / "file" / "costs.json", CostModel())  # its folder cannot be made
    assert "could not be written" in caplog.text


def test_bytes_that_are_no_text_are_measured_anew(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "costs.json"
    path.write_bytes(b"\xff\xfe\0")
    assert read_costs(path, CostModel()) == 0
    assert "is not used" in caplog.text
