"""Laws of the checks before the first step: each bad case, built from the tiny folders, is refused by name."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model_state_dict
from safetensors.torch import load_file, save_file

from engines.families.base import Family, load_family
from tests.tiny_longcat import build_tiny_longcat
from tests.tiny_sd3 import build_tiny_sd3
from training.embeddings import EmbeddingTable, embed_in_memory
from training.errors import TrainingError
from training.requirements import (
    BASE_SHA256,
    Need,
    checkpoint_bytes,
    require_adapter,
    require_components,
    require_disk,
    require_embeddings,
    require_model,
    require_prompts,
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
    save_file(named, file, {BASE_SHA256: "a" * 64})
    return file


def test_what_is_right_passes(family, longcat, adapter, tiny_model, tmp_path):
    require_prompts(["a", "b"], 2)
    require_components(tiny_model)
    require_disk(tmp_path / "not" / "yet", [Need("checkpoints", 1)])
    for each in (family, longcat):
        require_model(each)
        require_embeddings(each, embed_in_memory(each, ["red apple"], torch.float32))
    require_adapter(family.transformer, adapter, "a" * 64)
    require_adapter(family.transformer, adapter)


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


def test_a_lora_for_another_base_is_refused(family, longcat, adapter, tmp_path):
    wide = load_family(build_tiny_sd3(tmp_path / "wide", head_dim=8))
    with pytest.raises(TrainingError, match=r"another base: .* is 32×32 here, its factors are 64×2 and 2×64"):
        require_adapter(wide.transformer, adapter)
    with pytest.raises(
        TrainingError, match=r"another base: \d+ of its \d+ targets are no layers of this LongCat"
    ):
        require_adapter(longcat.transformer, adapter)
    with pytest.raises(
        TrainingError, match=r"another base \(transformer sha256 aaaaaaaaaaaa\), this one is bbb"
    ):
        require_adapter(family.transformer, adapter, "b" * 64)


def test_a_file_that_is_no_whole_lora_is_refused(family, adapter, tmp_path, tiny_model):
    tensors = load_file(adapter)
    tensors.pop(next(name for name in tensors if "lora_B" in name))
    save_file(tensors, tmp_path / "half.safetensors")
    with pytest.raises(TrainingError, match="one factor of two"):
        require_adapter(family.transformer, tmp_path / "half.safetensors")
    with pytest.raises(TrainingError, match="holds no LoRA factors"):
        require_adapter(family.transformer, next((tiny_model / "transformer").glob("*.safetensors")))
    adapter.write_bytes(adapter.read_bytes()[:100])
    with pytest.raises(TrainingError, match="no readable LoRA"):
        require_adapter(family.transformer, adapter)


def test_a_full_disk_is_told_beforehand(tmp_path):
    needs = [Need("3 checkpoints", 10**18), Need("embeddings", 5 * 10**17)]
    with pytest.raises(
        TrainingError, match=r"needs 1500000000\.0 GB \(3 checkpoints 1000000000\.0 GB, embeddings"
    ):
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
