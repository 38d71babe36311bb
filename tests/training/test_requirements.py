"""Laws of the checks before the first step: each bad case, built from the tiny folders, is refused by name."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model_state_dict
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from engines.families.base import Family, load_family
from tests.tiny_longcat import build_tiny_longcat
from tests.tiny_sd3 import build_tiny_sd3
from training.config import CDMConfig, ConsistencyConfig
from training.embeddings import EmbeddingTable, embed_in_memory
from training.errors import TrainingError, told_if_full
from training.merge import with_lora
from training.requirements import (
    Need,
    checkpoint_bytes,
    require_components,
    require_disk,
    require_embeddings,
    require_family,
    require_model,
    require_optimizer,
    require_prompts,
    require_same_shapes,
    require_shardable,
)


@pytest.fixture(scope="module")
def family(tiny_model: Path) -> Family:
    return load_family(tiny_model)


@pytest.fixture(scope="module")
def longcat(tmp_path_factory: pytest.TempPathFactory) -> Family:
    return load_family(build_tiny_longcat(tmp_path_factory.mktemp("longcat") / "tiny"))


@pytest.fixture
def adapter(tiny_model: Path, tmp_path: Path) -> Path:
    transformer = load_family(tiny_model).transformer
    transformer.add_adapter(LoraConfig(r=2, target_modules=["to_q", "net.0.proj"]))
    state = get_peft_model_state_dict(transformer)
    file = tmp_path / "lora.safetensors"
    named = {f"transformer.{name}": value.contiguous() for name, value in state.items()}
    save_file(named, file)
    return file


def test_what_is_right_passes(family, longcat, tiny_model, tmp_path):
    require_prompts(["a", "b"], 2)
    require_components(tiny_model)
    require_disk(tmp_path / "not" / "yet", [Need("checkpoints", 1)])
    for each in (family, longcat):
        require_model(each)
        require_embeddings(each, embed_in_memory(each, ["red apple"], torch.float32))


@pytest.mark.parametrize(
    ("texts", "message"),
    [([], "no prompts"), (["a", "b", "a"], r"2 distinct prompts .* --batch=3.*--batch=2")],
)
def test_fewer_prompts_than_a_batch_are_refused(texts, message):
    with pytest.raises(TrainingError, match=message):
        require_prompts(texts, 3)


def test_a_missing_component_is_named(tiny_model, tmp_path):
    folder = shutil.copytree(tiny_model, tmp_path / "copy")
    for weights in (folder / "vae").glob("*.safetensors"):
        weights.unlink()
    with pytest.raises(TrainingError, match=r"vae has no weights .* only config\.json"):
        require_components(folder)
    shutil.rmtree(folder / "text_encoder_2")
    with pytest.raises(TrainingError, match=r"lacks its component text_encoder_2"):
        require_components(folder)
    (folder / "model_index.json").unlink()
    with pytest.raises(TrainingError, match=r"model_index\.json cannot be read"):
        require_components(folder)


def test_an_autoencoder_of_other_latents_is_refused(tiny_model, longcat, tmp_path):
    family = load_family(tiny_model)
    family.vae = longcat.vae
    with pytest.raises(TrainingError, match="latents have 16 channels, the transformer takes 8"):
        require_model(family)


def test_latents_that_are_no_whole_patches_are_refused(tmp_path):
    family = load_family(build_tiny_sd3(tmp_path / "odd", sample_size=7))
    with pytest.raises(TrainingError, match=r"latents of 7×7 .* patches of 2×2; .* multiple of 16"):
        require_model(family)


def test_embeddings_of_another_model_are_refused(family, tmp_path):
    wide = load_family(build_tiny_sd3(tmp_path / "wide", joint_dim=80))
    with pytest.raises(TrainingError, match=r"encoder_hidden_states are 13×80 .* a width of 64"):
        require_embeddings(family, embed_in_memory(wide, ["a"], torch.float32))


def test_embeddings_that_are_not_finite_are_refused(family):
    empty = {name: value.fill_(torch.nan) for name, value in family.encode([""]).items()}
    with pytest.raises(TrainingError, match="empty prompt are not finite"):
        require_embeddings(family, EmbeddingTable([empty], [(0, 0)], empty))


def test_a_lora_for_another_base_is_refused_before_anything_is_written(tiny_model, adapter, tmp_path):
    wide = build_tiny_sd3(tmp_path / "wide", head_dim=8)
    other = build_tiny_longcat(tmp_path / "longcat")
    for folder in (wide, other):
        with pytest.raises(TrainingError, match=r"lora\.safetensors"):
            with_lora(folder, adapter, tmp_path / "merged")
    tensors = load_file(adapter)
    tensors.pop(next(name for name in tensors if "lora_B" in name))
    save_file(tensors, tmp_path / "half.safetensors")
    for file in (tmp_path / "half.safetensors", next((tiny_model / "transformer").glob("*.safetensors"))):
        with pytest.raises(TrainingError, match=file.name):
            with_lora(tiny_model, file, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()
    with_lora(tiny_model, adapter, tmp_path / "merged")
    assert (tmp_path / "merged" / "transformer").is_dir()


def test_a_damaged_component_is_named_before_anything_is_loaded(tiny_model, tmp_path):
    folder = shutil.copytree(tiny_model, tmp_path / "copy")
    weights = next((folder / "text_encoder").glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(TrainingError, match=rf"text_encoder/{weights.name} is damaged"):
        require_components(folder)


def test_a_pipeline_of_no_known_family_is_told_by_its_index(tiny_model, tmp_path):
    require_family(tiny_model)
    (tmp_path / "model_index.json").write_text('{"_class_name": "FluxPipeline"}')
    with pytest.raises(
        TrainingError, match="is a FluxPipeline; families known here: StableDiffusion3Pipeline"
    ):
        require_family(tmp_path)


def test_a_student_of_other_shapes_is_told_by_headers(tiny_model, tmp_path):
    require_same_shapes(tiny_model, tiny_model)
    wide = build_tiny_sd3(tmp_path / "wide", head_dim=8)
    with pytest.raises(TrainingError, match=r"--student=.*wide has another shape than the teacher"):
        require_same_shapes(wide, tiny_model)


def test_what_cannot_be_sharded_or_is_not_installed_is_told(monkeypatch):
    require_shardable(CDMConfig())
    with pytest.raises(TrainingError, match="cannot be sharded"):
        require_shardable(CDMConfig(optimizer="adamw8bit"))
    with pytest.raises(TrainingError, match="forward-mode derivatives"):
        require_shardable(ConsistencyConfig())
    monkeypatch.setattr("training.requirements.find_spec", lambda name: None)
    require_optimizer(CDMConfig())
    with pytest.raises(TrainingError, match="pip install bitsandbytes"):
        require_optimizer(CDMConfig(optimizer="adamw8bit"))


@pytest.mark.parametrize("error", [OSError(28, "No space left"), SafetensorError("I/O error: (os error 28)")])
def test_a_disk_that_fills_up_is_a_sentence(error, tmp_path):
    told = pytest.raises(TrainingError, match=f"no space for the student in {tmp_path}; make room")
    with told, told_if_full("the student", tmp_path):
        raise error
    with pytest.raises(PermissionError), told_if_full("the student", tmp_path):
        raise PermissionError(13, "no")


def test_a_full_disk_is_told_beforehand(tmp_path):
    needs = [Need("3 checkpoints", 10**18), Need("embeddings", 5 * 10**17)]
    with pytest.raises(TrainingError, match=r"needs 1500000\.0 TB \(3 checkpoints 1000000\.0 TB, embeddings"):
        require_disk(tmp_path / "run", needs)


def test_a_checkpoint_is_estimated_within_a_tenth(tiny_model, tmp_path):
    from tests.training.tiny_distillation import tiny_distillation
    from training.checkpoint import save

    work = tiny_distillation(tiny_model)
    work.iterate(0), work.iterate(1)
    path = save(tmp_path, 2, work.roles.tensors(), work.roles.counters())
    written = sum(file.stat().st_size for file in path.iterdir())
    count = sum(value.numel() for value in work.family.transformer.parameters())
    assert checkpoint_bytes(count, count, 2) == pytest.approx(written, rel=0.1)
    assert json.loads((path / "meta.json").read_text())["step"] == 2
