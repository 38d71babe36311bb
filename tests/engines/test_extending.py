"""The worked examples of docs/extending.md are whole: each block is saved, each line registered, and used."""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
import sys
from pathlib import Path

import pytest

import engines.base
import engines.families.base
from cdm_serve.settings import ServeSettings
from engines.base import EngineOptions, load_engine
from engines.bundle import Bundle, load_bundle
from engines.errors import RuntimeUnavailable
from engines.export.export import ExportOptions, export_bundle
from tests.engines.pictures import Job, draw, worst

DOCUMENT = (Path(__file__).resolve().parents[2] / "docs" / "extending.md").read_text(encoding="utf-8")


def block(kind: str) -> str:
    """The one block of the document that is marked `kind`."""
    (found,) = re.findall(rf"```python {kind}\n(.*?)```", DOCUMENT, re.DOTALL)
    return found


def install(kind: str, table: dict[str, str], folder: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Save the block as the module that its line names, put the line into `table`, and return its key."""
    (key, target), *rest = json.loads("{" + block(f"{kind}-line").strip().rstrip(",") + "}").items()
    assert not rest
    module_name = target.split(":")[0]
    path = folder / f"{kind}.py"
    path.write_text(block(kind), encoding="utf-8")
    spec = importlib.util.spec_from_file_location(module_name, path)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    assert spec.loader is not None
    spec.loader.exec_module(module)
    monkeypatch.setitem(sys.modules, module_name, module)
    monkeypatch.setitem(table, key, target)
    return key


def test_runtime_of_the_document_draws_what_the_others_draw(
    bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = install("runtime", engines.base.RUNTIMES, tmp_path, monkeypatch)
    engine = load_engine(bundle, ServeSettings(engine=name).engine_options())
    reference = load_engine(bundle, EngineOptions("onnxruntime", threads=1))
    jobs = [Job("red apple", 1, 2), Job("green face", 2, 1)]
    assert worst(draw(engine, jobs), draw(reference, jobs)) <= 1
    with pytest.raises(RuntimeUnavailable, match="precision='bf16': the reference has only f32"):
        load_engine(bundle, EngineOptions(name, "bf16"))


def test_family_of_the_document_is_exported_and_held_to_the_documents_runtime(
    student: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runtime = install("runtime", engines.base.RUNTIMES, tmp_path, monkeypatch)
    pipeline = install("family", engines.families.base.FAMILIES, tmp_path, monkeypatch)
    fork = shutil.copytree(student, tmp_path / "fork")
    index = json.loads((fork / "model_index.json").read_text(encoding="utf-8"))
    (fork / "model_index.json").write_text(json.dumps({**index, "_class_name": pipeline}), encoding="utf-8")
    export_bundle(fork, tmp_path / "bundle", ExportOptions(runtimes=(runtime,), batches=(1,)))
    manifest = load_bundle(tmp_path / "bundle").manifest
    assert manifest.family == "anchored"
    assert manifest.sigmas(4) == (1.0, 0.9, 0.75, 0.5, 0.0)
    assert manifest.sigmas(2) == (1.0, 0.9, 0.0)
    assert manifest.sigmas(6) == (1.0, 0.9, 0.75, 0.5, 0.25, 0.125, 0.0)
    assert {parity.runtime for parity in manifest.components["denoiser"].parity} == {
        "onnxruntime",
        "reference",
    }
    assert [picture.runtime for picture in manifest.pictures] == ["reference"]
