"""An export is the same model, proven, or it is not there."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from diffusers.models.embeddings import PatchEmbed
from onnx import TensorProto, numpy_helper
from torch import nn

from engines.bundle import PROVENANCE, Bundle, BundleError, Parity, load_bundle
from engines.errors import ExportError
from engines.export.export import ExportOptions, export_bundle, read_provenance
from engines.export.graphs import exportable
from engines.export.main import main
from engines.export.onnx_file import (
    Axes,
    describe,
    round_to_float16_,
    save_model,
    store_weights_as_float16,
    to_onnx,
)
from engines.export.parity import BATCHES, EXAMPLE_BATCH, open_session
from engines.export.tolerance import Tolerance
from engines.families.base import load_family
from tests.conftest import PROVENANCE_DOCUMENT


def test_manifest_binds_what_the_student_says(bundle: Bundle, student: Path) -> None:
    manifest, family = bundle.manifest, load_family(student)
    assert manifest.family == "sd3"
    assert (manifest.latent.channels, manifest.latent.downscale) == (8, 8)
    assert (manifest.latent.scaling_factor, manifest.latent.shift_factor) == (1.3, 0.1)
    assert manifest.default_size.width == 64
    assert {steps: manifest.sigmas(steps) for steps in range(1, 9)} == manifest.schedules
    assert all(manifest.sigmas(steps) == family.sigmas(steps) for steps in range(1, 9))
    assert manifest.provenance.model_dump(exclude={"tools"}, mode="json") == PROVENANCE_DOCUMENT
    assert manifest.provenance.tools["torch"] == torch.__version__


def test_tensors_are_named_and_their_batch_is_free(bundle: Bundle) -> None:
    components = bundle.manifest.components
    assert list(components["denoiser"].inputs) == [
        "x", "sigma", "sigma_next", "encoder_hidden_states", "pooled_projections",
    ]  # fmt: skip
    assert list(components["denoiser"].outputs) == ["x_next", "x0"]
    assert components["denoiser"].inputs["x"].shape == ("batch", 8, "height", "width")
    assert components["text_encoder"].inputs["input_ids_2"].shape == ("batch", 12)
    assert components["text_encoder"].outputs["encoder_hidden_states"].shape == ("batch", 13, 64)
    assert components["decoder"].outputs["image"].dtype == "uint8"


def test_every_component_is_measured_at_every_batch_and_size_against_both_weights(bundle: Bundle) -> None:
    assert EXAMPLE_BATCH not in BATCHES
    for name, component in bundle.manifest.components.items():
        measured = [(parity.weights, parity.batch) for parity in component.parity]
        assert sorted(measured) == sorted([(w, b) for w in ("stored", "original") for b in BATCHES] * 2), name
        stored = [parity for parity in component.parity if parity.weights == "stored"]
        original = [parity for parity in component.parity if parity.weights == "original"]
        assert all(parity.rel_l2 <= Tolerance.stored or name == "decoder" for parity in stored)
        # Rounded weights cost something: equal errors would mean that the references are the same model.
        assert max(parity.rel_l2 for parity in original) > 10 * max(parity.rel_l2 for parity in stored)


def test_matrices_are_stored_in_half_the_bytes_and_name_no_machine(bundle: Bundle) -> None:
    for component in bundle.manifest.components:
        model = onnx.load(bundle.path(component))
        kinds = {
            tensor.data_type
            for tensor in model.graph.initializer
            if len(tensor.dims) >= 2 and numpy_helper.to_array(tensor).size > 256
        }
        assert kinds == {TensorProto.FLOAT16}, component
        text = bundle.path(component).read_bytes()
        assert b"site-packages" not in text
        assert str(Path.cwd()).encode() not in text


def test_export_above_tolerance_is_refused_and_leaves_the_old_bundle_untouched(
    student: Path, bundle: Bundle, tmp_path: Path
) -> None:
    out = shutil.copytree(bundle.root, tmp_path / "out")
    with pytest.raises(
        ExportError,
        match=r"text_encoder at batch 1 against torch with stored weights: relative L2 error .* at most 1e-12",
    ):
        export_bundle(student, out, ExportOptions(tolerance=Tolerance(stored=1e-12)))
    assert list(tmp_path.iterdir()) == [out]
    assert load_bundle(out).sha256 == bundle.sha256


@pytest.mark.parametrize(
    ("component", "parity", "allowed"),
    [
        ("denoiser", Parity(weights="stored", batch=1, max_abs=9, rel_l2=1.9e-5), True),
        ("denoiser", Parity(weights="stored", batch=1, max_abs=0, rel_l2=2.1e-5), False),
        ("denoiser", Parity(weights="original", batch=1, max_abs=0, rel_l2=0.9e-2), True),
        ("denoiser", Parity(weights="original", batch=1, max_abs=0, rel_l2=1.1e-2), False),
        ("decoder", Parity(weights="stored", batch=1, max_abs=1, rel_l2=1e-3), True),
        ("decoder", Parity(weights="stored", batch=1, max_abs=2, rel_l2=0), False),
    ],
)
def test_tolerance_is_a_line(component: str, parity: Parity, allowed: bool) -> None:
    if allowed:
        Tolerance().check(component, parity)
    else:
        with pytest.raises(ExportError, match=f"{component} at batch 1"):
            Tolerance().check(component, parity)


def test_folder_that_is_no_bundle_is_never_overwritten(student: Path, tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("mine", encoding="utf-8")
    with pytest.raises(ExportError, match="exists and is not a bundle"):
        export_bundle(student, tmp_path, ExportOptions())
    assert (tmp_path / "thesis.txt").read_text(encoding="utf-8") == "mine"


def test_user_mistakes_end_in_one_sentence(
    student: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = str(tmp_path / "out")
    cases = {
        (str(tmp_path / "nowhere"), "--out", out): "is not a diffusers folder",
        (
            str(student),
            "--out",
            out,
            "--default-steps",
            "9",
        ): "default steps 9 must be between 1 and max steps 8",
        (str(student), "--out", out, "--sizes", "64"): "is not a size; write WIDTHxHEIGHT",
        (str(student), "--out", out, "--sizes", "64x60"): "must be multiples of 8",
        (str(student), "--out", out, "--sizes", "512x512"): "cannot run on inputs of shape",
    }
    for argv, message in cases.items():
        assert main(argv) == 2, argv
        error = capsys.readouterr().err.splitlines()[-1]
        assert error.startswith("cdm-export: error: ")
        assert message in error
    assert list(tmp_path.iterdir()) == []


def test_provenance_is_unknown_when_absent_and_refused_when_wrong(tmp_path: Path) -> None:
    assert read_provenance(tmp_path).teacher == "unknown"
    (tmp_path / PROVENANCE).write_text(json.dumps({**PROVENANCE_DOCUMENT, "colour": "red"}), encoding="utf-8")
    with pytest.raises(ExportError, match=r"provenance\.json is invalid.*colour"):
        read_provenance(tmp_path)


def test_weight_that_float16_cannot_hold_is_refused() -> None:
    layer = nn.Linear(2, 2)
    layer.weight.data[0, 0] = 70000.0
    with pytest.raises(ExportError, match=r"weight holds \|w\| = 70000; .* below 65504"):
        round_to_float16_([layer])


class _Patches(nn.Module):
    """SD3's patch embedding alone: where the exporter's bug sits."""

    inputs, outputs = ("x",), ("x0",)

    def __init__(self) -> None:
        super().__init__()
        self.embed = PatchEmbed(
            height=8, width=8, patch_size=2, in_channels=1, embed_dim=8, pos_embed_max_size=10
        )

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor]:
        return (self.embed(x),)


def test_odd_and_even_patch_grids_export_right() -> None:
    module = _Patches().eval()
    with exportable():
        model = to_onnx(module, module, {"x": torch.randn(4, 1, 8, 12)}, _PatchAxes())
    session = _session(model)
    for rows in range(1, 10):
        for columns in range(1, 10):
            x = torch.randn(1, 1, 2 * rows, 2 * columns)
            with torch.no_grad():
                reference = module(x)[0].numpy()
            np.testing.assert_allclose(session.run(None, {"x": x.numpy()})[0], reference, atol=1e-5)


class _PatchAxes(Axes):
    def __init__(self) -> None:
        super().__init__(spatial=True)

    def names(self, tensor: str) -> dict[int, str]:
        return {0: "batch", 1: "tokens"} if tensor == "x0" else super().names(tensor)


def _session(model: onnx.ModelProto):
    import onnxruntime

    return onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])


def _linear_model() -> onnx.ModelProto:
    exact = np.arange(64 * 64, dtype=np.float32).reshape(64, 64) % 1000 / 64
    inexact = np.full((64, 64), 0.1, np.float32)
    return onnx.helper.make_model(
        onnx.helper.make_graph(
            [
                onnx.helper.make_node("MatMul", ["x", "exact"], ["h"]),
                onnx.helper.make_node("MatMul", ["h", "inexact"], ["y"]),
            ],
            "two_layers",
            [onnx.helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 64])],
            [onnx.helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", 64])],
            [numpy_helper.from_array(exact, "exact"), numpy_helper.from_array(inexact, "inexact")],
        ),
        opset_imports=[onnx.helper.make_opsetid("", 20)],
        ir_version=10,
    )


def test_storing_as_float16_changes_no_value() -> None:
    model, x = _linear_model(), np.random.default_rng(0).standard_normal((3, 64), dtype=np.float32)
    before = _session(model).run(None, {"x": x})[0]
    store_weights_as_float16(model)
    onnx.checker.check_model(model)
    assert [tensor.data_type for tensor in model.graph.initializer] == [
        TensorProto.FLOAT16,
        TensorProto.FLOAT,
    ]
    assert np.array_equal(_session(model).run(None, {"x": x})[0], before)


def test_large_models_keep_their_weights_in_a_file_that_the_manifest_names(tmp_path: Path) -> None:
    files = save_model(tmp_path, "denoiser", _linear_model(), limit=1000)
    component = describe(tmp_path, files, onnx.load(files[0]), [Parity(batch=1, max_abs=0, rel_l2=0)])
    assert [ref.file for ref in component.data] == ["denoiser.onnx.data"]
    assert component.data[0].bytes >= 2 * 64 * 64 * 4
    assert component.graph.bytes < 1000
    x = np.ones((1, 64), np.float32)
    assert np.array_equal(
        open_session(files[0]).run(None, {"x": x})[0], _session(_linear_model()).run(None, {"x": x})[0]
    )


def _tampered(bundle: Bundle, folder: Path, **changes: object) -> Path:
    copy = shutil.copytree(bundle.root, folder)
    document = json.loads((copy / "bundle.json").read_text(encoding="utf-8"))
    (copy / "bundle.json").write_text(json.dumps({**document, **changes}), encoding="utf-8")
    return copy


def test_bundle_of_another_version_is_refused(bundle: Bundle, tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="has bundle format 2, this version serves 1; export it again"):
        load_bundle(_tampered(bundle, tmp_path / "b", format_version=2))


@pytest.mark.parametrize("sigmas", [[1.0, 0.5, 0.5, 0.25, 0.0], [1.0, 0.0], [0.9, 0.7, 0.5, 0.2, 0.0]])
def test_bundle_with_a_wrong_schedule_is_refused(bundle: Bundle, tmp_path: Path, sigmas: list[float]) -> None:
    with pytest.raises(BundleError, match="it must be 5 sigmas falling strictly from 1 to 0") as refused:
        load_bundle(_tampered(bundle, tmp_path / "b", schedules={"4": sigmas}))
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("file", ["denoiser.onnx", "tokenizer.json"])
def test_bundle_with_one_changed_bit_is_refused(bundle: Bundle, tmp_path: Path, file: str) -> None:
    copy = shutil.copytree(bundle.root, tmp_path / "b")
    data = bytearray((copy / file).read_bytes())
    data[len(data) // 2] ^= 1
    (copy / file).write_bytes(data)
    with pytest.raises(BundleError, match=f"{file} is not the file that was exported"):
        load_bundle(copy)
    (copy / file).unlink()
    with pytest.raises(BundleError, match=f"lacks {file}"):
        load_bundle(copy)
