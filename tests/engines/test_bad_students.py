"""Whatever is wrong with a student or a disk: `cdm-export` says it in one sentence, exits with 2, and leaves no trace.

A bundle that stands at `--out` already stays as it was, byte for byte.
"""

from __future__ import annotations

import errno
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from safetensors.torch import load_file, save_file

import engines.bundle
import engines.export.export
import engines.export.onnx_file
import engines.files
from engines.bundle import FORMAT_VERSION, MANIFEST, load_bundle
from engines.errors import BundleError
from engines.export.graphs import TextEncoderGraph
from engines.export.main import main
from engines.families.base import INDEX
from tests.folders import FOLDERS

ROOT = Path(__file__).resolve().parents[2]
WEIGHTS = "diffusion_pytorch_model.safetensors"
Break = Callable[[Path], object]


def _index(**changes: object) -> Break:
    return _json(INDEX, **changes)


def _json(file: str, **changes: object) -> Break:
    def change(folder: Path) -> None:
        path = folder / file
        document = json.loads(path.read_text(encoding="utf-8"))
        path.write_text(json.dumps({**document, **changes}), encoding="utf-8")

    return change


def _write(file: str, text: str) -> Break:
    return lambda folder: (folder / file).write_text(text, encoding="utf-8")


def _tensors(file: str, change: Callable[[dict[str, torch.Tensor]], object]) -> Break:
    def rewrite(folder: Path) -> None:
        tensors = load_file(folder / file)
        change(tensors)
        save_file(tensors, folder / file, {"format": "pt"})

    return rewrite


def _first(tensors: dict[str, torch.Tensor], value: float) -> None:
    tensors[min(tensors)].view(-1)[0] = value


CASES: dict[str, tuple[Break, str]] = {
    "component missing": (lambda folder: shutil.rmtree(folder / "vae"), "lacks vae, which its model_index.json names"),
    "component that the index leaves out": (
        _index(text_encoder_2=[None, None]),
        "has no text_encoder_2 by its model_index.json, and StableDiffusion3Pipeline needs that; save or download the",
    ),
    "text encoder without its tokenizer": (_index(tokenizer=[None, None]), "has no tokenizer by its model_index.json"),
    "transformer left out": (_index(transformer=[None, None]), "has no transformer by its model_index.json"),
    "autoencoder left out": (_index(vae=[None, None]), "has no vae by its model_index.json"),
    "scheduler left out": (_index(scheduler=[None, None]), "has no scheduler by its model_index.json"),
    "scheduler of another class": (
        _index(scheduler=["diffusers", "DDIMScheduler"]),
        "has a DDIMScheduler as its scheduler; FlowMatchEulerDiscreteScheduler is needed",
    ),
    "a class of another library": (
        _index(vae=["somebody", "AutoencoderTiny"]),
        "has a somebody.AutoencoderTiny as its vae; diffusers or transformers's is needed",
    ),
    "one weight missing": (
        _tensors("text_encoder/model.safetensors", lambda tensors: tensors.pop(min(tensors))),
        "lacks text_model.embeddings.position_embedding.weight, 1 of the weights that a CLIPTextModelWithProjection of",
    ),
    "tokenizer that says no length": (
        lambda folder: (folder / "tokenizer" / "tokenizer_config.json").unlink(),
        "does not say how many tokens it makes of a prompt (model_max_length in tokenizer_config.json)",
    ),
    "configuration missing": (
        lambda folder: (folder / "vae" / "config.json").unlink(), "Error no file named config.json found",
    ),
    "weights missing": (
        lambda folder: (folder / "transformer" / WEIGHTS).unlink(),
        "transformer has no diffusion_pytorch_model.safetensors or model.safetensors (there is config.json); pickles",
    ),
    "index missing": (lambda folder: (folder / INDEX).unlink(), "model_index.json is missing or unreadable"),
    "index no JSON": (_write(INDEX, "{"), "model_index.json is missing or unreadable"),
    "index a list": (_write(INDEX, "[]"), "model_index.json is missing or unreadable"),
    "configuration no JSON": (_write("transformer/config.json", "{"), "is not a valid JSON file"),
    "setting of another type": (
        _json("scheduler/scheduler_config.json", shift="three"), "cannot be loaded as StableDiffusion3Pipeline",
    ),
    "tokenizer no JSON": (_write("tokenizer/tokenizer.json", "{"), "cannot be loaded as StableDiffusion3Pipeline"),
    "pipeline of another family": (
        _index(_class_name="FluxPipeline"),
        "names 'FluxPipeline'; families known here: StableDiffusion3Pipeline, LongCatImagePipeline",
    ),
    "component of another class": (
        _index(transformer=["diffusers", "FluxTransformer2DModel"]),
        "has a FluxTransformer2DModel as its transformer; SD3Transformer2DModel is needed",
    ),
    "component with code of its own": (
        _index(text_encoder=["pipeline", "MyEncoder"]),
        "has a MyEncoder as its text_encoder; CLIPTextModelWithProjection is needed",
    ),
    "NaN": (
        _tensors("text_encoder/model.safetensors", lambda tensors: _first(tensors, float("nan"))),
        "holds 1 values that are NaN or infinite, of 384; export a checkpoint from before training diverged",
    ),
    "infinity": (
        _tensors("text_encoder/model.safetensors", lambda tensors: _first(tensors, float("-inf"))),
        "holds 1 values that are NaN or infinite, of 384",
    ),
    "quantized": (
        _tensors(
            f"transformer/{WEIGHTS}",
            lambda tensors: tensors.update({"proj_out.weight": tensors["proj_out.weight"].to(torch.int8)}),
        ),
        "proj_out.weight is I8; weights in F64, F32, F16, BF16 are needed",
    ),
    "weights cut off": (
        lambda folder: os.truncate(folder / "vae" / WEIGHTS, 9000), "is no whole safetensors file",
    ),
    "a bundle": (
        lambda folder: (folder / MANIFEST).write_text("{}", encoding="utf-8"), "is a bundle already; name the student",
    ),
}  # fmt: skip


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """A bundle of an earlier export, by what the command knows it: its manifest."""
    folder = tmp_path / "bundles" / "out"
    folder.mkdir(parents=True)
    (folder / MANIFEST).write_text("the old manifest", encoding="utf-8")
    (folder / "denoiser.onnx").write_bytes(b"the old graph")
    return folder


