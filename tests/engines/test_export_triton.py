"""`cdm-export BUNDLE --to triton`: every flag is in what Triton reads; those that would change nothing are refused."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2 as pb

from engines.bundle import Bundle, Graph, file_ref, load_bundle, write_manifest
from engines.cli import parse_settings
from engines.export.main import main
from engines.export.settings import ExportSettings
from engines.export.to_triton import TritonSettings
from engines.fake import fake_manifest
from engines.triton_repository.settings import RepositorySettings

ROOT = Path(__file__).resolve().parents[2]
COMPONENTS = ("text_encoder", "denoiser", "decoder")


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    """Two graphs of known bytes in every component."""
    root = tmp_path / "bundle"
    root.mkdir()
    manifest = fake_manifest(root, name="emoji")
    components = {}
    for name, component in manifest.components.items():
        graphs = {}
        for precision in ("float32", "bfloat16"):
            path = root / f"{name}.{precision}.onnx"
            path.write_bytes(path.name.encode())
            graphs[precision] = Graph(file=file_ref(root, path), opset=20)
        components[name] = component.model_copy(update={"graphs": graphs})
    write_manifest(root, manifest.model_copy(update={"components": components}))
    return load_bundle(root)


def write(bundle: Bundle, *flags: str) -> tuple[pb.ModelConfig, dict[str, bytes]]:
    """The denoiser's configuration, and its other files."""
    out = bundle.root.parent / "repository"
    assert main([str(bundle.root), "--to", "triton", "--out", str(out), *flags]) == 0
    folder = out / "emoji-denoiser"
    text = (folder / "config.pbtxt").read_text(encoding="utf-8")
    files = {
        path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()
    }
    return text_format.Parse(text, pb.ModelConfig()), files


def refused(capsys: pytest.CaptureFixture[str], argv: list[str], message: str) -> None:
    assert main(argv) == 2
    (error,) = capsys.readouterr().err.splitlines()
    assert re.fullmatch(rf"cdm-export: error: .*{message}.*", error), error


