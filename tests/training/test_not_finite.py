"""NaN and infinity never reach a checkpoint, wherever they arise; the run goes on from the last good one."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.training.toy_flow import PROMPTS, ToyFamily
from training import checkpoint
from training.config import CDMConfig
from training.distill import Distillation, distill
from training.embeddings import embed_in_memory
from training.errors import Diverged
from training.prompts import Prompts
from training.roles import Roles
from training.run import Run

CONFIG = CDMConfig(n_max=2, steps=8, batch=4, lr_student=1e-3, lr_fake=1e-3, warmup=1, dtype="float32")
BAD_AT = 5
"""Iterations done when the number goes bad; the next is a student step."""


def poison(value: torch.Tensor, bad: float) -> None:
    with torch.no_grad():
        value.flatten()[-1] = bad


def gradient(roles: Roles, bad: float) -> None:
    next(iter(roles.student.net.parameters())).register_hook(lambda grad: grad * bad)


def fake_gradient(roles: Roles, bad: float) -> None:
    next(iter(roles.fake.net.parameters())).register_hook(lambda grad: grad * bad)


def master(roles: Roles, bad: float) -> None:
    poison(next(iter(roles.student.masters.values())), bad)


def fake_master(roles: Roles, bad: float) -> None:
    poison(list(roles.fake.masters.values())[-1], bad)


def first_moment(roles: Roles, bad: float) -> None:
    poison(roles.student.optimizer.state[roles.student.mixed.parameters[0]]["exp_avg"], bad)


def second_moment(roles: Roles, bad: float) -> None:
    poison(roles.fake.optimizer.state[roles.fake.mixed.parameters[-1]]["exp_avg_sq"], bad)


def average(roles: Roles, bad: float) -> None:
    poison(list(roles.ema.average.values())[-1], bad)


def run(folder: Path, harm: Callable[[Roles, float], None] | None = None, bad: float = math.nan) -> Roles:
    family = ToyFamily()
    prompts = Prompts.of([(prompt, 1.0) for prompt in PROMPTS], "toy")
    table = embed_in_memory(family, prompts.texts, torch.float32)
    roles = Roles(family.transformer, CONFIG)

    def after(done: int, values: dict[str, float]) -> None:
        if harm is not None and done == BAD_AT:
            harm(roles, bad)

    work = Distillation(family, CONFIG, roles, prompts, table)
    distill(work, Run(folder, CONFIG.model_dump(mode="json"), CONFIG.steps, save_minutes=0), after=after)
    return roles


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize(
    "harm", [gradient, fake_gradient, master, fake_master, first_moment, second_moment, average]
)
def test_it_stops_the_run_and_no_checkpoint_holds_it(tmp_path, harm, bad):
    with pytest.raises(Diverged, match=f"at step {BAD_AT}"):
        run(tmp_path / "run", harm, bad)
    kept = sorted((tmp_path / "run" / "checkpoints").iterdir())
    assert kept[-1].name in (f"step-{BAD_AT - 1:08d}", f"step-{BAD_AT:08d}")
    for path in kept:
        for file in path.glob("*.safetensors"):
            found = checkpoint.load_file(file)
            assert all(bool(torch.isfinite(value).all()) for value in found.values()), file
    mended, whole = run(tmp_path / "run"), run(tmp_path / "whole")
    assert all(torch.equal(value, whole.ema.average[name]) for name, value in mended.ema.average.items())
