"""What every test shares: no settings from the developer's own environment, one tiny model, exported once."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from engines.bundle import PROVENANCE, Bundle, Size, load_bundle

PROVENANCE_DOCUMENT = {
    "teacher": "tiny-teacher",
    "recipe": "tiny-cdm",
    "config_sha256": "ab" * 32,
    "steps_trained": 2,
    "metrics": {"alignment": 0.5},
    "licences": ["MIT"],
}


def pytest_configure() -> None:
    """With several workers (`make test`), each has cores of its own: threads of two on one core wait for each other."""
    if "PYTEST_XDIST_WORKER" in os.environ and hasattr(os, "sched_setaffinity"):
        number, count = (
            int(os.environ[f"PYTEST_XDIST_WORKER{name}"].removeprefix("gw")) for name in ("", "_COUNT")
        )
        cores = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, cores[number::count] or cores)


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """A `CDM_…` variable set in the shell must not change what a test sees."""
    for name in os.environ:
        if name.upper().startswith("CDM_"):
            monkeypatch.delenv(name)


@pytest.fixture(scope="session")
def tiny_student(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A diffusers folder of the real classes, with provenance."""
    from tests.tiny_sd3 import build_tiny_sd3  # torch, which most tests never need

    folder = build_tiny_sd3(tmp_path_factory.mktemp("student") / "tiny")
    (folder / PROVENANCE).write_text(json.dumps(PROVENANCE_DOCUMENT), encoding="utf-8")
    return folder


@pytest.fixture(scope="session")
def tiny_bundle(tiny_student: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """Two sizes, so that the latent's sides vary too; the second has an odd number of patches on both sides."""
    from engines.export.export import ExportOptions, export_bundle

    out = tmp_path_factory.mktemp("bundles") / "tiny"
    sizes = (Size(width=64, height=64), Size(width=80, height=48))
    export_bundle(tiny_student, out, ExportOptions(sizes=sizes, precisions=("float32", "bfloat16")))
    return load_bundle(out)
