"""A student's LoRA as a file: every reader makes the same student of it, and one of another base is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import LongCatImagePipeline, StableDiffusion3Pipeline
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from engines.export.student import prepare_student
from engines.families.base import Family, load_family
from engines.families.loading import quiet
from engines.families.longcat import pack
from tests.folders import FOLDERS
from tests.tiny_sd3 import build_tiny_sd3
from tests.training.family_cases import CASES, SIZES, adapted, load
from training.adapter import AdapterRecord, require_base, save_adapter
from training.errors import Diverged, TrainingError
from training.lora import Adapters, fold
from training.student_folder import StudentProvenance, TeacherHashes, write_student

FILE = "pytorch_lora_weights.safetensors"
PROVENANCE = StudentProvenance("teacher", "test", "ab", 3)


@pytest.fixture(scope="module", params=CASES)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return FOLDERS[request.param](tmp_path_factory.mktemp("base") / request.param)


def record(folder: Path, family: Family, targets: str = "attention+ff") -> AdapterRecord:
    size = SIZES["student"]
    base = TeacherHashes.of(folder).transformer
    return AdapterRecord(base, "sd3_cdm", 3, size.rank, size.alpha, family.lora_targets[targets])


def trained(folder: Path, out: Path, targets: str = "attention+ff") -> Adapters:
    """A student on the base in `folder`, saved in `out`."""
    family = load(folder)
    adapters = adapted(family, targets=targets)
    save_adapter(out, adapters.parameters("student"), record(folder, family, targets))
    return adapters


def merged(adapters: Adapters) -> dict[str, Tensor]:
    """The plain transformer's weights with the student's adapter in them, as `training.session` writes them."""
    return fold(adapters.base(), adapters.parameters("student"), adapters.sizes["student"].scale)


# readers


def load_pipeline(folder: Path) -> Any:
    longcat = "LongCat" in (folder / "model_index.json").read_text(encoding="utf-8")
    with quiet():
        if longcat:
            pipeline = LongCatImagePipeline.from_pretrained(folder, text_processor=None)
        else:
            t5 = (folder / "text_encoder_3").is_dir()
            without = {} if t5 else {"text_encoder_3": None, "tokenizer_3": None}
            pipeline = StableDiffusion3Pipeline.from_pretrained(folder, **without)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@torch.no_grad()
def paint(pipeline: Any) -> Tensor:
    noise = torch.randn((1, 16, 8, 8), generator=torch.Generator().manual_seed(1))
    common = {
        "height": 64, "width": 64, "num_inference_steps": 2, "guidance_scale": 1.0, "output_type": "pt",
    }  # fmt: skip
    if isinstance(pipeline, LongCatImagePipeline):
        images: Tensor = pipeline(
            "red apple", latents=pack(noise), enable_prompt_rewrite=False, **common
        ).images
    else:
        images = pipeline("red apple", latents=noise, max_sequence_length=12, **common).images
    return images


def load_lora(pipeline: Any, lora: Path) -> None:
    """As people do: LongCat's pipeline has no loader, its transformer has."""
    if isinstance(pipeline, LongCatImagePipeline):
        pipeline.transformer.load_lora_adapter(str(lora), use_safetensors=True)
    else:
        pipeline.load_lora_weights(str(lora))


@pytest.mark.parametrize("metadata", [True, False], ids=["with-settings", "bare"])
def test_pipeline_with_the_adapter_paints_as_the_merged_student(
    folder: Path, tmp_path: Path, metadata: bool
) -> None:
    adapters = trained(folder, tmp_path / "lora")
    if not metadata:  # a reader that knows none takes alpha for the rank
        save_file(load_file(tmp_path / "lora" / FILE), tmp_path / "lora" / FILE)
    write_student(folder, tmp_path / "student", merged(adapters), PROVENANCE)
    student = paint(load_pipeline(tmp_path / "student"))
    pipeline = load_pipeline(folder)
    base = paint(pipeline)
    load_lora(pipeline, tmp_path / "lora")
    torch.testing.assert_close(paint(pipeline), student, atol=2e-5, rtol=0)
    assert (base - student).abs().max() > 1e-2


