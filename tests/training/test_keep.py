"""Laws of fine-tuning a distilled student: where it starts, who learns when, and what the regulariser keeps."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch

from engines.families.base import load_family
from tests.tiny_sd3 import build_tiny_sd3
from tests.training.test_distill import interrupted, log_lines
from tests.training.tiny_distillation import student_draws, tiny_part
from tests.training.tiny_tuning import DOMAIN, GENERAL, moved_student, tiny_keep
from training.config import KeepConfig
from training.distill import Distillation
from training.errors import TrainingError
from training.keep import Keep, load_student
from training.main import main


def copies(values) -> list[torch.Tensor]:
    return [value.detach().clone() for value in values]


def same(a, b) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_the_student_starts_as_the_old_one_and_the_fake_teacher_as_the_teacher(tiny_model):
    work = tiny_keep(tiny_model)
    old, teacher = moved_student(tiny_model), load_family(tiny_model).transformer
    assert same(work.roles.student.masters.values(), old.parameters())
    assert same(work.roles.ema.average.values(), old.parameters())
    assert same(work.roles.fake.masters.values(), teacher.parameters())
    assert same(work.roles.teacher.net.parameters(), teacher.parameters())


def test_the_fake_teacher_alone_learns_in_its_warmup(tiny_model):
    work = tiny_keep(tiny_model, fake_warmup=4, steps=8)
    student, teacher = (
        copies(work.roles.student.masters.values()),
        copies(work.roles.teacher.net.parameters()),
    )
    for step in range(4):
        fake = copies(work.roles.fake.masters.values())
        assert "student" not in work.iterate(step)
        assert not same(fake, work.roles.fake.masters.values())
    assert same(student, work.roles.student.masters.values())
    assert same(teacher, work.roles.teacher.net.parameters())
    assert "student" not in work.iterate(4)
    assert work.iterate(5)["keep"] >= 0
    assert not same(student, work.roles.student.masters.values())


def test_a_share_of_every_batch_are_general_prompts(tiny_model):
    work = tiny_keep(tiny_model, batch=8, keep_share=0.25)
    texts = [[work.prompts.texts[number] for number in work.draw_prompts(step)] for step in range(20)]
    assert all(set(drawn[:2]) <= set(GENERAL) and set(drawn[2:]) <= set(DOMAIN) for drawn in texts)
    assert {text for drawn in texts for text in drawn} == {*GENERAL, *DOMAIN}


def test_the_regulariser_is_the_mean_over_general_samples_of_the_squared_difference(tiny_model):
    work = tiny_keep(tiny_model, keep_weight=3.0)
    with torch.no_grad():
        for value in work.roles.student.net.parameters():
            value.mul_(1.05)
    part = tiny_part(work)
    terms = work.terms(part, student_draws(work))
    loss, info = work.extra_loss(part, terms)
    old = moved_student(tiny_model)
    at = part.anchor.sigma_B[:2, None, None, None]
    cond = {name: value[:2] for name, value in part.cond.items()}
    with torch.no_grad():
        v = work.family.velocity(old, part.anchor.x_BCHW[:2], part.anchor.sigma_B[:2], cond)
    apart = (terms[0].x0_RCHW[:2] - (part.anchor.x_BCHW[:2] - at * v)).square().mean().item()
    assert apart > 0
    assert info["keep"].item() == pytest.approx(apart, rel=1e-4)
    assert loss.item() == pytest.approx(3 * apart, rel=1e-4)
    loss.backward()
    assert any(value.grad is not None and value.grad.any() for value in work.roles.student.net.parameters())


def test_nothing_of_the_objective_changes_at_weight_zero(tiny_model):
    work = tiny_keep(tiny_model, keep_weight=0)
    part = tiny_part(work)
    loss, values = work.student_loss(part, student_draws(work))
    plain, other = Distillation.student_loss(work, part, student_draws(work))
    assert loss.item() == plain.item()
    assert "keep" not in values
    assert values.keys() == other.keys()


def drift(work: Keep) -> float:
    """How far x̂0 has gone from the old student's, on general prompts."""
    part = tiny_part(work, 1, tuple(work.numbers_G.tolist()))
    anchor = part.anchor
    with torch.no_grad():
        new = work.x0(work.roles.student, anchor.x_BCHW, anchor.sigma_B, part.cond)
        old = work.x0(work.old, anchor.x_BCHW, anchor.sigma_B, part.cond)
    return (new - old).square().mean().item()


