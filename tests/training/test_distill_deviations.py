"""`docs/deviations.md`, row by row: where this trainer departs from the paper or the authors' code, and that it may."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch

from engines.families.base import load_family
from tests.training.tiny_distillation import student_draws, tiny_config, tiny_distillation, tiny_part
from training import losses
from training.config import CDMConfig
from training.cpu_kernels import cpu_kernels
from training.distill import Distillation, Query
from training.recipes import emoji_cdm, sd3_cdm
from training.roles import Computing, Roles

ROOT = Path(__file__).resolve().parents[2]


def student_gradient(work: Distillation) -> torch.Tensor:
    # A fake teacher equal to the teacher would make DM and CDM vanish.
    torch.manual_seed(0)
    for value in work.roles.fake.mixed.parameters:
        value.data.add_(0.02 * torch.randn_like(value))
    work.student_loss(tiny_part(work), student_draws(work))[0].backward()
    return torch.cat([p.grad.flatten() for p in work.roles.student.net.parameters() if p.grad is not None])


def count_student_passes(work: Distillation) -> list[int]:
    passes: list[int] = []
    work.roles.student.net.register_forward_pre_hook(
        lambda module, args, kwargs: passes.append(len(kwargs["hidden_states"])), with_kwargs=True
    )
    return passes


def test_a_shared_forward_gives_the_gradient_of_separate_ones(tiny_model):
    shared, separate = (tiny_distillation(tiny_model, shared_forward=on) for on in (True, False))
    counts = [count_student_passes(work) for work in (shared, separate)]
    a, b = student_gradient(shared), student_gradient(separate)
    assert a.any()
    assert (a - b).abs().max() < 1e-6 * max(1.0, a.abs().max().item())
    assert len(counts[1]) - len(counts[0]) == 1  # one of three forwards with gradient is saved


def test_a_truncated_rollout_gives_the_anchors_of_the_full_one(tiny_model):
    short, full = (tiny_distillation(tiny_model, truncated_rollout=on, n_max=12) for on in (True, False))
    a, b = (tiny_part(work, 1).anchor for work in (short, full))
    torch.testing.assert_close(a.x0_BCHW, b.x0_BCHW, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(a.x_BCHW, b.x_BCHW, rtol=1e-5, atol=1e-5)
    assert torch.equal(a.sigma_B, b.sigma_B)
    assert a.passes < b.passes


def test_a_shared_rollout_is_the_students_own_in_every_iteration_that_learns_from_it(tiny_model):
    work = tiny_distillation(tiny_model, shared_rollout=True, student_every=3, steps=9)
    passes, seen = count_student_passes(work), []
    for step in range(6):
        before = len(passes)
        (part,) = work.samples(step)
        seen.append((part, len(passes) - before))
        alone = tiny_part(work, step - step % 3, tuple(work.draw_prompts(step - step % 3)))
        torch.testing.assert_close(part.anchor.x0_BCHW, alone.anchor.x0_BCHW, rtol=0, atol=0)
        work.iterate(step)
    assert [bool(spent) for _, spent in seen] == [True, False, False] * 2
    assert seen[0][0] is seen[2][0]
    assert not torch.equal(seen[2][0].anchor.x0_BCHW, seen[3][0].anchor.x0_BCHW)


def test_the_fake_teacher_sees_a_shared_rollout_at_other_times(tiny_model):
    work = tiny_distillation(tiny_model, shared_rollout=True)
    times: list[torch.Tensor] = []
    velocity = work.velocity

    def noted(network, x, sigma, cond):
        if network is work.roles.fake and torch.is_grad_enabled():
            times.append(sigma)
        return velocity(network, x, sigma, cond)

    work.velocity = noted
    work.iterate(0), work.iterate(1)
    assert len(times) == 2
    assert not torch.equal(*times)


def test_batched_teacher_passes_equal_separate_ones(tiny_model):
    work, chunked = tiny_distillation(tiny_model), tiny_distillation(tiny_model, pass_batch=3)
    cond, draw = work.table.rows(np.array([0, 1, 2, 0])), student_draws(work)
    queries = [
        Query(draw.normal((8, 8, 8)), draw.uniform_between(0.02, 0.98), each)
        for each in (cond, work.table.unconditional(4), cond)
    ]
    alone = [work.x0(work.roles.teacher, query.x_RCHW, query.tau_R, query.conditioning) for query in queries]
    for run in (work, chunked):
        for batched, wanted in zip(run.x0_of_all(run.roles.teacher, queries), alone, strict=True):
            torch.testing.assert_close(batched, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_time_reaches_the_network_in_float32(tiny_model, dtype):
    work = tiny_distillation(tiny_model, dtype=dtype)
    seen: list[torch.Tensor] = []
    work.roles.student.net.time_text_embed.time_proj.register_forward_pre_hook(
        lambda module, args: seen.append(args[0])
    )
    sigma = torch.tensor([0.9045, 0.9055])
    work.x0(work.roles.student, torch.zeros(2, 8, 8, 8), sigma, work.table.rows(np.array([0, 0])))
    assert seen[0].dtype == torch.float32
    torch.testing.assert_close(seen[0], sigma * 1000)
    assert sigma.mul(1000).bfloat16().unique().numel() == 1  # which is what bfloat16 would have made of them


def test_anchors_are_unshifted_unless_asked(tiny_model):
    def lowest(**changes) -> float:
        work = tiny_distillation(tiny_model, n_max=28, **changes)
        return min(tiny_part(work, step).anchor.sigma_B.min().item() for step in range(12))

    assert CDMConfig().anchor_shift == 1.0
    assert lowest() < 0.4  # trained where the authors' SD3 anchors, 3·σ/(1+2·σ) ≥ 0.5, never come
    assert lowest(anchor_shift=3.0) >= 0.5


def test_embeddings_are_computed_once(tiny_model, monkeypatch):
    work = tiny_distillation(tiny_model)
    monkeypatch.setattr(work.family, "encode", lambda prompts: pytest.fail("encoded again"))
    work.iterate(1)
    again = tiny_distillation(tiny_model)
    fresh = again.family.encode(["green apple"])
    for name, value in work.table.rows(np.array([1])).items():
        torch.testing.assert_close(value, fresh[name])


def test_the_weight_is_the_authors_and_not_the_papers():
    student, teacher, delta = torch.zeros(1, 1, 2, 2), torch.full((1, 1, 2, 2), 0.5), torch.ones(1, 1, 2, 2)
    loss, info = losses.distribution_matching_loss(student, teacher, delta)
    assert info["weight"] == 1 / 0.5  # the mean; the paper's ‖·‖₁ would be a sum: 1/2
    assert loss == 4.0  # w²·Δ², without the paper's ½
    assert losses.distribution_matching_loss(student, student, delta)[1]["weight"] == 10.0  # the floor


def test_low_precision_networks_learn_steps_below_their_resolution(tiny_model):
    work = tiny_distillation(tiny_model, dtype="bfloat16", lr_student=1e-6, lr_fake=1e-6, warmup=0)
    master = work.roles.fake.mixed.parameters[0]
    before = master.detach().clone()
    work.iterate(0)
    moved = (master.detach() - before).abs()
    assert moved.any()
    assert (
        moved[before.abs() > 0.01] < 2**-9 * before.abs()[before.abs() > 0.01]
    ).all()  # bfloat16 would not notice


def test_cpu_kernels_give_the_gradient_of_torchs(tiny_model):
    with cpu_kernels():
        ours = student_gradient(tiny_distillation(tiny_model))
    torchs = student_gradient(tiny_distillation(tiny_model))
    torch.testing.assert_close(ours, torchs, rtol=1e-3, atol=1e-5)


def test_the_emoji_recipe_departs_where_the_table_says_and_nowhere_else():
    published, emoji = sd3_cdm().model_dump(), emoji_cdm().model_dump()
    table = re.findall(
        r"^\| `(\w+)` \| ([^|]+) \| ([^|]+) \| [^|]+ \|$",
        (ROOT / "docs" / "deviations.md").read_text(),
        re.MULTILINE,
    )
    changed = {
        name: (str(published[name]), str(emoji[name])) for name in emoji if emoji[name] != published[name]
    }
    assert {name: (theirs, ours) for name, theirs, ours in table} == changed
    assert emoji["lr_fake"] > emoji["lr_student"]
    assert published["lr_fake"] < published["lr_student"]
    assert emoji["anchor_shift"] == published["anchor_shift"] == 1


def test_ca_and_dm_aim_at_guidance_one_above_g():
    cond, uncond = torch.randn(2, 1, 4, 2, 2, generator=torch.Generator().manual_seed(0))
    g = emoji_cdm().guidance
    # Where the fake teacher has learnt a student that draws the unconditional prediction, CA + DM lead to CFG at g + 1.
    target = uncond + losses.ca_delta(cond, uncond, g) + losses.dm_delta(cond, uncond)
    torch.testing.assert_close(target, uncond + (g + 1) * (cond - uncond))


@torch.no_grad()
def test_with_lora_the_merge_is_of_factors(tiny_model):
    lora = {"student_rank": 4, "fake_rank": 4, "student_alpha": 4.0, "fake_alpha": 4.0}
    family, m = load_family(tiny_model), 0.1
    computing = Computing(family.fsdp_units, family.lora_targets)
    roles = Roles(family.transformer, tiny_config(fake_merge=1 - m, **lora), computing=computing)
    for role, seed in ((roles.student, 1), (roles.fake, 2)):
        generator = torch.Generator().manual_seed(seed)
        for value in role.masters.values():
            value.copy_(torch.randn(value.shape, generator=generator))
    name = next(name for name in roles.fake.masters if ".lora_A." in name)

    def factors(role):
        return role.masters[name].clone(), role.masters[name.replace("lora_A", "lora_B")].clone()

    (a_student, b_student), (a_fake, b_fake) = factors(roles.student), factors(roles.fake)
    roles.merge_fake()
    a, b = factors(roles.fake)
    wanted = (1 - m) * b_fake @ a_fake + m * b_student @ a_student
    off = m * (1 - m) * (b_fake - b_student) @ (a_fake - a_student)
    torch.testing.assert_close(wanted - b @ a, off, rtol=1e-4, atol=1e-5)


def test_every_row_of_the_table_names_a_test_that_exists():
    rows = re.findall(
        r"^\|.*`(test_\w+\.py)::(test_\w+)`.*\|$", (ROOT / "docs" / "deviations.md").read_text(), re.MULTILINE
    )
    assert len(rows) >= 8
    for file, name in rows:
        assert f"def {name}(" in (ROOT / "tests" / "training" / file).read_text(), f"{file}::{name}"
    table = (ROOT / "docs" / "deviations.md").read_text().split("## The emoji recipe")[0]
    assert len(rows) == sum(line.startswith("| ") for line in table.splitlines()) - 1  # all but the header
