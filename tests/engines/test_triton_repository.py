"""A bundle becomes a model repository that says exactly what the bundle is; half a one is never there."""

from __future__ import annotations

import dataclasses
import functools
import os
from pathlib import Path
from typing import Any

import pytest
from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2 as pb

from engines.bundle import Bundle, load_bundle
from engines.errors import ExportError
from engines.fake import fake_bundle
from engines.triton_repository import repository
from engines.triton_repository.config import model_config, model_name, weights_key
from engines.triton_repository.repository import write_repository
from engines.triton_repository.settings import RepositorySettings
from tests.engines.triton_bundle import COMPONENTS, WEIGHTS, known_bundle, read_config, tree


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    return known_bundle(tmp_path / "bundle")


def tensors(found: object) -> dict[str, tuple[str, list[int]]]:
    return {each.name: (pb.DataType.Name(each.data_type), list(each.dims)) for each in found}  # type: ignore[attr-defined]


def test_every_component_is_a_model_with_its_files(bundle: Bundle, tmp_path: Path) -> None:
    out = tmp_path / "deep" / "repository"
    names = write_repository(bundle, out, RepositorySettings())
    assert names == [f"emoji-{component}" for component in COMPONENTS]
    files = tree(out)
    assert {name: data for name, data in files.items() if "config" not in name} == {
        "emoji-text_encoder/1/model.onnx": b"text_encoder.onnx",
        "emoji-denoiser/1/model.onnx": b"denoiser.onnx",
        "emoji-denoiser/1/denoiser.onnx.data": WEIGHTS,
        "emoji-decoder/1/model.onnx": b"decoder.onnx",
    }
    assert out.stat().st_mode & 0o777 == 0o755
    assert sorted(path.name for path in out.parent.iterdir()) == [
        "repository"
    ]  # nothing half-written is left


def test_graphs_are_links_and_external_weights_are_not(bundle: Bundle, tmp_path: Path) -> None:
    write_repository(bundle, tmp_path / "out", RepositorySettings())
    version = tmp_path / "out" / "emoji-denoiser" / "1"
    assert os.path.samefile(version / "model.onnx", bundle.path("denoiser"))
    # The onnx package refuses weights of which there is a second link, and would refuse the bundle's own.
    assert (bundle.root / "denoiser.onnx.data").stat().st_nlink == 1


