"""A tiny student and its bundle, built and exported once for all engine tests."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from engines.bundle import Bundle, Size, load_bundle
from engines.export.export import PROVENANCE, ExportOptions, export_bundle
from tests.tiny_sd3 import build_tiny_sd3

PROVENANCE_DOCUMENT = {
    "teacher": "tiny-teacher",
    "recipe": "tiny-cdm",
    "config_sha256": "ab" * 32,
    "steps_trained": 2,
    "metrics": {"alignment": 0.5},
    "licences": ["MIT"],
}


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """Graphs this small run slower on more threads, and beside other tests much slower."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def student(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = build_tiny_sd3(tmp_path_factory.mktemp("student") / "tiny")
    (folder / PROVENANCE).write_text(json.dumps(PROVENANCE_DOCUMENT), encoding="utf-8")
    return folder


@pytest.fixture(scope="session")
def bundle(student: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """Two sizes, so that the latent's sides vary too; the second has an odd number of patches on both sides."""
    out = tmp_path_factory.mktemp("bundles") / "tiny"
    export_bundle(student, out, ExportOptions(sizes=(Size(width=64, height=64), Size(width=80, height=48))))
    return load_bundle(out)
