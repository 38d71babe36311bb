"""LoRA adapters of the tiny student, saved as diffusers and as PEFT save them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from diffusers import StableDiffusion3Pipeline
from diffusers.training_utils import _collate_lora_metadata
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from safetensors.torch import load_file, save_file

from engines.families.base import Family, load_family
from engines.families.loading import quiet

ATTENTION = ["attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0"]
WEIGHTS = "diffusion_pytorch_model.safetensors"
ADAPTER = "pytorch_lora_weights.safetensors"


def settings(targets: list[str], **changes: Any) -> LoraConfig:
    """Rank 4, and neither alpha nor the second block's rank equal to it; both matrices random."""
    return LoraConfig(
        **{
            "r": 4,
            "lora_alpha": 7,
            "rank_pattern": {"transformer_blocks.1.attn.to_q": 2},
            "alpha_pattern": {"transformer_blocks.0.attn.to_v": 3},
            "target_modules": targets,
            "init_lora_weights": False,
            **changes,
        }
    )


def load_pipeline(folder: Path) -> StableDiffusion3Pipeline:
    with quiet():
        return StableDiffusion3Pipeline.from_pretrained(folder, text_encoder_3=None, tokenizer_3=None)


def save_diffusers(student: Path, folder: Path, metadata: bool, **changes: Any) -> Path:
    """Adapters of the transformer and of both CLIPs, as diffusers' training scripts save them."""
    pipeline = load_pipeline(student)
    modules: dict[str, Any] = {}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        pipeline.transformer.add_adapter(settings([*ATTENTION, "ff.net.2"], **changes))
        modules["transformer"] = pipeline.transformer
        for name in ("text_encoder", "text_encoder_2"):
            encoder = getattr(pipeline, name)
            encoder.add_adapter(settings(["q_proj", "fc1"], rank_pattern={}, alpha_pattern={}))
            modules[name] = encoder
    StableDiffusion3Pipeline.save_lora_weights(
        folder,
        **{f"{name}_lora_layers": get_peft_model_state_dict(module) for name, module in modules.items()},
        **(_collate_lora_metadata(modules) if metadata else {}),
    )
    return folder


def save_peft(student: Path, folder: Path, **changes: Any) -> Path:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(4)
        wrapped = get_peft_model(
            load_family(student, only=("transformer",)).transformer, settings(ATTENTION, **changes)
        )
        for name, parameter in wrapped.named_parameters():
            if "modules_to_save" in name:
                torch.nn.init.normal_(parameter)
        wrapped.save_pretrained(folder)
    return folder


@torch.no_grad()
def velocity(family: Family, transformer: Any) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    conditioning = {
        "encoder_hidden_states": torch.randn((2, 5, 64), generator=generator),
        "pooled_projections": torch.randn((2, 64), generator=generator),
    }
    x = torch.randn((2, 8, 6, 8), generator=generator)
    return family.velocity(transformer, x, torch.tensor([1.0, 0.4]), conditioning)


def store(file: Path, name: str, dtype: torch.dtype) -> None:
    """Change the dtype of one tensor in a file."""
    tensors = load_file(file)
    tensors[name] = tensors[name].to(dtype)
    save_file(tensors, file)


def shard(folder: Path) -> Path:
    """Two files and an index, as published transformers have them."""
    whole = folder / "transformer" / WEIGHTS
    tensors = load_file(whole)
    whole.unlink()
    stem, weight_map = "diffusion_pytorch_model", {}
    for number in (1, 2):
        file = f"{stem}-0000{number}-of-00002.safetensors"
        part = {
            name: tensor for index, (name, tensor) in enumerate(tensors.items()) if index % 2 == number - 1
        }
        save_file(part, folder / "transformer" / file, {"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "transformer" / f"{stem}.safetensors.index.json").write_text(
        json.dumps(index), encoding="utf-8"
    )
    return folder / "transformer" / f"{stem}-00002-of-00002.safetensors"
