"""A tiny model, a tiny dataset and a briefly trained evaluator, built once for all training tests."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.tiny_sd3 import build_tiny_sd3
from tests.training.tiny_data import build_tiny_data
from training.emoji.evaluator import EvaluatorSettings, train


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """Models this small run slower on more threads, and beside other tests much slower."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_sd3(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_data(tmp_path_factory.mktemp("data") / "shapes")


@pytest.fixture(scope="session")
def evaluator_run(tmp_path_factory: pytest.TempPathFactory, tiny_data: Path) -> Path:
    out = tmp_path_factory.mktemp("evaluator") / "run"
    train(EvaluatorSettings(data=tiny_data, out=out, steps=70, batch=12, lr=1e-3))
    return out


@pytest.fixture(scope="session")
def tiny_evaluator(evaluator_run: Path) -> Path:
    return evaluator_run / "model"
