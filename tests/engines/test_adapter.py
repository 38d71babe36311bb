"""A base with an adapter is what diffusers, or PEFT, makes of the two."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import LongCatImageTransformer2DModel, StableDiffusion3Pipeline
from peft import PeftModel
from safetensors.torch import load_file, save_file

from engines.export.adapter import read_adapter
from engines.export.student import prepare_student
from engines.families.base import load_family
from tests.engines.adapters import ADAPTER, load_pipeline, save_diffusers, save_peft, settings, velocity


@pytest.fixture(scope="module")
def base(student: Path) -> StableDiffusion3Pipeline:
    return load_pipeline(student)


@pytest.fixture(scope="module")
def adapter(student: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_diffusers(student, tmp_path_factory.mktemp("adapters") / "diffusers", metadata=True)


@torch.no_grad()
def embeddings(pipeline: Any) -> tuple[torch.Tensor, torch.Tensor]:
    text, _, pooled, _ = pipeline.encode_prompt(
        ["red apple", ""], None, None, do_classifier_free_guidance=False, max_sequence_length=12
    )
    return text, pooled


@pytest.mark.parametrize("metadata", [True, False], ids=["alpha-in-metadata", "alpha-is-rank"])
def test_merged_folder_is_what_diffusers_makes_of_base_and_adapter(
    student: Path, base: StableDiffusion3Pipeline, tmp_path: Path, metadata: bool
) -> None:
    lora = save_diffusers(student, tmp_path / "lora", metadata)
    merged = load_family(prepare_student(student, lora, tmp_path / "merged"))
    loaded = load_pipeline(student)
    loaded.load_lora_weights(str(lora))
    theirs = velocity(merged, loaded.transformer)
    torch.testing.assert_close(velocity(merged, merged.transformer), theirs, atol=1e-5, rtol=0)
    assert (theirs - velocity(merged, base.transformer)).abs().max() > 0.1
    pairs = zip(embeddings(merged.pipeline), embeddings(loaded), embeddings(base), strict=True)  # type: ignore[attr-defined]
    for mine, wanted, plain in pairs:
        torch.testing.assert_close(mine, wanted, atol=1e-5, rtol=0)
        assert (wanted - plain).abs().max() > 0.01


@pytest.mark.parametrize(
    "changes",
    [{}, {"use_rslora": True}, {"use_dora": True}, {"modules_to_save": ["proj_out"]}],
    ids=["plain", "rslora", "dora", "whole-module"],
)
def test_merged_peft_adapter_is_what_peft_computes(
    student: Path, tmp_path: Path, changes: dict[str, Any]
) -> None:
    lora = save_peft(student, tmp_path / "lora", **changes)
    merged = load_family(prepare_student(student, lora, tmp_path / "merged"))
    transformer = load_family(student, only=("transformer",)).transformer
    plain = velocity(merged, transformer)
    wrapped = PeftModel.from_pretrained(transformer, str(lora)).eval()
    theirs = velocity(merged, wrapped.base_model.model)
    torch.testing.assert_close(velocity(merged, merged.transformer), theirs, atol=1e-5, rtol=0)
    assert (theirs - plain).abs().max() > 0.1


def test_adapter_may_be_named_by_its_file(student: Path, tmp_path: Path, adapter: Path) -> None:
    peft = save_peft(student, tmp_path / "peft")
    for folder, file in ((adapter, ADAPTER), (peft, "adapter_model.safetensors")):
        by_folder, by_file = read_adapter(folder), read_adapter(folder / file)
        assert (by_file.path, by_file.settings, by_file.folder) == (
            by_folder.path,
            by_folder.settings,
            by_folder.folder,
        )
        torch.testing.assert_close(by_file.tensors, by_folder.tensors, atol=0, rtol=0)


def test_names_from_before_peft_are_understood(student: Path, tmp_path: Path, adapter: Path) -> None:
    tensors = {
        name: tensor
        for name, tensor in load_file(adapter / ADAPTER).items()
        if not name.startswith("text_encoder_2")
    }
    old = {
        name.replace(".lora_A.", ".lora.down.").replace(".lora_B.", ".lora.up.")
        if name.startswith("transformer.")
        else name.replace(".lora_A.", ".lora_linear_layer.down.").replace(
            ".lora_B.", ".lora_linear_layer.up."
        ): tensor
        for name, tensor in tensors.items()
    }
    for folder, content in (("new", tensors), ("old", old)):
        (tmp_path / folder).mkdir()
        save_file(content, tmp_path / folder / ADAPTER)
        prepare_student(student, tmp_path / folder, tmp_path / f"{folder}-merged")
    for name in ("transformer", "text_encoder"):
        (new,) = (tmp_path / "new-merged" / name).glob("*.safetensors")
        assert (tmp_path / "old-merged" / name / new.name).read_bytes() == new.read_bytes(), name


def test_longcat_takes_an_adapter_without_prefix_and_one_of_its_text_encoder(tmp_path: Path) -> None:
    from tests.tiny_longcat import build_tiny_longcat

    folder = build_tiny_longcat(tmp_path / "longcat")
    transformer = LongCatImageTransformer2DModel.from_pretrained(folder / "transformer")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        transformer.add_adapter(
            settings(["attn.to_q", "proj_mlp"], rank_pattern={}, alpha_pattern={}), adapter_name="default"
        )
    transformer.save_lora_adapter(tmp_path / "lora")
    merged = prepare_student(folder, tmp_path / "lora", tmp_path / "merged")
    mine = LongCatImageTransformer2DModel.from_pretrained(merged / "transformer")
    generator = torch.Generator().manual_seed(1)
    inputs = {
        "hidden_states": torch.randn((1, 6, 64), generator=generator),
        "encoder_hidden_states": torch.randn((1, 4, 32), generator=generator),
        "timestep": torch.tensor([0.7]),
        "txt_ids": torch.zeros(4, 3),
        "img_ids": torch.ones(6, 3),
        "return_dict": False,
    }
    with torch.no_grad():
        theirs = transformer(**inputs)[0]
        torch.testing.assert_close(mine(**inputs)[0], theirs, atol=1e-5, rtol=0)
        transformer.disable_lora()
        assert (theirs - transformer(**inputs)[0]).abs().max() > 0.1
