"""The sessions of `training/recipes_tuning.py`: a model on pictures, a student towards a fine-tuned teacher."""

from __future__ import annotations

import torch

from engines.export.source import find_student
from engines.families.base import Family
from training.distill import Method
from training.embeddings import EmbeddingTable
from training.finetune import Finetune
from training.keep import Keep, load_student, together
from training.pictures import encode_pictures, read_pictures
from training.prompts import Prompts
from training.recipes_tuning import FinetuneSettings, KeepSettings
from training.requirements import require_same_shapes
from training.roles import Roles
from training.session import run_session
from training.student_folder import TeacherHashes


def train_student(settings: KeepSettings, domain: Prompts, general: Prompts) -> int:
    """Fine-tune a distilled student, keeping what it could do; see `run_session`."""
    config, prompts = settings.config(), together(domain, general)
    teacher = find_student(settings.teacher).folder
    if teacher.is_dir() and settings.student.is_dir():
        require_same_shapes(settings.student, teacher)
    hashes = {
        "student_sha256": TeacherHashes.of(settings.student, "--student").transformer,
        "domain_sha256": domain.sha256(),
        "general_sha256": general.sha256(),
    }

    def method(family: Family, roles: Roles, table: EmbeddingTable) -> Method:
        old = load_student(settings.student, family.transformer)
        passes, micro = settings.pass_batch, settings.micro_batch
        return Keep(family, config, roles, old, domain, general, prompts, table, passes, micro)

    return run_session(settings, config, prompts, method, hashes)


def train_on_pictures(settings: FinetuneSettings) -> int:
    """Fine-tune a model on pictures by flow matching; see `run_session`."""
    config, pictures = settings.config(), read_pictures(settings.pictures)
    prompts = pictures.prompts()

    def method(family: Family, roles: Roles, table: EmbeddingTable) -> Method:
        latents_NCHW = encode_pictures(family, pictures, dtype=getattr(torch, config.dtype))
        return Finetune(family, config, roles, pictures, latents_NCHW, prompts, table, settings.micro_batch)

    return run_session(settings, config, prompts, method, {"pictures_sha256": pictures.sha256})
