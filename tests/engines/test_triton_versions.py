"""Versions of a model that stand beside each other in a Triton repository, under one configuration."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from engines.bundle import Bundle, Manifest, file_ref, load_bundle, write_manifest
from engines.errors import ExportError
from engines.triton_repository.config import weights_key
from engines.triton_repository.repository import write_repository
from engines.triton_repository.settings import RepositorySettings
from tests.engines.triton_bundle import COMPONENTS, WEIGHTS, known_bundle, read_config, tree


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    return known_bundle(tmp_path / "bundle")


def test_a_new_version_replaces_the_old_or_stands_beside_it(bundle: Bundle, tmp_path: Path) -> None:
    out = tmp_path / "out"
    write_repository(bundle, out, RepositorySettings())
    key = weights_key(bundle.manifest.components["denoiser"])
    (bundle.root / "denoiser.onnx").unlink()  # a link to it is in the repository
    (bundle.root / "denoiser.onnx").write_bytes(b"newer")
    manifest = _with_new_denoiser(bundle)
    write_manifest(bundle.root, manifest)
    newer = load_bundle(bundle.root)

    write_repository(newer, out, RepositorySettings(version=2, keep_versions=2))
    denoiser = out / "emoji-denoiser"
    assert (denoiser / "1/model.onnx").read_bytes() == b"denoiser.onnx"
    assert (denoiser / "1/denoiser.onnx.data").read_bytes() == WEIGHTS
    assert (denoiser / "2/model.onnx").read_bytes() == b"newer"
    parameters = read_config(out, "denoiser").parameters
    assert parameters["cdm_weights.1"].string_value == key
    assert parameters["cdm_weights.2"].string_value == weights_key(manifest.components["denoiser"]) != key

    write_repository(newer, out, RepositorySettings(version=2, keep_versions=2))  # again
    assert sorted(path.name for path in denoiser.iterdir()) == ["1", "2", "config.pbtxt"]

    write_repository(newer, out, RepositorySettings(version=3, keep_versions=2))
    assert sorted(path.name for path in denoiser.iterdir()) == ["2", "3", "config.pbtxt"]
    write_repository(newer, out, RepositorySettings(version=4))
    assert sorted(path.name for path in denoiser.iterdir()) == ["4", "config.pbtxt"]
    assert "cdm_weights.3" not in read_config(out, "denoiser").parameters


@pytest.mark.parametrize(
    ("before", "after", "sentence"),
    [
        ({}, {"backend": "python"}, r"backend onnxruntime, .* say python; use --triton-keep-versions 1"),
        ({"backend": "python", "runtime": "openvino"}, {"backend": "python"}, r"runtime openvino, .* say onnxruntime;"),
        ({"device": "gpu", "precision": "bf16"}, {"device": "gpu"}, r"precision bf16, .* say f32;"),
    ],
)  # fmt: skip
def test_a_version_that_the_new_configuration_cannot_load_is_not_kept(
    bundle: Bundle, tmp_path: Path, before: dict[str, Any], after: dict[str, Any], sentence: str
) -> None:
    out = tmp_path / "out"
    write_repository(bundle, out, RepositorySettings(**before))
    there = tree(out)
    with pytest.raises(ExportError, match=rf"version 1 in \S+-text_encoder was written for {sentence}"):
        write_repository(bundle, out, RepositorySettings(**after, version=2, keep_versions=2))
    assert tree(out) == there
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bundle", "out"]
    write_repository(bundle, out, RepositorySettings(**after, version=2))
    assert "emoji-decoder/1/model.onnx" not in tree(out)


def test_a_version_of_other_tensors_is_not_kept(bundle: Bundle, tmp_path: Path) -> None:
    write_repository(bundle, tmp_path / "out", RepositorySettings())
    part = bundle.manifest.components["decoder"]
    wide = part.inputs["x"].model_copy(update={"shape": ("batch", 16, "height", "width")})
    components = {**bundle.manifest.components, "decoder": part.model_copy(update={"inputs": {"x": wide}})}
    other = dataclasses.replace(
        bundle, manifest=bundle.manifest.model_copy(update={"components": components})
    )
    sentence = r"-decoder was written for inputs x FP32\[4, -1, -1\], .* would say x FP32\[16, -1, -1\];"
    with pytest.raises(ExportError, match=sentence):
        write_repository(other, tmp_path / "out", RepositorySettings(version=2, keep_versions=2))


def test_a_plan_for_smaller_batches_is_not_kept(bundle: Bundle, tmp_path: Path) -> None:
    plan = tmp_path / "any.plan"
    plan.write_bytes(b"plan")
    settings = RepositorySettings(
        backend="tensorrt", device="gpu", plans=dict.fromkeys(COMPONENTS, plan), max_batch=4
    )
    write_repository(bundle, tmp_path / "out", settings)
    later = dataclasses.replace(settings, version=2, keep_versions=2)
    with pytest.raises(ExportError, match=r"has a plan for batches of up to 4, and .* would say 8; use"):
        write_repository(bundle, tmp_path / "out", dataclasses.replace(later, max_batch=8))
    write_repository(bundle, tmp_path / "out", later)
    assert {"1/model.plan", "2/model.plan"} <= set(tree(tmp_path / "out" / "emoji-decoder"))


def _with_new_denoiser(bundle: Bundle) -> Manifest:
    component = bundle.manifest.components["denoiser"]
    graph = component.graphs["float32"].model_copy(
        update={"file": file_ref(bundle.root, bundle.root / "denoiser.onnx")}
    )
    updated = component.model_copy(update={"graphs": {**component.graphs, "float32": graph}})
    return bundle.manifest.model_copy(
        update={"components": {**bundle.manifest.components, "denoiser": updated}}
    )
