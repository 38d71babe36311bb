"""Laws of the loop, on the real classes with random weights."""

from __future__ import annotations

import json
import math
import types
from pathlib import Path

import pytest
import torch

from tests.training.tiny_distillation import student_draws, tiny_config, tiny_distillation, tiny_part
from training import checkpoint
from training.distill import FAKE, Distillation, distill
from training.draws import Draws
from training.errors import Diverged
from training.run import Run

TERMS = {
    "fake", "fake_norm", "student", "student_norm", "ca", "dm", "cdm", "cos_ca_dm", "x0_mean", "x0_std", "teacher_std",
    *(f"{term}_{part}" for term in ("ca", "dm", "cdm") for part in ("weight", "distance", "delta", "floored")),
}  # fmt: skip


def weights(module: torch.nn.Module) -> list[torch.Tensor]:
    return [parameter.detach().float().clone() for parameter in module.parameters()]


def same(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def log_lines(folder: Path) -> list[dict[str, float]]:
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "time"} for line in lines]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_student_learns_every_second_iteration_and_the_teacher_never(tiny_model, dtype):
    work = tiny_distillation(tiny_model, dtype=dtype)
    roles = work.roles
    teacher, student = weights(roles.teacher.net), [value.clone() for value in roles.student.mixed.parameters]
    first = work.iterate(0)
    assert set(first) == {"fake", "fake_norm"}
    assert same(student, roles.student.mixed.parameters)
    second = work.iterate(1)
    assert set(second) == TERMS
    assert all(math.isfinite(value) for value in second.values())
    assert not same(student, roles.student.mixed.parameters)
    assert same(teacher, weights(roles.teacher.net))
    assert (roles.student.updates, roles.fake.updates, roles.ema.updates) == (1, 2, 1)
    assert {value.dtype for value in roles.student.mixed.parameters} == {torch.float32}
    assert next(roles.student.net.parameters()).dtype == getattr(torch, dtype)


def test_the_published_step_counts_come_out(tiny_model):
    work, counts = tiny_distillation(tiny_model), {"fake": 0, "student": 0}

    def counted(name):
        def step(*arguments):
            counts[name] += 1
            return {}

        return step

    work.rollout = lambda *arguments: None
    work.table = types.SimpleNamespace(rows=lambda *arguments: {})
    work.fake_step, work.student_step = counted("fake"), counted("student")
    for step in range(4001):
        work.iterate(step)
    assert counts == {"fake": 4001, "student": 2000}


def test_the_fake_teacher_is_merged_with_the_student_after_its_step(tiny_model):
    merged, plain = (tiny_distillation(tiny_model, fake_merge=merge) for merge in (0.9, 1.0))
    for work in (merged, plain):
        for value in work.roles.student.mixed.parameters:
            value.data.mul_(1.25)  # so that θ differs from φ
        work.iterate(0)
    expected = [
        0.9 * fake + 0.1 * student
        for fake, student in zip(
            plain.roles.fake.mixed.parameters, plain.roles.student.mixed.parameters, strict=True
        )
    ]
    for value, wanted in zip(merged.roles.fake.mixed.parameters, expected, strict=True):
        torch.testing.assert_close(value.detach(), wanted.detach())


def test_an_iteration_depends_on_seed_and_step_alone(tiny_model):
    assert tiny_distillation(tiny_model).iterate(5) == tiny_distillation(tiny_model).iterate(5)
    assert tiny_distillation(tiny_model).iterate(5) != tiny_distillation(tiny_model).iterate(7)
    assert tiny_distillation(tiny_model).iterate(5) != tiny_distillation(tiny_model, seed=1).iterate(5)


def test_every_sample_keeps_its_own_prompt(tiny_model):
    work = tiny_distillation(tiny_model)
    together, swapped = (tiny_part(work, 1, prompts).anchor for prompts in ((0, 1, 2, 0), (1, 1, 2, 0)))
    torch.testing.assert_close(together.x0_BCHW[1:], swapped.x0_BCHW[1:])
    assert not torch.allclose(together.v_BCHW[0], swapped.v_BCHW[0])


def test_the_fake_teacher_sees_the_student_at_the_anchor(tiny_model):
    """Its loss is flow matching towards x̂0 at k: with the fake's own x̂0 as target it would differ."""
    work = tiny_distillation(tiny_model)
    part, draw = tiny_part(work), Draws(0, 0, FAKE, range(4), work.device)
    x0 = part.anchor.x0_BCHW
    sigma = draw.uniform_between(0.02, 0.98)
    eps = draw.normal(work.latent_shape)
    at = sigma[:, None, None, None]
    v = work.family.velocity(work.roles.fake.net, (1 - at) * x0 + at * eps, sigma, part.cond)
    expected = (v - (eps - x0)).square().mean().item()
    assert work.fake_step(0, [part])["fake"] == pytest.approx(expected)


