"""Fine-tuning of the tiny random-weight SD3, and of a student of it, in memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from engines.families.base import load_family
from tests.training.tiny_distillation import SMALL, TEXTS
from training.config import FinetuneConfig, KeepConfig
from training.embeddings import embed_in_memory
from training.finetune import Finetune
from training.keep import Keep, together
from training.parallel import Parallel
from training.pictures import Pictures
from training.prompts import Prompts
from training.roles import Computing, Roles

DOMAIN, GENERAL = ("flag of japan", "green apple"), TEXTS


def tiny_finetune(
    folder: Path, micro_batch: int = 0, parallel: Parallel | None = None, **changes: Any
) -> Finetune:
    base = {key: SMALL[key] for key in ("steps", "batch", "lr_student", "warmup", "dtype")}
    config = FinetuneConfig(**{**base, **changes})
    family = load_family(folder)
    pictures = Pictures(TEXTS, np.full(3, 1 / 3), lambda row: Image.new("RGB", (8, 8)), "")
    latents = torch.randn(
        (3, family.latent_channels, *family.latent_size), generator=torch.Generator().manual_seed(0)
    )
    prompts = pictures.prompts()
    table = embed_in_memory(family, prompts.texts, torch.float32)
    roles = Roles(family.transformer, config, parallel, Computing(family.fsdp_units, family.lora_targets))
    return Finetune(family, config, roles, pictures, latents, prompts, table, micro_batch)


def moved_student(folder: Path) -> torch.nn.Module:
    """A "student": the teacher's transformer, every weight 10 % larger."""
    student = load_family(folder).transformer
    with torch.no_grad():
        for value in student.parameters():
            value.mul_(1.1)
    return student


def tiny_keep(folder: Path, micro_batch: int = 0, parallel: Parallel | None = None, **changes: Any) -> Keep:
    config = KeepConfig(**{**SMALL, "fake_warmup": 2, **changes})
    family = load_family(folder)
    domain, general = (Prompts.of([(text, 1.0) for text in texts], "test") for texts in (DOMAIN, GENERAL))
    prompts = together(domain, general)
    table = embed_in_memory(family, prompts.texts, torch.float32)
    roles = Roles(family.transformer, config, parallel, Computing(family.fsdp_units, family.lora_targets))
    old = moved_student(folder)
    return Keep(family, config, roles, old, domain, general, prompts, table, 128, micro_batch)
