"""`cdm-export --fusion-check`: what TensorRT-RTX fuses for GPUs that are not here is told, or fails the export."""

from __future__ import annotations

import re
import shutil
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from engines.bundle import Bundle, Component, Precision, load_bundle
from engines.errors import ExportError
from engines.export import export, fusion
from engines.export.export import ExportOptions, export_bundle
from engines.export.fusion import check_fusion, fusion_targets, judge, read_fusion_check
from engines.export.main import main, parity_table
from engines.export.plan import Plan
from engines.export.tolerance import Tolerance
from engines.tensorrt_build import Order
from engines.tensorrt_report import Report

BOTH: tuple[Precision, ...] = ("float32", "bfloat16")


def silent(_: str) -> None:
    """No progress is told."""


def test_the_runtimes_that_ran_it_are_in_the_manifest(bundle: Bundle) -> None:
    denoiser = bundle.manifest.components["denoiser"]
    assert {item.runtime for item in denoiser.fusions} == {"openvino"}
    assert all((item.attentions, item.fell_apart) == (2, 0) for item in denoiser.fusions)
    clip = bundle.manifest.components["text_encoder"].fusions
    assert [item.precision for item in clip] == [item.precision for item in denoiser.fusions]
    assert bundle.manifest.components["decoder"].fusions == (), "it has no attention"


def test_every_attention_is_one_kernel_of_the_gpu_named(bundle: Bundle) -> None:
    """The real TensorRT-RTX."""
    pytest.importorskip("tensorrt_rtx")
    for name, component in check_fusion(bundle, ("8.9",), Tolerance(), silent).components.items():
        built = [item for item in component.fusions if item.runtime == "tensorrt-rtx"]
        assert len(built) == (name != "decoder"), "which has no attention"
        for found in built:
            assert (found.precision, found.target, found.attentions, found.fell_apart) == (
                "bf16",
                "8.9",
                2,
                0,
            )
            assert found.report.startswith("attention one kernel: 2 of 2")


@pytest.fixture
def built(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str, str]]:
    """What would be built (component, precision, target), each with one attention of two in parts in CLIP alone."""
    orders: list[tuple[str, str, str]] = []

    def instead(order: Order, component: str) -> tuple[bytes, Report]:
        orders.append((component, order.precision, order.target))
        heads = {"decoder": 0}.get(component, 2)
        fused = 1 if component == "text_encoder" else heads
        return b"", replace(REPORT, component=component, target=order.target, fusable=heads, fused=fused)

    monkeypatch.setattr(fusion, "build", instead)
    return orders


REPORT = Report(
    component="", precision="bf16", target="", onnx_bytes=1, engine_bytes=1, scratch_bytes=50_000_000,
    unfused_bytes=20_000_000, attentions=2, fusable=2, fused=2, kernels=9, activations=0, activations_in_products=0,
    build_s=1.0,
)  # fmt: skip


class Targets:
    """The package, as far as it says what it builds for."""

    __version__ = "1.7.1"

    class ComputeCapability:
        SM75 = SM89 = SM120 = 0


def test_a_text_encoders_attention_in_parts_fails_the_export(
    bundle: Bundle, built: list[tuple[str, str, str]]
) -> None:
    with pytest.raises(
        ExportError,
        match=r"^text_encoder \(bf16, 12\.0\): 1 of 2 .* export with --allow-unfused to keep it, slower",
    ):
        check_fusion(bundle, ("12.0",), Tolerance(), silent, Targets())
    assert built == [("text_encoder", "bf16", "12.0")]


def test_where_it_is_allowed_the_manifest_and_the_table_say_so(
    bundle: Bundle, built: list[tuple[str, str, str]]
) -> None:
    manifest = check_fusion(bundle, ("8.9", "12.0"), Tolerance(unfused=True), silent, Targets())
    assert [order[2] for order in built] == ["8.9"] * 4 + ["12.0"] * 4
    apart = {
        name: [item.fell_apart for item in part.fusions if item.target]
        for name, part in manifest.components.items()
    }
    assert apart == {"text_encoder": [1, 1], "text_encoder_2": [0, 0], "denoiser": [0, 0], "decoder": [0, 0]}
    assert "attention one kernel: 1 of 2" in parity_table(manifest)
    kept = bundle.manifest.components["denoiser"].fusions
    assert manifest.components["denoiser"].fusions[: len(kept)] == kept, "beside OpenVINO's"