def test_a_file_system_without_links_gets_copies(
    bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", refuse)
    write_repository(bundle, tmp_path / "out", RepositorySettings())
    assert (tmp_path / "out" / "emoji-decoder" / "1" / "model.onnx").read_bytes() == b"decoder.onnx"


def test_config_names_tensors_as_the_graph_does_and_counts_no_batch(bundle: Bundle, tmp_path: Path) -> None:
    write_repository(bundle, tmp_path / "out", RepositorySettings(max_batch=6))
    config = read_config(tmp_path / "out", "denoiser")
    assert (config.name, config.backend, config.platform) == (
        "emoji-denoiser",
        "onnxruntime",
        "onnxruntime_onnx",
    )
    assert (config.default_model_filename, config.max_batch_size) == ("model.onnx", 6)
    latent = ("TYPE_FP32", [4, -1, -1])
    assert tensors(config.input) == {
        "x": latent,
        "sigma": ("TYPE_FP32", [1]),
        "sigma_next": ("TYPE_FP32", [1]),
        "embedding": ("TYPE_FP32", [3, 4]),
    }
    assert tensors(config.output) == {"x_next": latent, "x0": latent}
    # σ is (batch,) to the graph, which Triton says with an empty reshape.
    reshaped = {each.name: list(each.reshape.shape) for each in config.input if each.HasField("reshape")}
    assert reshaped == {"sigma": [], "sigma_next": []}
    text, decoder = (read_config(tmp_path / "out", name) for name in ("text_encoder", "decoder"))
    assert tensors(text.input) == {"input_ids": ("TYPE_INT64", [77])}
    assert tensors(decoder.output) == {"image": ("TYPE_UINT8", [-1, -1, 3])}


def test_scheduling_settings_are_triton_s(bundle: Bundle, tmp_path: Path) -> None:
    settings = RepositorySettings(
        device="gpu", gpus=(0, 2), instances=3, max_batch=8, preferred_batches=(4, 8), queue_delay_us=500,
        warm_up=(1, 8), keep_versions=2,
    )  # fmt: skip
    write_repository(bundle, tmp_path / "out", settings)
    config = read_config(tmp_path / "out", "denoiser")
    (group,) = config.instance_group
    assert (group.kind, group.count, list(group.gpus)) == (group.KIND_GPU, 3, [0, 2])
    assert list(config.dynamic_batching.preferred_batch_size) == [4, 8]
    assert config.dynamic_batching.max_queue_delay_microseconds == 500
    assert config.version_policy.latest.num_versions == 2
    assert [warm_up.batch_size for warm_up in config.model_warmup] == [1, 8]
    sample = config.model_warmup[1].inputs
    assert {name: list(sample[name].dims) for name in sample} == {
        "x": [4, 16, 16],  # the default size, 128x128, over the autoencoder's 8
        "sigma": [1],
        "sigma_next": [1],
        "embedding": [3, 4],
    }
    assert all(each.zero_data for each in sample.values())


def test_by_default_triton_waits_for_nobody_and_runs_on_the_cpu(bundle: Bundle, tmp_path: Path) -> None:
    write_repository(bundle, tmp_path / "out", RepositorySettings())
    config = read_config(tmp_path / "out", "decoder")
    assert config.HasField("dynamic_batching")
    assert config.dynamic_batching.max_queue_delay_microseconds == 0
    assert [(group.kind, group.count) for group in config.instance_group] == [
        (pb.ModelInstanceGroup.KIND_CPU, 1)
    ]
    write_repository(bundle, tmp_path / "out", RepositorySettings(dynamic_batching=False, warm_up=()))
    config = read_config(tmp_path / "out", "decoder")
    assert not config.HasField("dynamic_batching")
    assert not config.model_warmup


def test_threads_reach_the_backend_by_its_own_name(bundle: Bundle, tmp_path: Path) -> None:
    write_repository(bundle, tmp_path / "out", RepositorySettings(threads=2))
    assert read_config(tmp_path / "out", "decoder").parameters["intra_op_thread_count"].string_value == "2"


def test_bfloat16_takes_the_bfloat16_graphs(bundle: Bundle, tmp_path: Path) -> None:
    write_repository(bundle, tmp_path / "out", RepositorySettings(precision="bf16", device="gpu"))
    assert (tmp_path / "out/emoji-denoiser/1/model.onnx").read_bytes() == b"denoiser.bf16.onnx"
    assert read_config(tmp_path / "out", "denoiser").parameters["cdm_precision"].string_value == "bf16"


def test_python_backend_gets_its_model_and_is_told_what_to_run(bundle: Bundle, tmp_path: Path) -> None:
    write_repository(bundle, tmp_path / "out", RepositorySettings(backend="python", threads=3))
    files = tree(tmp_path / "out")
    assert b"class TritonPythonModel" in files["emoji-decoder/1/model.py"]
    assert files["emoji-decoder/1/model.onnx"] == b"decoder.onnx"
    config = read_config(tmp_path / "out", "decoder")
    assert (config.backend, config.platform, config.default_model_filename) == ("python", "", "model.py")
    given = {name: value.string_value for name, value in config.parameters.items()}
    assert given == {
        "cdm_component": "decoder",
        "cdm_precision": "f32",
        "cdm_runtime": "onnxruntime",
        "cdm_threads": "3",
        "cdm_weights.1": weights_key(bundle.manifest.components["decoder"]),
    }


def test_another_runtime_in_the_python_backend_gets_the_whole_bundle_once(
    bundle: Bundle, tmp_path: Path
) -> None:
    write_repository(bundle, tmp_path / "out", RepositorySettings(backend="python", runtime="openvino"))
    folders = [tmp_path / "out" / f"emoji-{name}" / "1" / "bundle" for name in COMPONENTS]
    assert [load_bundle(folder).sha256 for folder in folders] == [bundle.sha256] * 3
    weights = {(folder / "denoiser.onnx.data").stat().st_ino for folder in folders}
    assert len(weights) == 1  # one copy on the disk, and not the bundle's
    assert (bundle.root / "denoiser.onnx.data").stat().st_ino not in weights


def test_tensorrt_gets_the_plans(bundle: Bundle, tmp_path: Path) -> None:
    plans = {name: tmp_path / f"{name}.engine" for name in COMPONENTS}
    for path in plans.values():
        path.write_bytes(path.name.encode())
    settings = RepositorySettings(backend="tensorrt", device="gpu", precision="bf16", plans=plans)
    write_repository(bundle, tmp_path / "out", settings)
    assert (tmp_path / "out/emoji-denoiser/1/model.plan").read_bytes() == b"denoiser.engine"
    config = read_config(tmp_path / "out", "denoiser")
    assert (config.backend, config.platform, config.default_model_filename) == (
        "tensorrt", "tensorrt_plan", "model.plan",
    )  # fmt: skip


def test_text_of_any_kind_survives_the_config(bundle: Bundle) -> None:
    manifest = bundle.manifest.model_copy(update={"name": '../Émoji "2" \\ 🍎'})
    config = model_config(manifest, "decoder", RepositorySettings())
    parsed = text_format.Parse(text_format.MessageToString(config, as_utf8=True), pb.ModelConfig())
    assert parsed == config
    assert config.name == "moji-2-decoder"
    assert model_name(manifest.model_copy(update={"name": "苹果"}), "decoder") == "fake-decoder"


def test_weights_are_told_apart_whatever_the_precision_served(bundle: Bundle) -> None:
    components = bundle.manifest.components
    keys = {weights_key(component) for component in components.values()}
    changed = components["decoder"].graphs["bfloat16"].model_copy(update={"opset": 24})
    other = changed.model_copy(update={"file": changed.file.model_copy(update={"sha256": "0" * 64})})
    graphs = components["decoder"].graphs
    keys.add(weights_key(components["decoder"].model_copy(update={"graphs": {**graphs, "bfloat16": other}})))
    assert len(keys) == 4


# mistakes

python = functools.partial(RepositorySettings, backend="python")


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        (RepositorySettings(instances=0), r"instances=0 is too small; 1 or more"),
        (RepositorySettings(max_batch=0), r"max_batch=0 is too small"),
        (RepositorySettings(queue_delay_us=-1), r"queue_delay_us=-1 is too small; 0 or more"),
        (RepositorySettings(version=0), r"version=0 is too small"),
        (RepositorySettings(max_batch=4, preferred_batches=(2, 8)), r"preferred_batches has 8, .*max_batch=4"),
        (RepositorySettings(warm_up=(0,)), r"warm_up has 0, which is not a batch of 1 to max_batch=8"),
        (RepositorySettings(dynamic_batching=False, queue_delay_us=5), r"queue_delay_us=5 means nothing without"),
        (RepositorySettings(dynamic_batching=False, preferred_batches=(2,)), r"preferred_batches=.* means nothing"),
        (RepositorySettings(gpus=(1,)), r"gpus=\[1\] means nothing with device='cpu'"),
        (RepositorySettings(runtime="openvino"), r"runtime='openvino' runs in the python backend, not in onnxruntime"),
        (RepositorySettings(precision="bf16"), r"no bf16 on a CPU"),
        (RepositorySettings(backend="python", precision="bf16"), r"no bf16 on a CPU"),
        (RepositorySettings(backend="tensorrt"), r"TensorRT runs on GPUs; choose device='gpu'"),
        (RepositorySettings(backend="tensorrt", device="gpu"), r"plans lacks text_encoder; .* tensorrt --plans DIR"),
        (RepositorySettings(device="gpu", gpus=(-1,)), r"gpus has -1; GPUs are numbered from 0"),
        (python(runtime="openvino", device="gpu", gpus=(1,)), r"'openvino' runs on a CPU only; choose device='cpu'"),
        (python(runtime="tensorrt-rtx", threads=2), r"'tensorrt-rtx' runs on a GPU only; choose device='gpu'"),
        (python(runtime="tensorrt"), r"runtime='tensorrt' runs on a GPU only"),
        (python(device="gpu", threads=4), r"threads=4 means nothing with device='gpu'"),
        (RepositorySettings(device="gpu", threads=4), r"threads=4 means nothing with device='gpu'"),
        (python(runtime="torch", device="gpu", threads=1), r"threads=1 means nothing with device='gpu'"),
        (RepositorySettings(plans={"decoder": Path("x")}), r"plans mean nothing to the onnxruntime backend"),
    ],
)  # fmt: skip
def test_settings_that_contradict_each_other_are_refused_and_nothing_is_written(
    bundle: Bundle, tmp_path: Path, settings: RepositorySettings, sentence: str
) -> None:
    with pytest.raises(ExportError, match=sentence):
        write_repository(bundle, tmp_path / "out", settings)
    assert not (tmp_path / "out").exists()


