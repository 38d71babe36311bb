"""What docs/engines.md quotes was measured by the commands of `make figures-engines`; goals are judged by numbers."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from scripts import figures_engines
from scripts.figures_engines import RESULTS, differences, step_goals

MAKEFILE = (Path(__file__).resolve().parent.parent / "Makefile").read_text(encoding="utf-8")


def commands() -> dict[str, str]:
    """Result file → the command of the Makefile that writes it."""
    recipe = MAKEFILE.split("figures-engines:", 1)[1].split("\n\n", 1)[0].replace("\\\n", " ")
    found = {}
    for line in recipe.splitlines():
        if match := re.search(r"(.*)\| *tee \$\(RESULTS\)/(\S+)", line):
            found[match[2]] = match[1]
    return found


def flag(command: str, name: str) -> str | None:
    found = re.search(rf"--{name} (\S+)", command)
    return found[1] if found else None


@pytest.mark.parametrize("file", [name for name in commands() if (RESULTS / name).is_file()])
def test_results_are_of_the_commands_that_the_makefile_names(file: str) -> None:
    command, document = commands()[file], json.loads((RESULTS / file).read_text("utf-8").splitlines()[-1])
    rows: list[dict[str, Any]] = document["rows"]
    if (rounds := flag(command, "rounds")) and "n" in rows[0]:
        assert {row["n"] for row in rows} == {int(rounds)}
    if (batches := flag(command, "batches")) and "batch" in rows[0]:
        assert {row["batch"] for row in rows} == {int(batch) for batch in batches.split(",")}
    if prompts := flag(command, "prompts"):
        assert document["prompts"] == int(prompts)
    if (threads := flag(command, "threads")) and "threads" in document:
        assert document["threads"] == int(threads)
    if (contenders := flag(command, "contenders")) and "contender" in rows[0]:
        assert len({row["contender"] for row in rows}) == len(contenders.split(","))


def test_goals_are_judged_by_the_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [
        {"batch": 1, "contender": name, "step, to ours": ratio}
        for name, ratio in (("ours: x", 1.0), ("torch.compile bfloat16", 1.3), ("openvino genai bf16", 1.09))
    ]
    document = {"bundle": "tiny", "rows": rows, "max_difference": {"genai at 1": 0.5, "genai at 2": 1.25}}
    (tmp_path / "steps.txt").write_text("| table |\n" + json.dumps(document), encoding="utf-8")
    monkeypatch.setattr(figures_engines, "RESULTS", tmp_path)
    assert step_goals("steps.txt", "absent.txt").splitlines()[2:] == [
        "| tiny | 1 | 1.30, met |  | 1.09, missed |"
    ]
    assert differences("steps.txt") == "- tiny: genai 0.50 to 1.25\n"