def test_the_command_asks_writes_and_prints(
    bundle: Bundle,
    built: list[tuple[str, str, str]],
    student: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Graphs come from the bundle that is there: what is made of them is asked of the written files."""

    def stage(stage: Any, _load: Any, root: Path, *_: Any) -> Component:
        shutil.copytree(bundle.root, root, dirs_exist_ok=True)
        return bundle.manifest.components[stage.name].model_copy(update={"fusions": ()})

    monkeypatch.setattr(export, "run_stage", stage)
    monkeypatch.setattr(
        Plan, "stages", lambda *_: [SimpleNamespace(name=name) for name in bundle.manifest.components]
    )
    monkeypatch.setattr(export, "verify", lambda written, *_: written.manifest)
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", Targets)
    argv = [str(student), "--out", str(tmp_path / "out"), "--precisions", "float32,bfloat16"]
    argv += ["--fusion-check", "tensorrt-rtx:8.9"]
    assert main(argv) == 2
    assert "cdm-export: error: text_encoder (bf16, 8.9): 1 of 2 attentions" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
    assert main([*argv, "--allow-unfused"]) == 0
    (written,) = load_bundle(tmp_path / "out").manifest.components["denoiser"].fusions
    assert (written.runtime, written.precision, written.target) == ("tensorrt-rtx", "bf16", "8.9")
    printed = capsys.readouterr()
    assert "… fusion: decoder on tensorrt-rtx bf16 for 8.9" in printed.err
    assert re.search(
        r"^denoiser +tensorrt-rtx bf16 8\.9 +attention one kernel: 2 of 2", printed.out, re.MULTILINE
    )


@dataclass(frozen=True)
class Apart:
    """Of a compiler that fuses nothing."""

    attentions: int = 3
    fell_apart: int = 3

    def require_attention(self, component: str) -> None:
        raise ExportError(component)


@pytest.mark.parametrize(
    ("runtime", "precision", "component", "held"),
    [
        ("openvino", "bf16", "denoiser", True),
        ("openvino", "f32", "text_encoder", False),
        ("tensorrt-rtx", "bf16", "text_encoder", True),
        ("tensorrt", "bf16", "decoder", True),
        ("tensorrt-rtx", "f32", "denoiser", False),
        ("mine", "f32", "text_encoder", True),
    ],
)
def test_who_is_held_to_one_kernel(runtime: str, precision: str, component: str, held: bool) -> None:
    on = (runtime, precision, "")
    (allowed,) = judge(Apart(), component, on, Tolerance(unfused=True), silent)
    assert (allowed.attentions, allowed.fell_apart) == (3, 3)
    if held:
        with pytest.raises(ExportError, match=component):
            judge(Apart(), component, on, Tolerance(), silent)
    else:
        assert judge(Apart(), component, on, Tolerance(), silent) == [allowed]


def test_a_denoiser_whose_attention_is_not_recognised_proves_nothing() -> None:
    nothing, on = Apart(0, 0), ("openvino", "f32", "")
    with pytest.raises(ExportError, match="denoiser on openvino f32: no attention was recognised"):
        judge(nothing, "denoiser", on, Tolerance(), silent)
    assert judge(nothing, "denoiser", on, Tolerance(unfused=True), silent) == []
    assert judge(nothing, "decoder", on, Tolerance(), silent) == []


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("openvino:8.9", r"'openvino:8\.9' cannot be checked for fusion; write tensorrt-rtx:CAPABILITY"),
        ("tensorrt-rtx", "'tensorrt-rtx' cannot be checked for fusion"),
        ("tensorrt-rtx:ada", "a GPU's compute capability, as tensorrt-rtx:8.9"),
        ("tensorrt-rtx:7.5", r"compute capability 7\.5 has no bfloat16, .*; 8\.0 and above have it"),
    ],
)
def test_what_cannot_be_asked_is_refused_with_what_can(text: str, message: str) -> None:
    assert read_fusion_check("tensorrt-rtx:12.0") == "12.0"
    with pytest.raises(ValueError, match=message):
        read_fusion_check(text)


def test_a_check_that_cannot_be_made_is_refused_before_anything_is_exported(
    student: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(message: str, **given: Any) -> None:
        lines: list[str] = []
        with pytest.raises(ExportError, match=message):
            export_bundle(student, tmp_path / "out", ExportOptions(**given), lines.append)
        assert lines == []
        assert not list(tmp_path.iterdir())

    refused("only float32 is written; add --precisions float32,bfloat16", fusion_check=("8.9",))
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", None)
    refused(
        "tensorrt-rtx:8.9: runtime 'tensorrt-rtx' needs the package", fusion_check=("8.9",), precisions=BOTH
    )
    with pytest.raises(ExportError, match=r"compute capability 9\.0 is no target of TensorRT-RTX 1\.7\.1"):
        fusion_targets(("9.0",), BOTH, Targets())


def test_a_bundle_that_says_nothing_of_fusion_is_read(bundle: Bundle) -> None:
    document = bundle.manifest.components["decoder"].model_dump(mode="json", exclude={"fusions"})
    assert Component.model_validate(document).fusions == ()