def test_bf16_in_another_runtime_of_the_python_backend_is_that_runtime_s_affair(bundle: Bundle) -> None:
    python(runtime="openvino", precision="bf16").check(bundle.manifest)


@pytest.mark.parametrize("device", ["cpu", "gpu"])
def test_runtimes_of_torch_run_on_either(bundle: Bundle, device: Any) -> None:
    for runtime in ("onnxruntime", "torch", "aotinductor"):
        python(runtime=runtime, device=device).check(bundle.manifest)


def test_a_precision_that_was_not_exported_names_the_remedy(tmp_path: Path) -> None:
    (tmp_path / "bundle").mkdir()
    only_float32 = fake_bundle(tmp_path / "bundle")
    settings = RepositorySettings(precision="bf16", device="gpu")
    with pytest.raises(ExportError, match=r"not in bfloat16; export it again with --precisions"):
        write_repository(only_float32, tmp_path / "out", settings)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bundle"]


def test_what_another_hand_made_is_not_replaced(bundle: Bundle, tmp_path: Path) -> None:
    out = tmp_path / "out"
    write_repository(bundle, out, RepositorySettings())
    (out / "resnet").mkdir()
    (out / "resnet" / "config.pbtxt").write_text('name: "resnet"', encoding="utf-8")
    before = tree(out)
    with pytest.raises(
        ExportError, match=r"out holds resnet, which cdm-export did not write there; give another"
    ):
        write_repository(bundle, out, RepositorySettings())
    assert tree(out) == before
    file = tmp_path / "file"
    file.write_text("precious", encoding="utf-8")
    with pytest.raises(ExportError, match=r"holds file, which cdm-export did not write"):
        write_repository(bundle, file, RepositorySettings())


