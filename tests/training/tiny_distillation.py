"""A distillation of the tiny random-weight SD3, in memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from engines.families.base import load_family
from training.config import CDMConfig
from training.distill import ROLLOUT, STUDENT, Distillation, Part
from training.draws import Draws
from training.embeddings import embed_in_memory
from training.prompts import Prompts
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


def tiny_distillation(
    folder: Path, pass_batch: int = 128, micro_batch: int = 0, **changes: Any
) -> Distillation:
    config = tiny_config(**changes)
    family = load_family(folder)
    prompts = Prompts.of([(text, 1.0) for text in TEXTS], "test")
    table = embed_in_memory(family, prompts.texts, getattr(torch, config.dtype))
    return Distillation(
        family, config, Roles(family.transformer, config), prompts, table, pass_batch, micro_batch
    )


def tiny_part(work: Distillation, step: int = 0, prompts: tuple[int, ...] = (0, 1, 2, 0)) -> Part:
    """The whole batch of an iteration at its anchors."""
    cond, rows = work.table.rows(np.array(prompts)), range(len(prompts))
    draws = Draws(work.config.seed, step, ROLLOUT, rows, work.device)
    return Part(rows, cond, work.rollout(work.schedule(step), cond, draws))


def student_draws(work: Distillation, step: int = 0) -> Draws:
    return Draws(work.config.seed, step, STUDENT, range(work.config.batch), work.device)
