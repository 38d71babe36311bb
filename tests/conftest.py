"""What every test shares: no settings from the developer's own environment."""

from __future__ import annotations

import os

import pytest


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """A `CDM_…` variable set in the shell must not change what a test sees."""
    for name in os.environ:
        if name.upper().startswith("CDM_"):
            monkeypatch.delenv(name)