def test_a_full_disk_leaves_what_was_there(
    bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    write_repository(bundle, out, RepositorySettings())
    before = tree(out)

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(repository.shutil, "copy", full)  # type: ignore[attr-defined]
    with pytest.raises(ExportError, match=r"out cannot be written: No space left on device"):
        write_repository(bundle, out, RepositorySettings(version=2))
    assert tree(out) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bundle", "out"]


def test_warm_up_needs_every_length(bundle: Bundle, tmp_path: Path) -> None:
    part = bundle.manifest.components["text_encoder"]
    ids = part.inputs["input_ids"].model_copy(update={"shape": ("batch", "unheard_of")})
    components = {
        **bundle.manifest.components,
        "text_encoder": part.model_copy(update={"inputs": {"input_ids": ids}}),
    }
    odd = dataclasses.replace(bundle, manifest=bundle.manifest.model_copy(update={"components": components}))
    with pytest.raises(ExportError, match=r"text_encoder takes input_ids with a dimension 'unheard_of'"):
        write_repository(odd, tmp_path / "out", RepositorySettings())
    write_repository(odd, tmp_path / "out", RepositorySettings(warm_up=()))
    assert tensors(read_config(tmp_path / "out", "text_encoder").input) == {"input_ids": ("TYPE_INT64", [-1])}
