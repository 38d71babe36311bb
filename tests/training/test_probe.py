"""The score of a student: falls as it nears the target, rises when it leaves, blurs or collapses."""

from __future__ import annotations

import pytest
import torch

from tests.training.toy_flow import MEANS, PROMPTS, ToyFamily
from training.config import CDMConfig, ConsistencyConfig
from training.distill import Distillation
from training.embeddings import embed_in_memory
from training.probe import SEEDS, Probe, energy_distance, target_guidance
from training.prompts import Prompts
from training.roles import Roles

CONFIG = CDMConfig(
    n_max=8, guidance=0.0, steps=300, batch=128, lr_student=2e-3, lr_fake=4e-3, warmup=20, ema_decay=0.98,
    dtype="float32", seed=5,
)  # fmt: skip


def toy(seed: int = 0) -> tuple[Distillation, Probe]:
    family = ToyFamily(seed)
    prompts = Prompts.of([(prompt, 1.0) for prompt in PROMPTS], "toy")
    table = embed_in_memory(family, prompts.texts, torch.float32)
    roles = Roles(family.transformer, CONFIG)
    return Distillation(family, CONFIG, roles, prompts, table), Probe(family, roles, prompts, table, 128, 256)


def push(roles: Roles, amount: float) -> None:
    """Move the student's velocity, and so its samples, off by `amount` along both axes."""
    with torch.no_grad():
        for values in (roles.student.masters, roles.ema.average):
            values["mlp.4.bias"] += amount


def test_it_falls_as_the_student_nears_the_target_and_leaves_everything_as_it_was():
    work, probe = toy()
    transformer = work.family.transformer
    push(work.roles, 1.0)
    far = probe.score()
    assert far == probe.score()
    assert far.lower_is_better
    for step in range(CONFIG.steps):
        work.iterate(step)
    before = {name: value.clone() for name, value in work.roles.student.masters.items()}
    assert probe.score().value < 0.3 * far.value
    assert work.family.transformer is transformer
    assert all(torch.equal(value, before[name]) for name, value in work.roles.student.masters.items())


def test_the_farther_off_the_worse():
    work, probe = toy()
    scores = []
    for _ in range(4):
        scores.append(probe.score().value)
        push(work.roles, 0.3)
    assert scores == sorted(scores)
    assert scores[-1] > 4 * scores[0]


@pytest.mark.parametrize("seed", [1, 2])
def test_leaving_the_target_blur_and_collapse_raise_it(seed):
    generator = torch.Generator().manual_seed(seed)
    draw = lambda: torch.randn(200, SEEDS, 64, generator=generator)  # noqa: E731
    target, same = draw(), draw()
    good = abs(energy_distance(same, target))
    assert good < 0.02
    for worse in (same + 0.5, 0.7 * same, 1.4 * same, 0.0 * same, same[:, :1].expand(-1, SEEDS, -1)):
        assert energy_distance(worse, target) > 2 * good + 0.02


def test_a_collapsed_toy_student_is_worse_than_the_undistilled_one():
    work, probe = toy()
    untrained = probe.score().value

    class Collapsed(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.unused = torch.nn.Parameter(torch.zeros(1))

        def forward(self, x_B2, sigma_B, weight_BK):  # the velocity to each prompt's mean
            mean_B2 = weight_BK @ torch.tensor(list(MEANS.values()))
            return (x_B2 - mean_B2) / sigma_B[:, None]

    work.roles.student.net = Collapsed()
    assert probe.score().value > untrained


def test_the_guidance_it_aims_at_is_the_methods():
    assert target_guidance(CDMConfig(guidance=3.0)) == 4.0
    assert target_guidance(CDMConfig(weight_ca=0.0, dm_guidance=7.0)) == 7.0
    assert target_guidance(CDMConfig(weight_ca=0.0)) == 1.0
    assert target_guidance(ConsistencyConfig(guidance=8.0)) == 8.0
