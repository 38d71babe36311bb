"""The whole objective on a flow whose target is known exactly."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.training.toy_flow import PROMPTS, ToyFamily, sliced_wasserstein, true_samples
from training.config import CDMConfig
from training.distill import Distillation, distill
from training.prompts import Prompts, embed_prompts
from training.roles import Roles
from training.run import Run
from training.sampling import sample

CONFIG = CDMConfig(
    n_max=4, guidance=0.3, steps=700, batch=128, lr_student=2e-3, lr_fake=4e-3, warmup=20, ema_decay=0.98, dtype="float32",
)  # fmt: skip


def error(family: ToyFamily, net: torch.nn.Module, steps: int) -> float:
    family.transformer = net
    total = 0.0
    for prompt in PROMPTS:
        cond = family.encode([prompt] * 1500)
        made = sample(family, cond, family.sigmas(steps), range(1500)).flatten(1)
        total += sliced_wasserstein(made, true_samples(prompt, 1500, seed=7)) / len(PROMPTS)
    return total


@pytest.fixture(scope="module")
def distilled(tmp_path_factory: pytest.TempPathFactory) -> tuple[ToyFamily, Roles]:
    family = ToyFamily()
    prompts = Prompts.of([(prompt, 1.0) for prompt in PROMPTS], "toy")
    table = embed_prompts(family, prompts.texts, torch.float32)
    roles = Roles(family.transformer, CONFIG)
    run = Run(tmp_path_factory.mktemp("toy") / "run", CONFIG.model_dump(mode="json"), CONFIG.steps, save_minutes=60)
    distill(Distillation(family, CONFIG, roles, prompts, table), run)
    return family, roles


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_the_student_is_nearer_the_target_than_the_undistilled_sampler_at_equal_steps(distilled, steps):
    family, roles = distilled
    teacher, student = error(family, roles.teacher, steps), error(family, roles.averaged(), steps)
    print(steps, teacher, student, error(family, roles.teacher, 100))
    assert student < 0.5 * teacher, (student, teacher)
