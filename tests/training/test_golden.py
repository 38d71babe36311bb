"""Every recipe's first 20 losses are what they were (`golden.py`)."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.folders import FOLDERS
from tests.training.golden import GOLDEN, STEPS, cases, first_losses

CASES = {name: (folder, config) for name, folder, config in cases()}


@pytest.fixture(scope="module")
def teachers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("teachers")
    return {name: FOLDERS[name](root / name) for name in {folder for folder, _ in CASES.values()}}


@pytest.mark.parametrize("name", CASES)
def test_the_first_losses_of_a_recipe_are_what_they_were(name, teachers):
    folder, config = CASES[name]
    wanted = json.loads(GOLDEN.read_text())[name]
    found = first_losses(teachers[folder], config)
    assert found.keys() == wanted.keys()
    assert max(map(len, found.values())) == STEPS
    for key, values in wanted.items():
        # Other processors round otherwise, and 20 steps of learning pass that on.
        assert found[key] == pytest.approx(values, rel=2e-3, abs=1e-5), key


def test_no_golden_loss_is_left_without_its_recipe():
    assert json.loads(GOLDEN.read_text()).keys() == CASES.keys()
