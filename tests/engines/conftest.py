"""The tiny student and its bundle, under the names that engine tests use."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from engines.bundle import Bundle


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """Graphs this small run slower on more threads, and beside other tests much slower."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def student(tiny_student: Path) -> Path:
    return tiny_student


@pytest.fixture(scope="session")
def bundle(tiny_bundle: Bundle) -> Bundle:
    return tiny_bundle
