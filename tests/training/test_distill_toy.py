"""The whole objective on a flow whose target is known exactly."""

from __future__ import annotations

import pytest
import torch

from tests.training.toy_flow import PROMPTS, ToyFamily, sliced_wasserstein, true_samples
from training.config import CDMConfig
from training.distill import Distillation, distill
from training.embeddings import embed_in_memory
from training.prompts import Prompts
from training.roles import Roles
from training.run import Run
from training.sampling import sample

# Without guidance the target is the true conditional distribution; the toy's networks learn from large rates.
CONFIG = CDMConfig(
    n_max=8, guidance=0.0, steps=600, batch=128, lr_student=2e-3, lr_fake=4e-3, warmup=20, ema_decay=0.98,
    dtype="float32",
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
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[ToyFamily, Roles]:
    family = ToyFamily()
    prompts = Prompts.of([(prompt, 1.0) for prompt in PROMPTS], "toy")
    table = embed_in_memory(family, prompts.texts, torch.float32)
    roles = Roles(family.transformer, CONFIG)
    run = Run(
        tmp_path_factory.mktemp("toy") / "run", CONFIG.model_dump(mode="json"), CONFIG.steps, save_minutes=60
    )
    distill(Distillation(family, CONFIG, roles, prompts, table), run)
    return family, roles


@pytest.mark.parametrize(("steps", "at_most"), [(1, 0.5), (2, 0.5), (4, 1.0)])
def test_the_student_is_nearer_the_target_than_the_undistilled_sampler_at_equal_steps(
    trained, steps, at_most
):
    family, roles = trained
    with roles.averaged() as student:
        distilled = error(family, student.net, steps)
    assert distilled < at_most * error(family, roles.teacher.net, steps)


def test_the_undistilled_sampler_reaches_the_target_with_many_steps(trained):
    family, roles = trained
    assert error(family, roles.teacher.net, 64) < 0.05
