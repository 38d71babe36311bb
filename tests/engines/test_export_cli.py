"""`cdm-export STUDENT --lora`: an adapter reaches the graphs, and what is wrong with either is one sentence."""

from __future__ import annotations

import json
import re
import resource
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from huggingface_hub import constants
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file

from engines.base import EngineOptions, GraphEngine, load_engine
from engines.bundle import MODEL, PROVENANCE, Bundle, load_bundle
from engines.export.main import main
from engines.export.student import prepare_student
from engines.fake import fake_bundle
from engines.families.base import Family, load_family
from engines.files import sha256_file
from tests.conftest import PROVENANCE_DOCUMENT
from tests.engines.adapters import ADAPTER, WEIGHTS, save_diffusers, save_peft, store
from tests.engines.hub import files_of, fill_cache

QUICK = ("--verify", "onnxruntime", "--batches", "1")
SIGMA = 0.4


def _x() -> torch.Tensor:
    return torch.randn((1, 8, 8, 8), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def by_torch(family: Family) -> dict[str, NDArray[Any]]:
    """What text encoders and denoiser give for one prompt and one step."""
    ids = family.tokenize(["red apple"])
    outputs: dict[str, torch.Tensor] = {}
    for encoder in family.text_encoders():
        outputs |= zip(encoder.outputs, encoder.module(ids[encoder.input]), strict=True)
    v = family.velocity(family.transformer, _x(), torch.tensor([SIGMA]), family.join(outputs))
    return {name: tensor.numpy() for name, tensor in {**outputs, "x0": _x() - SIGMA * v}.items()}


def by_bundle(bundle: Bundle, family: Family) -> dict[str, NDArray[Any]]:
    engine = load_engine(bundle, EngineOptions("onnxruntime", "f32", threads=1))
    assert isinstance(engine, GraphEngine)
    ids = family.tokenize(["red apple"])
    outputs: dict[str, NDArray[Any]] = {}
    for encoder in family.text_encoders():
        outputs |= engine.run(encoder.component, {encoder.input: ids[encoder.input].numpy()})
    sigmas = {"sigma": np.array([SIGMA], np.float32), "sigma_next": np.zeros(1, np.float32)}
    step = engine.run("denoiser", {"x": _x().numpy(), **sigmas, **outputs})
    engine.close()
    return {**outputs, "x0": step["x0"]}


def error_of(a: NDArray[Any], b: NDArray[Any]) -> float:
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


@pytest.mark.slow
def test_bundle_of_a_base_on_the_hub_and_an_adapter_is_the_two_merged(
    student: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    fill_cache(tmp_path / "cache", "someone/base", files_of(student))
    lora, out = save_diffusers(student, tmp_path / "lora", metadata=True), tmp_path / "new" / "bundle"
    assert main(["someone/base", "--lora", str(lora), "--out", str(out), "--weights", *QUICK]) == 0
    assert f"{out}: base" in capsys.readouterr().out  # not named after a temporary folder, or a commit
    assert [path.name for path in out.parent.iterdir()] == ["bundle"]
    assert out.stat().st_mode & 0o777 == 0o755

    bundle = load_bundle(out)
    adapter = f"{ADAPTER} (sha256 {sha256_file(lora / ADAPTER)})"
    recipe = f"{PROVENANCE_DOCUMENT['recipe']} + LoRA {adapter}"
    found = bundle.manifest.provenance.model_dump(exclude={"tools"}, mode="json")
    # Metrics were measured without the adapter.
    assert found == {**PROVENANCE_DOCUMENT, "recipe": recipe, "metrics": {}}

    merged = prepare_student(student, lora, tmp_path / "merged")
    family = load_family(merged)
    graphs, wanted, plain = by_bundle(bundle, family), by_torch(family), by_torch(load_family(student))
    assert list(graphs) == ["clip_states", "clip_pooled", "clip_states_2", "clip_pooled_2", "x0"]
    for name, array in graphs.items():
        assert error_of(array, wanted[name]) < 1e-2, name
        assert error_of(array, plain[name]) > 5e-2, name
    weights = Path("transformer", WEIGHTS)  # the torch engine gets the same model
    assert (out / MODEL / weights).read_bytes() == (merged / weights).read_bytes()


# mistakes

Break = Callable[[Path, Path], None]
"""Changes the student and its adapter."""


def _index(name: str, entry: Any) -> Break:
    def change(student: Path, _: Path) -> None:
        path = student / "model_index.json"
        index = {**json.loads(path.read_text(encoding="utf-8")), name: entry}
        path.write_text(json.dumps(index), encoding="utf-8")

    return change


def _stored(component: str, file: str, name: str, dtype: torch.dtype) -> Break:
    return lambda student, _: store(student / component / file, name, dtype)


def _narrower(student: Path, _: Path) -> None:
    path = student / "text_encoder" / "config.json"
    config = {**json.loads(path.read_text(encoding="utf-8")), "projection_dim": 48}
    path.write_text(json.dumps(config), encoding="utf-8")


def _worse_adapter(_: Path, lora: Path) -> None:
    file = lora / "adapter_model.safetensors"
    tensors = {name: tensor * float("nan") for name, tensor in load_file(file).items()}
    save_file(tensors, file)


def _bare(student: Path, _: Path) -> None:
    shutil.rmtree(student)
    student.write_text("not a folder", encoding="utf-8")


MISTAKES: dict[str, tuple[Break, str]] = {
    "nothing there": (lambda student, _: shutil.rmtree(student), r"student is not a diffusers folder \(nothing is"),
    "a file": (_bare, r"student is not a diffusers folder: model_index\.json is missing"),
    "component outside": (_index("../lora", ["diffusers", "X"]), r"names a component '\.\./lora', which is no folder"),
    "float8": (
        _stored("transformer", WEIGHTS, "proj_out.weight", torch.float8_e4m3fn),
        rf"transformer/{WEIGHTS}: proj_out\.weight is F8_E4M3; weights in F64, F32, F16, BF16 are needed",
    ),
    "another width": (_narrower, r"student cannot be loaded as StableDiffusion3Pipeline: "),
    "wrong provenance": (
        lambda student, _: (student / PROVENANCE).write_text("{}", encoding="utf-8"),
        r"provenance\.json is invalid: .*teacher",
    ),
    "no adapter": (lambda _, lora: shutil.rmtree(lora), r"there is no adapter .*lora; give a file or folder as diff"),
    "NaN in adapter": (_worse_adapter, r"lora_A\.weight holds values that are no finite numbers"),
}  # fmt: skip


@pytest.mark.parametrize("case", MISTAKES)
def test_a_mistake_is_one_sentence_and_leaves_nothing(
    student: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], case: str
) -> None:
    break_it, message = MISTAKES[case]
    folder, lora = shutil.copytree(student, tmp_path / "student"), save_peft(student, tmp_path / "lora")
    break_it(folder, lora)
    before = sorted(path.name for path in tmp_path.iterdir())
    with_lora = ["--lora", str(lora)] if "adapter" in case else []
    refused(capsys, [str(folder), *with_lora, "--out", str(tmp_path / "out"), *QUICK], message)
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def refused(capsys: pytest.CaptureFixture[str], argv: list[str], message: str) -> None:
    assert main(argv) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("cdm-export: error: ")]
    assert len(errors) == 1
    assert re.search(message, errors[0]), errors[0]


def test_full_disk_while_merging_leaves_the_old_bundle(
    student: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A limit on file sizes stands in for the disk: the kernel refuses the same writes."""
    lora, out = save_peft(student, tmp_path / "lora"), tmp_path / "out"
    out.mkdir()
    old = fake_bundle(out)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, before[1]))
    try:
        argv = [str(student), "--lora", str(lora), "--out", str(out)]
        refused(capsys, argv, r"out cannot be written: transformer: .*File too large")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["lora", "out"]
    assert load_bundle(out).sha256 == old.sha256


def test_a_bundle_is_no_student(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "fake").mkdir()
    argv = [str(fake_bundle(tmp_path / "fake").root), "--out", str(tmp_path / "out")]
    refused(
        capsys, argv, r"fake is a bundle already; name the student it was exported from, or add --to triton"
    )
