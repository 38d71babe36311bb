"""From a recipe's settings to a student folder: load, embed, distil, draw grids, export."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from engines.families.base import Family, FamilyError, load_family
from training.distill import Distillation, distill
from training.errors import TrainingError
from training.prompts import EmbeddingTable, Prompts, embed_prompts
from training.recipes import RUNTIME_FIELDS, DistilSettings
from training.roles import Roles
from training.run import Run, config_sha256, numpy_generator
from training.samples import sample_latents, to_pixels, write_grid
from training.student_folder import StudentProvenance, teacher_licences, teacher_sha256, write_student

GRID_PROMPTS = 8
GRID_STEPS = (1, 2, 4)


def train(settings: DistilSettings, recipe: str, prompts: Prompts) -> int:
    """Distil, and write `OUT/student`.

    Raises:
        TrainingError: an unusable teacher, another run's folder, embeddings that do not fit, or `Diverged`.
    """
    torch.set_num_threads(settings.threads)
    config, device = settings.config(), _device(settings.device)
    licences = teacher_licences(settings.teacher)
    identity = {"teacher_sha256": teacher_sha256(settings.teacher), "prompts_sha256": prompts.sha256()}
    run = Run(
        settings.out, {**settings.model_dump(mode="json"), **identity}, config.steps, settings.save_minutes,
        free=(*RUNTIME_FIELDS, "steps"),
    )  # fmt: skip
    family = _load(settings.teacher)
    table = embed_prompts(family, prompts.texts, getattr(torch, config.dtype), settings.max_embedding_gb)
    drop_text_encoders(family)
    family.vae.to(device)
    roles = Roles(family.transformer, config, device)
    work = Distillation(family, config, roles, prompts, table, device, settings.pass_batch)

    def export(done: int) -> None:
        provenance = StudentProvenance(
            teacher=f"{settings.teacher.resolve().name} (transformer sha256 {identity['teacher_sha256'][:12]})",
            recipe=recipe,
            config_sha256=config_sha256(config.model_dump(mode="json")),
            steps_trained=done,
            licences=licences,
        )
        write_student(settings.teacher, settings.out / "student", roles.ema.average, provenance)

    def after(done: int) -> None:
        if settings.sample_every and (done % settings.sample_every == 0 or done == config.steps):
            draw_grid(settings.out / "samples" / f"step-{done:08d}.png", work, prompts, table)
        if settings.export_every and done % settings.export_every == 0 and done < config.steps:
            export(done)

    distill(work, run, after)
    export(config.steps)
    print(f"student after {config.steps} steps: {settings.out / 'student'}")
    return 0


def draw_grid(path: Path, work: Distillation, prompts: Prompts, table: EmbeddingTable) -> None:
    """Fixed prompts × 1, 2 and 4 steps of the averaged student; the prompts are listed once beside the first grid."""
    chosen = prompts.draw(numpy_generator(work.config.seed, 0, stream=1000), GRID_PROMPTS)
    cond, net = table.rows(chosen, work.device), work.roles.averaged()
    rows = []
    for steps in GRID_STEPS:
        latents = sample_latents(work.family, net, cond, range(GRID_PROMPTS), steps)
        with torch.no_grad():
            rows.append(to_pixels(work.family.decode(latents)))
    write_grid(path, rows)
    listing = path.with_name("prompts.json")
    if not listing.is_file():
        named: dict[str, Any] = {"rows_are_steps": GRID_STEPS, "columns": [prompts.texts[index] for index in chosen]}
        listing.write_text(json.dumps(named, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def drop_text_encoders(family: Family) -> None:
    """Free the text encoders' memory: every prompt is embedded. The family can encode no more."""
    for module in family.text_modules().values():
        module.to("meta")


def _load(folder: Path) -> Family:
    try:
        return load_family(folder, torch.float32)
    except FamilyError as error:
        raise TrainingError(f"--teacher: {error}") from error


def _device(name: str) -> torch.device:
    if name == "cuda" and not torch.cuda.is_available():
        raise TrainingError("--device cuda: torch finds no CUDA device here; use --device cpu")
    return torch.device(name)