def test_a_heavy_regulariser_keeps_the_students_outputs_and_none_does_not(tiny_model):
    drifts = {}
    for weight in (0.0, 1e5):
        work = tiny_keep(tiny_model, keep_weight=weight, steps=12, fake_warmup=0, warmup=1, lr_student=1e-3)
        for step in range(12):
            work.iterate(step)
        drifts[weight] = drift(work)
    assert drifts[1e5] < 0.2 * drifts[0.0]


def test_micro_batches_learn_what_the_whole_batch_would(tiny_model):
    whole, divided = (tiny_keep(tiny_model, size, fake_warmup=0, keep_weight=50.0) for size in (0, 3))
    for step in range(4):
        one, other = whole.iterate(step), divided.iterate(step)
        assert one == pytest.approx(other, rel=1e-3, abs=1e-5)
    assert one["keep"] > 0


def test_a_killed_and_resumed_run_equals_an_uninterrupted_one_bit_for_bit(tiny_model, tmp_path):
    whole = tiny_keep(tiny_model)
    interrupted(whole, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        interrupted(tiny_keep(tiny_model), tmp_path / "killed", die_in=5)
    resumed = tiny_keep(tiny_model)
    interrupted(resumed, tmp_path / "killed")
    assert log_lines(tmp_path / "killed") == log_lines(tmp_path / "whole")
    for name, group in whole.roles.tensors().items():
        for key, value in resumed.roles.tensors()[name].items():
            assert torch.equal(value, group[key]), f"{name}/{key}"


def test_a_student_of_another_shape_is_refused(tiny_model, tmp_path):
    other = build_tiny_sd3(tmp_path / "wide", heads=2)
    with pytest.raises(TrainingError, match="another shape than the teacher"):
        load_student(other, load_family(tiny_model).transformer)
    deep = build_tiny_sd3(tmp_path / "deep", layers=3)
    with pytest.raises(TrainingError, match=r"transformer_blocks.* and absent in the teacher"):
        load_student(deep, load_family(tiny_model).transformer)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"student_rank": 4, "fake_merge": 1.0}, "set student_rank=0"),
        ({"steps": 10, "warmup": 1, "fake_warmup": 10}, "leaves the student none of steps=10"),
        ({"keep_share": 0.0}, "raise keep_share, or set keep_weight=0"),
    ],
)
def test_config_refuses_what_cannot_be(changes, message):
    with pytest.raises(ValueError, match=message):
        KeepConfig(**changes)


def test_the_command_goes_on_from_the_student_and_binds_to_it(tiny_model, tmp_path, capsys):
    student = tmp_path / "student"
    family = load_family(tiny_model)
    family.save(student, moved_student(tiny_model))
    for name, texts in (("domain", DOMAIN), ("general", GENERAL)):
        (tmp_path / f"{name}.txt").write_text("\n".join(texts) + "\n")
    given = [
        "emoji-finetune-student", "--teacher", str(tiny_model), "--student", str(student), "--prompts",
        str(tmp_path / "domain.txt"), "--general", str(tmp_path / "general.txt"), "--out", str(tmp_path / "run"),
        "--steps", "3", "--fake-warmup", "2", "--batch", "2", "--n-max", "2", "--sample-every", "0",
        "--tracker", "none",
        "--embeddings", str(tmp_path / "embeddings"), "--dtype", "float32",
    ]  # fmt: skip
    assert main(given) == 0
    # No student step has been taken (the 4th would be the first): the result is the student it began with.
    made = dict(load_family(tmp_path / "run" / "student").transformer.named_parameters())
    for name, value in moved_student(tiny_model).named_parameters():
        assert np.array_equal(made[name].detach(), value.detach()), name
    shutil.rmtree(student)
    family.save(student, family.transformer)
    assert main([*given, "--steps", "5"]) == 2
    assert "student_sha256" in capsys.readouterr().err
    assert json.loads((tmp_path / "run" / "student" / "provenance.json").read_text())["steps_trained"] == 3