def test_micro_batches_learn_what_the_whole_batch_would(tiny_model):
    whole, divided = tiny_distillation(tiny_model), tiny_distillation(tiny_model, micro_batch=3)
    for step in range(2):
        one, other = whole.iterate(step), divided.iterate(step)
        assert one == pytest.approx(other, rel=1e-4, abs=1e-6, nan_ok=False)
    for a, b in zip(
        whole.roles.student.mixed.parameters, divided.roles.student.mixed.parameters, strict=True
    ):
        torch.testing.assert_close(a, b, rtol=0, atol=2e-4)  # Adam's first step is lr·sign(g): 1e-3 each


def interrupted(work: Distillation, folder: Path, die_in: int | None = None) -> None:
    """Distil with a checkpoint after every step; dies in the middle of iteration `die_in`, saving nothing."""
    run = Run(folder, work.config.model_dump(mode="json"), work.config.steps, save_minutes=0)
    if die_in is not None:
        student_step = work.student_step

        def dying(*arguments):
            if work.roles.fake.updates == die_in + 1:
                raise KeyboardInterrupt
            return student_step(*arguments)

        work.student_step = dying
    distill(work, run)


@pytest.mark.parametrize(
    "changes",
    [{}, {"dtype": "bfloat16"}, {"shared_rollout": True}],
    ids=["float32", "bfloat16", "shared rollout"],
)
def test_a_killed_and_resumed_run_equals_an_uninterrupted_one_bit_for_bit(tiny_model, tmp_path, changes):
    """Killed in the second iteration of a student step, before the student's."""
    whole = tiny_distillation(tiny_model, **changes)
    interrupted(whole, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        interrupted(tiny_distillation(tiny_model, **changes), tmp_path / "killed", die_in=3)
    resumed = tiny_distillation(tiny_model, **changes)
    interrupted(resumed, tmp_path / "killed")
    lines = log_lines(tmp_path / "killed")
    assert [line["step"] for line in lines] == list(range(6))
    assert lines == log_lines(tmp_path / "whole")
    for name, group in whole.roles.tensors().items():
        for key, value in resumed.roles.tensors()[name].items():
            assert torch.equal(value, group[key]), f"{name}/{key}"


def test_a_diverged_step_is_in_no_checkpoint(tiny_model, tmp_path):
    work = tiny_distillation(tiny_model)
    student_loss = work.student_loss

    def poisoned(*arguments):
        loss, values = student_loss(*arguments)
        factor = float("nan") if work.roles.student.updates == 1 else 1.0
        return loss * factor, {**values, "student": values["student"] * factor}

    work.student_loss = poisoned
    with pytest.raises(Diverged, match="student=nan at step 3"):
        interrupted(work, tmp_path)
    saved = checkpoint.latest(tmp_path / "checkpoints")
    assert saved.step == 3
    fresh = tiny_distillation(tiny_model)
    fresh.roles.restore(saved)
    assert fresh.roles.student.updates == 1


def test_a_term_of_weight_zero_leaves_no_gradient(tiny_model):
    def gradient(**changes) -> torch.Tensor:
        work = tiny_distillation(tiny_model, **changes)
        work.student_loss(tiny_part(work), student_draws(work))[0].backward()
        return torch.cat(
            [p.grad.flatten() for p in work.roles.student.net.parameters() if p.grad is not None]
        )

    off = {"weight_ca": 0.0, "weight_dm": 0.0, "weight_cdm": 0.0}
    # The fake teacher starts as the teacher: DM and CDM pull nowhere, CA does.
    assert not gradient(**{**off, "weight_dm": 1.0}).any()
    assert not gradient(**{**off, "weight_cdm": 1.0}).any()
    only_ca = gradient(**{**off, "weight_ca": 1.0})
    assert only_ca.any()
    torch.testing.assert_close(gradient(**{**off, "weight_ca": 2.0}), 2 * only_ca)


def test_guidance_is_the_strength_of_the_ca_term(tiny_model):
    values = {}
    for guidance in (3.5, 7.0):
        work = tiny_distillation(tiny_model, guidance=guidance)
        values[guidance] = work.iterate(1)["ca_delta"]
    assert values[7.0] == pytest.approx(2 * values[3.5], rel=1e-5)


def test_the_cosine_of_ca_and_dm_is_of_what_they_add(tiny_model):
    """With a guided teacher DM's part has the guidance's direction, which is CA's."""
    cosines = []
    for scale in (1.0, 1000.0):
        work = tiny_distillation(tiny_model, dm_guidance=scale)
        part = tiny_part(work)
        part.anchor.x_BCHW.copy_(part.anchor.x_BCHW[:1].expand_as(part.anchor.x_BCHW))
        cosines.append(float(work.student_loss(part, student_draws(work))[1]["cos_ca_dm"]))
    assert abs(cosines[0]) < 0.1  # the fake teacher still is the teacher: DM adds rounding
    assert abs(cosines[1]) > 0.3


def test_config_refuses_what_cannot_be(tiny_model):
    for changes, message in (
        ({"anchor_low": 0.9, "anchor_high": 0.3}, "anchor_low=0.9 is above anchor_high=0.3"),
        ({"weight_ca": 0, "weight_dm": 0, "weight_cdm": 0}, "nothing would be learnt"),
        ({"n_max": 0}, "n_max"),
        ({"no_such_constant": 1}, "no_such_constant"),
    ):
        with pytest.raises(ValueError, match=message):
            tiny_config(**changes)