@pytest.mark.parametrize("targets", ["attention", "attention+ff"])
def test_export_merges_it_into_the_same_weights(folder: Path, tmp_path: Path, targets: str) -> None:
    adapters = trained(folder, tmp_path / "lora", targets)
    read = load_family(prepare_student(folder, tmp_path / "lora", tmp_path / "merged"), only=("transformer",))
    found = dict(read.transformer.named_parameters())
    wanted = merged(adapters)
    assert found.keys() == wanted.keys()
    for name, weight in wanted.items():
        torch.testing.assert_close(found[name].detach(), weight, atol=1e-6, rtol=0, msg=name)


def test_record_tells_what_the_adapter_is_of(folder: Path, tmp_path: Path) -> None:
    trained(folder, tmp_path / "lora")
    wanted = record(folder, load(folder))
    assert AdapterRecord.of(tmp_path / "lora") == AdapterRecord.of(tmp_path / "lora" / FILE) == wanted
    with safe_open(tmp_path / "lora" / FILE, framework="pt") as opened:
        settings = json.loads(opened.metadata()["lora_adapter_metadata"])
    assert (settings["transformer.r"], settings["transformer.lora_alpha"]) == (4, 4)
    assert [path.name for path in (tmp_path / "lora").iterdir()] == [FILE]


# mistakes


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_sd3(tmp_path_factory.mktemp("tiny") / "base")


def test_adapter_of_another_base_is_refused(tiny: Path, tmp_path: Path) -> None:
    trained(tiny, tmp_path / "lora")
    other = build_tiny_sd3(tmp_path / "other", seed=1)
    base, digest = TeacherHashes.of(tiny).transformer, TeacherHashes.of(other).transformer
    message = rf"LoRA of another base \(transformer sha256 {base[:12]}, this one is {digest[:12]}\); give the folder"
    with pytest.raises(TrainingError, match=message):
        require_base(tmp_path / "lora", digest)
    require_base(tmp_path / "lora", base)


def test_a_student_that_diverged_is_not_written(tiny: Path, tmp_path: Path) -> None:
    weights = {name: value.detach().clone() for name, value in load(tiny).transformer.named_parameters()}
    write_student(tiny, tmp_path / "student", weights, PROVENANCE)
    before = TeacherHashes.of(tmp_path / "student")
    next(iter(weights.values())).view(-1)[0] = float("inf")
    with pytest.raises(Diverged, match="is not finite; no student is written"):
        write_student(tiny, tmp_path / "student", weights, PROVENANCE)
    assert TeacherHashes.of(tmp_path / "student") == before


def test_a_record_that_is_not_understood_is_told(tiny: Path, tmp_path: Path) -> None:
    trained(tiny, tmp_path / "lora")
    save_file(load_file(tmp_path / "lora" / FILE), tmp_path / "lora" / FILE, {"cdm": '{"unheard": 1}'})
    with pytest.raises(TrainingError, match="record of its training that is not understood"):
        AdapterRecord.of(tmp_path / "lora")


def test_what_diverged_is_not_written_and_the_older_file_stays(tiny: Path, tmp_path: Path) -> None:
    adapters = trained(tiny, tmp_path / "lora")
    before = (tmp_path / "lora" / FILE).read_bytes()
    factors = {name: factor.detach().clone() for name, factor in adapters.parameters("student").items()}
    next(iter(factors.values()))[0, 0] = float("nan")
    with pytest.raises(Diverged, match=r"to_q\.lora_A\.weight is not finite|lora_A\.weight is not finite"):
        save_adapter(tmp_path / "lora", factors, record(tiny, load(tiny)))
    assert (tmp_path / "lora" / FILE).read_bytes() == before