def test_a_repository_is_written_and_its_models_are_named(
    bundle: Bundle, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config, files = write(bundle)
    models = ", ".join(f"emoji-{name}" for name in COMPONENTS)
    assert capsys.readouterr().out == f"{tmp_path / 'repository'}: {models}\n"
    assert files["1/model.onnx"] == b"denoiser.float32.onnx"
    assert config.backend == "onnxruntime"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bundle", "repository"]


def _parameter(name: str) -> Callable[[pb.ModelConfig], str]:
    return lambda config: str(config.parameters[name].string_value)


def _versions(config: pb.ModelConfig) -> list[str]:
    return [name.removeprefix("cdm_weights.") for name in config.parameters if "weights" in name]


def _warm_up(config: pb.ModelConfig) -> list[int]:
    return [item.batch_size for item in config.model_warmup]


CPU, GPU = pb.ModelInstanceGroup.KIND_CPU, pb.ModelInstanceGroup.KIND_GPU
FLAGS: list[tuple[str, Callable[[pb.ModelConfig], object], object, object]] = [
    ("--triton-backend python", lambda found: found.backend, "onnxruntime", "python"),
    ("--triton-precision bf16 --triton-device gpu", _parameter("cdm_precision"), "f32", "bf16"),
    ("--triton-runtime openvino --triton-backend python", _parameter("cdm_runtime"), "", "openvino"),
    ("--triton-device gpu", lambda found: found.instance_group[0].kind, CPU, GPU),
    ("--triton-gpus 0,2 --triton-device gpu", lambda found: list(found.instance_group[0].gpus), [], [0, 2]),
    ("--triton-instances 3", lambda found: found.instance_group[0].count, 1, 3),
    ("--triton-threads 2", _parameter("intra_op_thread_count"), "", "2"),
    ("--triton-max-batch 6", lambda found: found.max_batch_size, 8, 6),
    ("--no-triton-dynamic-batching", lambda found: found.HasField("dynamic_batching"), True, False),
    ("--triton-preferred-batches 2,4", lambda found: [*found.dynamic_batching.preferred_batch_size], [], [2, 4]),
    ("--triton-queue-delay-us 5", lambda found: found.dynamic_batching.max_queue_delay_microseconds, 0, 5),
    ("--triton-warm-up 1,8", _warm_up, [1], [1, 8]),
    ("--triton-warm-up []", _warm_up, [1], []),
    ("--triton-version 7", _versions, ["1"], ["7"]),
    ("--triton-keep-versions 3", lambda found: found.version_policy.latest.num_versions, 1, 3),
]  # fmt: skip


@pytest.mark.parametrize(("flags", "read", "default", "given"), FLAGS, ids=[flag for flag, *_ in FLAGS])
def test_every_flag_reaches_what_triton_reads(
    bundle: Bundle, flags: str, read: Callable[[pb.ModelConfig], object], default: object, given: object
) -> None:
    assert read(write(bundle)[0]) == default
    assert read(write(bundle, *flags.split())[0]) == given


def test_no_setting_of_a_repository_is_without_its_flag() -> None:
    fields = {name.removeprefix("triton_") for name in TritonSettings.model_fields}
    assert fields == set(RepositorySettings.__dataclass_fields__)
    tried = {word for flags, *_ in FLAGS for word in flags.split() if word.startswith("--")}
    names = {f"--{name.replace('_', '-')}" for name in TritonSettings.model_fields}
    assert {flag.replace("--no-", "--") for flag in tried} == names - {"--triton-plans"}
    settings, _ = parse_settings(ExportSettings, ["bundle", "--out", "out"], "cdm-export")
    assert settings.repository() == RepositorySettings()


def test_the_page_on_triton_shows_every_flag_and_commands_that_parse(
    capsys: pytest.CaptureFixture[str],
) -> None:
    page = (ROOT / "docs" / "triton.md").read_text(encoding="utf-8")
    commands = re.findall(r"^cdm-export (.*)$", page, re.MULTILINE)
    assert commands
    for command in commands:
        assert main([*shlex.split(command), "--dry-run"]) == 0, capsys.readouterr().err
    named = set(re.findall(r"--(?:no-)?(triton-[a-z-]+\w)", page))
    flags = {name.replace("_", "-") for name in TritonSettings.model_fields}
    assert named == flags | {"triton-url"}  # which is the server's


def test_plans_are_named_by_component_or_by_their_folder(bundle: Bundle, tmp_path: Path) -> None:
    plans = {name: tmp_path / f"{name}.plan" for name in COMPONENTS}
    for path in plans.values():
        path.write_bytes(path.name.encode())
    pairs = [f"{name}={path}" for name, path in plans.items()]
    flags = ["--triton-backend", "tensorrt", "--triton-device", "gpu"]
    for given in ([",".join(pairs[:2]), pairs[2]], [str(tmp_path)]):
        config, files = write(bundle, *flags, *(word for each in given for word in ("--triton-plans", each)))
        assert (config.backend, files["1/model.plan"]) == ("tensorrt", b"denoiser.plan")


def test_versions_stand_beside_each_other(bundle: Bundle) -> None:
    write(bundle)
    _, files = write(bundle, "--triton-version", "2", "--triton-keep-versions", "2")
    assert sorted(files) == ["1/model.onnx", "2/model.onnx", "config.pbtxt"]


# mistakes


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--to triton --lora adapter", r"--lora \(or CDM_EXPORT_LORA\) means nothing with --to triton; leave it out"),
        ("--to triton --precisions float32 --seed 0", r"--precisions .*, --seed .* mean nothing with --to triton"),
        ("--triton-max-batch 8", r"--triton-max-batch \(or \S+\) means nothing with --to bundle; .* add --to triton"),
        ("--to bundle --no-triton-dynamic-batching", r"--triton-dynamic-batching .* means nothing with --to bundle"),
        ("--to tritn", r"--to=tritn: input should be 'bundle' or 'triton'"),
        ("--to triton --triton-max-batch 0", r"--triton-max-batch=0: input should be greater than or equal to 1"),
        ("--to triton --triton-runtime fake", r"--triton-runtime=fake: no such runtime runs in Triton; there"),
        ("--to triton --triton-runtime openvino", r"of the --triton flags, runtime='openvino' runs in the python"),
        ("--to triton --triton-gpus 1", r"of the --triton flags, gpus=\[1\] means nothing with device='cpu'"),
        ("--to triton --triton-plans denoiser=", r"--triton-plans=denoiser=: 'denoiser=' is not COMPONENT=FILE"),
        ("--to triton --triton-plans no", r"names no, which is neither COMPONENT=FILE nor a folder of COMPONENT\.plan"),
        ("--to triton --triton-plans a=b,a=c", r"a has two files, b and c; name one"),
        (
            "--to triton --triton-backend tensorrt --triton-device gpu --triton-plans "
            "text_encoder=no.plan,denoiser=no.plan,decoder=no.plan",
            r"--triton-plans names no\.plan for text_encoder, which is no file",
        ),
    ],
)  # fmt: skip
def test_flags_that_mean_nothing_are_refused(
    bundle: Bundle, tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: str, message: str
) -> None:
    refused(capsys, [str(bundle.root), "--out", str(tmp_path / "out"), *flags.split()], message)
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]


def test_variables_that_mean_nothing_are_refused(
    bundle: Bundle, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CDM_EXPORT_LORA", "adapter")
    refused(
        capsys, [str(bundle.root), "--out", "out", "--to", "triton"], r"\(or CDM_EXPORT_LORA\) means nothing"
    )


def test_what_is_no_bundle_is_told_with_what_to_do(
    bundle: Bundle, student: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cases = {
        str(
            student
        ): rf"is a student, and --to triton takes a bundle; export one with cdm-export {student} --out",
        str(tmp_path / "nowhere"): r"nowhere is not a bundle: cannot read bundle\.json",
    }
    for source, message in cases.items():
        refused(capsys, [source, "--to", "triton", "--out", str(tmp_path / "out")], message)
    (bundle.root / "decoder.float32.onnx").write_bytes(b"changed")
    argv = [str(bundle.root), "--to", "triton", "--out", str(tmp_path / "out")]
    refused(capsys, argv, r"decoder\.float32\.onnx is not the file that was exported")
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]


BLOCKED = """
import sys
for name in {!r}:
    sys.modules[name] = None
from engines.export.main import main
main(sys.argv[1:])
"""


@pytest.mark.parametrize(
    ("missing", "message"),
    [
        (("torch", "diffusers", "onnx", "huggingface_hub"), ""),
        (
            ("tritonclient",),
            r"cdm-export --to triton needs the package 'tritonclient', .*'cdm-serve\[triton\]'",
        ),
    ],
)
def test_only_the_packages_of_its_extra_are_needed(
    bundle: Bundle, tmp_path: Path, missing: tuple[str, ...], message: str
) -> None:
    argv = [str(bundle.root), "--to", "triton", "--out", str(tmp_path / "out")]
    command = [sys.executable, "-c", BLOCKED.format(missing), *argv]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert re.search(message, done.stderr), done.stderr
    assert (tmp_path / "out" / "emoji-denoiser").is_dir() == (not message)