def refused(student: Path, out: Path, capsys: pytest.CaptureFixture[str], *flags: str) -> str:
    """The one sentence; all else is as it was."""
    before = tree(out.parent)
    code = main([str(student), "--out", str(out), "--batches", "1", "--verify", "onnxruntime", *flags])
    lines = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("…")]
    assert code == 2
    assert tree(out.parent) == before
    assert len(lines) == 1, lines
    assert lines[0].startswith("cdm-export: error: ")
    return lines[0]


def tree(root: Path) -> dict[str, bytes | None]:
    return {
        path.relative_to(root).as_posix(): path.read_bytes() if path.is_file() else None
        for path in root.rglob("*")
    }


@pytest.mark.parametrize("case", CASES)
def test_what_is_wrong_with_a_student_is_said_and_nothing_is_left(
    student: Path, tmp_path: Path, out: Path, capsys: pytest.CaptureFixture[str], case: str
) -> None:
    break_it, message = CASES[case]
    folder = shutil.copytree(student, tmp_path / "student")
    break_it(folder)
    assert message in refused(folder, out, capsys)


def test_longcat_of_another_text_encoder_is_refused(
    tmp_path: Path, out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = FOLDERS["longcat"](tmp_path / "longcat")
    _index(text_encoder=["transformers", "Qwen2VLForConditionalGeneration"])(folder)
    assert (
        "has a Qwen2VLForConditionalGeneration as its text_encoder; Qwen2_5_VLForConditionalGeneration is needed"
        in refused(folder, out, capsys)
    )


def test_operation_that_onnx_has_not_is_told(
    student: Path, out: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    forward = TextEncoderGraph.forward

    def factored(self: Any, ids: torch.Tensor) -> tuple[torch.Tensor, ...]:
        states, pooled = forward(self, ids)
        return states, pooled + 0 * torch.linalg.lu_factor(states @ states.mT)[0].sum()

    monkeypatch.setattr(TextEncoderGraph, "forward", factored)
    message = refused(student, out, capsys)
    assert "TextEncoderGraph cannot be exported: " in message
    assert "lu_factor" in message


# disks


def _full(*_: object, **__: object) -> Any:
    raise OSError(errno.ENOSPC, "No space left on device")


def _full_at(call: Callable[..., Any], number: int) -> Callable[..., Any]:
    """`call`, for whose `number`th time there is no room."""
    made = 0

    def limited(*args: Any, **kwargs: Any) -> Any:
        nonlocal made
        made += 1
        return call(*args, **kwargs) if made != number else _full()

    return limited


def _fill(monkeypatch: pytest.MonkeyPatch, moment: str) -> None:
    """The disk is full from `moment` on; to be here soon, the export is of nothing but files."""
    save = engines.export.onnx_file.ir.save
    if moment == "graph":
        monkeypatch.setattr(engines.export.onnx_file.ir, "save", _full)
    elif moment == "weights beside a graph":
        monkeypatch.setattr(engines.export.onnx_file, "SINGLE_FILE_BYTES", 1000)
        monkeypatch.setattr(
            engines.export.onnx_file.ir, "save", lambda *args, **given: (save(*args, **given), _full())
        )
    else:
        monkeypatch.setattr(engines.export.export, "make_plan", lambda *_: _NoPlan())
        monkeypatch.setattr(engines.export.export, "verify", lambda bundle, *_: bundle.manifest)
        monkeypatch.setattr(engines.export.export, "Manifest", _Manifest)
        monkeypatch.setattr(engines.export.export, "load_bundle", lambda root: _Manifest())
    if moment == "tokenizer":
        monkeypatch.setattr(Path, "write_text", _full)
    elif moment == "manifest":
        monkeypatch.setattr(engines.bundle, "write_text_atomically", _full)
    elif moment == "to the disk":
        monkeypatch.setattr(os, "fsync", _full)
    elif moment == "rename":
        monkeypatch.setattr(Path, "rename", _full)
    elif moment == "second rename":
        monkeypatch.setattr(Path, "rename", _full_at(Path.rename, 2))


class _NoPlan:
    """The plan of an export without components."""

    text_lengths: ClassVar[dict[str, int]] = {}

    def sigmas(self, *_: object) -> tuple[float, ...]:
        return (1.0, 0.0)

    def stages(self, _: object) -> tuple[()]:
        return ()


class _Manifest:
    """A manifest of no components, which the real one refuses."""

    def __init__(self, **_: object) -> None:
        self.manifest = self

    def model_dump(self, **_: object) -> dict[str, object]:
        return {}


@pytest.mark.parametrize(
    "moment",
    ["graph", "weights beside a graph", "tokenizer", "manifest", "to the disk", "rename", "second rename"],
)
def test_disk_that_is_full_at_any_moment_is_told_and_the_old_bundle_stands(
    student: Path, out: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    _fill(monkeypatch, moment)
    try:
        message = refused(student, out, capsys)
    finally:
        monkeypatch.undo()
    assert "cannot be written: No space left on device" in message


def test_export_that_nothing_stops_replaces_the_old_bundle(
    student: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same short-cut, so that the test above fails for the disk alone."""
    _fill(monkeypatch, "never")
    assert engines.export.export.export_bundle(student, out, engines.export.export.ExportOptions()).bytes > 0
    assert json.loads((out / MANIFEST).read_text(encoding="utf-8")) == {}
    assert [path.name for path in out.parent.iterdir()] == ["out"]


def test_ended_export_leaves_nothing(student: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """SIGTERM, as a scheduler or `docker stop` sends it, in the middle of the first component."""
    before = tree(out.parent)

    def ended(*_: object) -> None:
        assert len(list(out.parent.iterdir())) == 2  # the bundle that was there, and the one in the making
        os.kill(os.getpid(), signal.SIGTERM)

    handler = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(engines.export.export, "run_stage", ended)
    with pytest.raises(SystemExit) as ending:
        main([str(student), "--out", str(out)])
    assert ending.value.code == 143
    assert tree(out.parent) == before
    assert signal.getsignal(signal.SIGTERM) is handler


LIMITED = """
import resource, sys
from engines.export.main import main
import torch
torch.set_num_threads(1)
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]),) * 2)
sys.exit(main(sys.argv[2:]))
"""


@pytest.mark.slow
def test_command_on_a_disk_without_room_ends_with_one_sentence(student: Path, out: Path) -> None:
    """The kernel refuses the write, as a full disk does, in a process of its own."""
    before = tree(out.parent)
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, "40000", str(student), "--out", str(out)],
        cwd=ROOT, capture_output=True, text=True, check=False, timeout=300,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_CORE, (0, 0)),
    )  # fmt: skip
    assert done.returncode == 2, done.stderr
    assert done.stderr.splitlines()[-1].endswith("text_encoder.onnx cannot be written: File too large")
    assert "Traceback" not in done.stderr
    assert tree(out.parent) == before


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda out: out.write_text("mine", encoding="utf-8"),
            "exists and is not a bundle; give another --out",
        ),
        (lambda out: (out.mkdir(), (out / "a").touch()), "exists and is not a bundle; give another --out"),
        (lambda out: shutil.rmtree(out.parent) or out.parent.touch(), "cannot be written: "),
    ],
    ids=["file", "another folder", "below a file"],
)
def test_out_that_is_something_else_is_left_alone(
    student: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], make: Break, message: str
) -> None:
    (tmp_path / "bundles").mkdir()
    make(tmp_path / "bundles" / "mine")
    before = tree(tmp_path)
    assert main([str(student), "--out", str(tmp_path / "bundles" / "mine")]) == 2
    assert message in capsys.readouterr().err.splitlines()[-1]
    assert tree(tmp_path) == before


# bundles


@pytest.mark.parametrize("version", [FORMAT_VERSION + 1, FORMAT_VERSION - 1, "2", None, 2.5])
def test_bundle_of_another_version_is_told_with_both_versions(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], version: object
) -> None:
    folder = tmp_path / "newer"
    folder.mkdir()
    (folder / MANIFEST).write_text(json.dumps({"format_version": version, "new": 1}), encoding="utf-8")
    with pytest.raises(BundleError) as error:
        load_bundle(folder)
    assert str(error.value).startswith(
        f"{folder} has bundle format {version!r}, this version serves {FORMAT_VERSION};"
    )
    newer = version == FORMAT_VERSION + 1
    assert str(error.value).endswith(
        "install the cdm-serve that wrote it" if newer else "export it again with cdm-export"
    )
    assert main([str(folder), "--to", "triton", "--out", str(tmp_path / "repository")]) == 2
    assert f"has bundle format {version!r}, this version serves" in capsys.readouterr().err
    assert not (tmp_path / "repository").exists()
