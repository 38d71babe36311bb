"""The first losses of every recipe on tiny random-weight teachers: written once, compared ever after.

python -m tests.training.golden        # after a change that is meant to change them; the diff goes into the review
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from engines.families.base import load_family
from tests.folders import FOLDERS
from tests.training.tiny_tuning import tiny_finetune, tiny_keep
from training.config import CDMConfig, ConsistencyConfig, FinetuneConfig, KeepConfig, OptimConfig
from training.consistency import Consistency
from training.distill import Distillation, Method
from training.embeddings import embed_in_memory
from training.prompts import Prompts
from training.recipes import emoji_cdm, emoji_consistency, longcat_cdm, sd3_cdm, sd3_consistency, sd35_cdm
from training.recipes_tuning import emoji_keep, finetune, keep
from training.roles import Roles
from training.variants import VARIANTS, changes

GOLDEN = Path(__file__).parent / "golden.json"
STEPS = 20
TEXTS = ("red apple", "green apple", "face with tears")
RECIPES: dict[str, tuple[str, Callable[[], OptimConfig]]] = {
    "sd3-cdm": ("sd3-medium", sd3_cdm),
    "sd35-cdm": ("sd35-medium", sd35_cdm),
    "longcat-cdm": ("longcat", longcat_cdm),
    "sd3-consistency": ("sd3-medium", sd3_consistency),
    "emoji-consistency": ("emoji", emoji_consistency),
    "finetune": ("sd3-medium", finetune),
    "finetune-student": ("sd3-medium", keep),
    "emoji-finetune-student": ("emoji", emoji_keep),
}
"""Recipe → folder of `tests/folders.py`, config; emoji's CDM ones are made of the variants."""


def cases() -> Iterator[tuple[str, str, OptimConfig]]:
    """Name, folder, config of every recipe and variant."""
    for name, (folder, recipe) in RECIPES.items():
        yield name, folder, recipe()
    for variant in VARIANTS:
        base = emoji_cdm()
        config = CDMConfig(**{**base.model_dump(), **changes(variant, base, "emoji")})
        yield f"emoji-cdm {variant}", "emoji", config


def first_losses(teacher: Path, config: OptimConfig) -> dict[str, list[float]]:
    """Every logged loss of the first 20 iterations, by name; float32, two prompts a step, one thread."""
    shorter = {"batch": 2, "dtype": "float32", "warmup": 10, "n_max": 8, "fake_warmup": 4}
    update = {name: value for name, value in shorter.items() if name in type(config).model_fields}
    small = config.model_copy(update=update)
    torch.set_num_threads(1)
    work = _work(teacher, small)
    losses: dict[str, list[float]] = {}
    for step in range(STEPS):
        for name, value in work.iterate(step).items():
            if name in ("fake", "ca", "dm", "cdm", "student", "loss", "tangent", "flow_loss", "keep"):
                losses.setdefault(name, []).append(float(f"{value:.6g}"))
    return losses


def _work(teacher: Path, small: OptimConfig) -> Method:
    if isinstance(small, FinetuneConfig):
        return tiny_finetune(teacher, **small.model_dump())
    if isinstance(small, KeepConfig):
        return tiny_keep(teacher, **small.model_dump())
    family = load_family(teacher)
    family.latent_size = (8, 8)
    prompts = Prompts.of([(text, 1.0) for text in TEXTS], "golden")
    table = embed_in_memory(family, prompts.texts, torch.float32)
    roles = Roles(family.transformer, small)
    if isinstance(small, CDMConfig):
        return Distillation(family, small, roles, prompts, table)
    assert isinstance(small, ConsistencyConfig)
    return Consistency(family, small, roles, prompts, table)


def main() -> None:
    """Write `golden.json` anew."""
    with tempfile.TemporaryDirectory() as scratch:
        folders = {name: FOLDERS[name](Path(scratch) / name) for name in {folder for _, folder, _ in cases()}}
        golden = {name: first_losses(folders[folder], config) for name, folder, config in cases()}
    GOLDEN.write_text(json.dumps(golden, indent=1) + "\n")


if __name__ == "__main__":
    main()
