"""Engines from graphs: what TensorRT is told (on a double), and what TensorRT-RTX really builds, without a GPU."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import onnx
import pytest
from onnx import TensorProto, helper

from engines.bundle import Bundle, Size
from engines.errors import ExportError, RuntimeUnavailable
from engines.tensorrt_build import Order, build, build_engines, choose_precision, usable_precisions
from engines.tensorrt_library import Library, open_library
from engines.tensorrt_report import Report
from tests.engines import fake_tensorrt
from tests.engines.fake_cuda import FakeCuda
from tests.engines.fake_tensorrt import FakeTensorRT
from tests.engines.tensorrt_models import with_graph, with_kl_decoder, with_t5

trt = pytest.importorskip("tensorrt_rtx")


@pytest.fixture(scope="module")
def rtx() -> Library:
    return open_library("tensorrt-rtx")


def of_sizes(bundle: Bundle, *sizes: tuple[int, int]) -> Bundle:
    """The bundle for other (width, height), the first the default."""
    given = tuple(Size(width=width, height=height) for width, height in sizes)
    manifest = bundle.manifest.model_copy(update={"sizes": given, "default_size": given[0]})
    return Bundle(bundle.root, manifest, bundle.sha256)


# what is asked for


def test_a_profile_spans_the_bundles_limits(bundle: Bundle, rtx: Library) -> None:
    order = Order(rtx, of_sizes(bundle, (96, 64), (64, 128)), "bf16", "8.9", 6)
    shapes = order.shapes("denoiser")
    assert shapes["x"] == ((1, 8, 8, 8), (3, 8, 8, 12), (6, 8, 16, 12))
    assert shapes["sigma_next"] == ((1,), (3,), (6,))
    assert shapes["clip_states"] == ((1, 12, 32), (3, 12, 32), (6, 12, 32))
    assert shapes["clip_pooled"] == ((1, 32), (3, 32), (6, 32))
    assert order.shapes("text_encoder") == {"input_ids": ((1, 12), (3, 12), (6, 12))}


@pytest.mark.parametrize(("side", "pictures"), [(64, 8), (512, 4), (1024, 1), (2048, 1)])
def test_a_decoder_takes_a_megapixel_at_a_time(
    bundle: Bundle, rtx: Library, side: int, pictures: int
) -> None:
    order = Order(rtx, of_sizes(bundle, (64, 64), (side, side)), "bf16", "8.9", 8)
    assert order.shapes("decoder")["x"][2] == (pictures, 8, side // 8, side // 8)
    assert order.limit("denoiser") == 8


def test_tensorrt_rtx_is_told_the_target_the_types_and_the_memory(bundle: Bundle) -> None:
    fake = FakeTensorRT(FakeCuda())
    _, report = build(
        Order(Library("tensorrt-rtx", fake), bundle, "bf16", "12.0", 4, workspace=10**9), "denoiser"
    )
    (settings,) = fake.settings
    assert settings.network_flags == 1 << fake.NetworkDefinitionCreationFlag.STRONGLY_TYPED
    assert settings.targets == {0: fake.ComputeCapability.SM120}
    assert settings.flags == ["REQUIRE_USER_ALLOCATION"]
    assert settings.cleared == ["TF32"]
    assert settings.pools == {"workspace": 10**9}
    assert settings.verbosity == "detailed"
    (profile,) = settings.profiles
    assert profile == Order(Library("tensorrt-rtx", fake), bundle, "bf16", "12.0", 4).shapes("denoiser")
    assert settings.path.endswith("denoiser.bf16.onnx"), "types come from the graph"
    assert (report.target, report.precision, report.scratch_bytes) == ("12.0", "bf16", 4096)


@pytest.mark.parametrize(("precision", "graph"), [("bf16", "denoiser.bf16.onnx"), ("f32", "denoiser.onnx")])
def test_tensorrt_gets_no_flag_that_it_lacks(bundle: Bundle, precision: str, graph: str) -> None:
    """TensorRT 11 has no flag that lowers a type, and neither targets nor the flags of TensorRT-RTX."""
    fake = FakeTensorRT(FakeCuda(), rtx=False, version="11.4.0.106")
    build(Order(Library("tensorrt", fake), bundle, precision, "NVIDIA H100 (9.0)", 4), "denoiser")
    (settings,) = fake.settings
    assert settings.path.endswith(graph)
    assert settings.network_flags == 1
    assert (settings.flags, settings.cleared, settings.targets, settings.pools) == ([], ["TF32"], {}, {})


def test_bfloat16_is_the_default_where_bundle_and_gpu_have_it(bundle: Bundle) -> None:
    manifest = bundle.manifest
    assert usable_precisions(manifest, "8.0") == ("bf16", "f32")
    assert usable_precisions(manifest, "12.1") == ("bf16", "f32")
    assert usable_precisions(manifest, "7.5") == ("f32",)
    assert choose_precision("auto", manifest, "8.9") == "bf16"
    assert choose_precision("auto", manifest, "7.5") == "f32"
    assert choose_precision("f32", manifest, "8.9") == "f32"
    with pytest.raises(
        RuntimeUnavailable, match=r"precision='bf16' is not to be had: .* compute capability 7\.5 runs f32"
    ):
        choose_precision("bf16", manifest, "7.5")
    with pytest.raises(RuntimeUnavailable, match="precision='int8' is not to be had"):
        choose_precision("int8", manifest, "8.9")


def test_a_bundle_without_bfloat16_runs_in_float32(bundle: Bundle) -> None:
    components = {
        name: component.model_copy(update={"graphs": {"float32": component.graphs["float32"]}})
        for name, component in bundle.manifest.components.items()
    }
    manifest = bundle.manifest.model_copy(update={"components": components})
    assert choose_precision("auto", manifest, "8.9") == "f32"
    with pytest.raises(
        RuntimeUnavailable, match=r"the bundle has graphs in float32, .* --precisions float32,bfloat16"
    ):
        choose_precision("bf16", manifest, "8.9")


def test_a_package_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    with pytest.raises(
        RuntimeUnavailable, match="runtime 'tensorrt' needs the package 'tensorrt', which cannot be imp"
    ):
        open_library("tensorrt")


def test_targets_are_those_of_the_package(rtx: Library) -> None:
    assert rtx.targets == ("7.5", "8.0", "8.6", "8.9", "12.0", "12.1")


def test_a_target_that_does_not_exist_is_refused_before_anything_is_built(
    bundle: Bundle, tmp_path: Path
) -> None:
    with pytest.raises(RuntimeUnavailable, match=r"compute capability 9\.0 is no target of TensorRT-RTX 1\."):
        build_engines(bundle, capability="9.0", cache_dir=tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("fake", "real"),
    [
        (fake_tensorrt.Builder, "Builder"),
        (fake_tensorrt.Profile, "IOptimizationProfile"),
        (fake_tensorrt.Config, "IBuilderConfig"),
        (fake_tensorrt.Parser, "OnnxParser"),
        (fake_tensorrt.Runtime, "Runtime"),
        (fake_tensorrt.Engine, "ICudaEngine"),
        (fake_tensorrt.RuntimeConfig, "IRuntimeConfig"),
        (fake_tensorrt.RuntimeCache, "IRuntimeCache"),
        (fake_tensorrt.Context, "IExecutionContext"),
    ],
)
def test_the_double_has_no_method_that_tensorrt_rtx_lacks(fake: type, real: str) -> None:
    assert {name for name in vars(fake) if not name.startswith("_")} <= set(dir(getattr(trt, real)))


def test_the_double_names_nothing_that_tensorrt_rtx_lacks() -> None:
    fake = FakeTensorRT(FakeCuda())
    enums = [name for name in vars(fake) if name[0].isupper() and name != "ILogger"]
    assert len(enums) == 8
    for enum in enums:
        missing = set(vars(getattr(fake, enum))) - set(dir(getattr(trt, enum)))
        assert not missing, enum


# what is really built


@pytest.mark.parametrize("component", ["text_encoder", "denoiser", "decoder"])
def test_bfloat16_graphs_keep_attention_in_one_kernel(bundle: Bundle, rtx: Library, component: str) -> None:
    engine, report = build(Order(rtx, bundle, "bf16", "8.9", 2), component)
    assert len(engine) == report.engine_bytes > 10_000
    assert report.scratch_bytes > 0
    assert report.kernels is not None
    assert report.kernels > 10
    wanted = 0 if component == "decoder" else 2
    assert (report.attentions, report.fusable, report.fused, report.fell_apart) == (wanted, wanted, wanted, 0)
    report.require_attention("denoiser")


def test_scratch_memory_tells_a_fused_attention_from_one_that_fell_apart(
    bundle: Bundle, rtx: Library
) -> None:
    """The same SD3 transformer, opset 23 in bfloat16 and opset 20 in float32, with enough tokens for it to show."""
    large = of_sizes(bundle, (192, 192))
    low = build(Order(rtx, large, "bf16", "8.9", 64), "denoiser")[1]
    assert low.scratch_bytes < low.unfused_bytes == 2 * 64 * 4 * 144 * (144 + 24) * 2, "of the last block"
    low.require_attention("denoiser")
    full = build(Order(rtx, large, "f32", "8.9", 64), "denoiser")[1]
    assert full.scratch_bytes > full.unfused_bytes > 0
    assert (full.attentions, full.fused) == (2, 0)
    with pytest.raises(ExportError, match=r"denoiser \(f32, 8\.9\): 2 of 2 attentions are not one kernel"):
        full.require_attention("denoiser")


@pytest.mark.slow
def test_an_attention_too_wide_for_any_kernel_is_built_of_several(
    bundle: Bundle, rtx: Library, tmp_path: Path
) -> None:
    report = build(Order(rtx, with_kl_decoder(bundle, tmp_path, (16, 264)), "bf16", "8.9", 2), "decoder")[1]
    assert (report.attentions, report.fusable, report.fused, report.fell_apart) == (1, 0, 0, 0)
    assert report.row()["attentions fused"] == "0 of 1 (1 cannot be)"
    report.require_attention("denoiser")


@pytest.mark.slow
def test_a_t5_keeps_attention_in_one_kernel_despite_its_bias(
    bundle: Bundle, rtx: Library, tmp_path: Path
) -> None:
    report = build(Order(rtx, with_t5(bundle, tmp_path, 12), "bf16", "8.9", 2), "text_encoder")[1]
    assert (report.attentions, report.fused, report.fell_apart) == (2, 2, 0)


def test_all_components_are_built_once_into_the_cache(bundle: Bundle, tmp_path: Path) -> None:
    reports = build_engines(bundle, capability="8.6", cache_dir=tmp_path, max_batch=1)
    assert [report.component for report in reports] == list(bundle.manifest.components)
    assert {report.precision for report in reports} == {"bf16"}
    blobs = {path.name: path.stat().st_mtime_ns for path in tmp_path.rglob("*.blob")}
    assert len(blobs) == 2 * len(reports)
    assert build_engines(bundle, capability="8.6", cache_dir=tmp_path, max_batch=1) == reports
    assert {path.name: path.stat().st_mtime_ns for path in tmp_path.rglob("*.blob")} == blobs


def one_node(bundle: Bundle, root: Path, operator: str, domain: str = "") -> Bundle:
    """The bundle with a decoder of one node."""
    value = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, ["b", 8, "h", "w"]) for name in ("x", "image")
    ]
    node = helper.make_node(operator, ["x"], ["image"], name="frob", domain=domain)
    opsets = [helper.make_opsetid("", 20), *([helper.make_opsetid(domain, 1)] if domain else [])]
    graph = helper.make_graph([node], "decoder", value[:1], value[1:])
    path = root / "decoder.onnx"
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=10), str(path))
    return with_graph(bundle, root, "decoder", path, bundle.manifest.components["decoder"].inputs)


def test_an_operator_that_tensorrt_lacks_is_told_in_one_sentence(
    bundle: Bundle, rtx: Library, tmp_path: Path
) -> None:
    broken = one_node(bundle, tmp_path, "Frobnicate", "example")
    with pytest.raises(
        ExportError, match=r"TensorRT-RTX 1\..* cannot read .*decoder\.onnx: node frob of Frobnicate: \w+"
    ) as error:
        build(Order(rtx, broken, "bf16", "8.9", 2), "decoder")
    assert "\n" not in str(error.value)


def test_a_graph_that_needs_more_memory_than_it_may_have_is_told(bundle: Bundle, rtx: Library) -> None:
    with pytest.raises(ExportError, match=r"cannot build denoiser in bf16 for 8\.9, batches up to 2: \S+"):
        build(Order(rtx, bundle, "bf16", "8.9", 2, workspace=1 << 16), "denoiser")


def test_a_graph_that_does_build_does_after_one_that_did_not(
    bundle: Bundle, rtx: Library, tmp_path: Path
) -> None:
    fine = one_node(bundle, tmp_path, "Relu")
    report: Any = build(Order(rtx, fine, "bf16", "8.9", 2), "decoder")[1]
    assert isinstance(report, Report)
    assert report.attentions == 0
