"""A distillation of the tiny random-weight SD3, in memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from engines.families.base import load_family
from training.config import CDMConfig
from training.distill import Distillation
from training.prompts import Prompts, embed_prompts
from training.roles import Roles

TEXTS = ("red apple", "green apple", "face with tears")


SMALL = {
    "n_max": 4,
    "steps": 6,
    "batch": 4,
    "lr_student": 1e-3,
    "lr_fake": 1e-3,
    "warmup": 2,
    "dtype": "float32",
}


def tiny_config(**changes: Any) -> CDMConfig:
    return CDMConfig(**{**SMALL, **changes})


def tiny_distillation(folder: Path, pass_batch: int = 128, **changes: Any) -> Distillation:
    config = tiny_config(**changes)
    family = load_family(folder)
    prompts = Prompts.of([(text, 1.0) for text in TEXTS], "test")
    table = embed_prompts(family, prompts.texts, getattr(torch, config.dtype))
    return Distillation(family, config, Roles(family.transformer, config), prompts, table, pass_batch)
