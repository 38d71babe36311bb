"""Named objectives over a recipe: what each changes, and that a flag which is given wins."""

from __future__ import annotations

from typing import get_args

import pytest
import torch

from tests.training.tiny_distillation import student_draws, tiny_distillation, tiny_part
from training.config import CDMConfig
from training.recipes import EmojiCDMSettings, LongCatCDMSettings, SD3CDMSettings, emoji_cdm, longcat_cdm
from training.variants import PARITY_SHIFT, VARIANTS, Variant, changes

TEACHER = {"teacher": "t", "prompts": ["p.txt"]}


def test_every_variant_is_known_and_makes_a_config():
    assert set(get_args(Variant)) == set(VARIANTS)
    configs = {
        name: CDMConfig(**{**emoji_cdm().model_dump(), **changes(name, emoji_cdm(), "emoji")})
        for name in VARIANTS
    }
    assert len({config.model_dump_json() for config in configs.values()}) == len(VARIANTS)  # all differ


def test_a_variant_sets_what_was_not_given():
    config = EmojiCDMSettings(**TEACHER, variant="dmd2").config()
    assert (config.schedule, config.weight_ca, config.weight_cdm, config.dm_guidance) == (
        "fixed",
        0.0,
        0.0,
        4.0,
    )
    given = EmojiCDMSettings(**TEACHER, variant="dmd2", dm_guidance=2.0, fixed_steps=3).config()
    assert (given.schedule, given.dm_guidance, given.fixed_steps) == ("fixed", 2.0, 3)
    # DMD2's guidance follows the g that was given.
    assert EmojiCDMSettings(**TEACHER, variant="dmd2", guidance=5.0).config().dm_guidance == 6.0


def test_parity_is_the_authors_code():
    config = SD3CDMSettings(**TEACHER, variant="parity").config()
    assert (config.shared_forward, config.truncated_rollout, config.anchor_shift) == (False, False, 3.0)
    assert (config.weight_floor, config.off_below_anchor, config.off_trajectory) == (0.1, False, "velocity")
    assert LongCatCDMSettings(**TEACHER, variant="parity").config().anchor_shift == pytest.approx(
        torch.e**1.15, rel=1e-4
    )
    assert set(PARITY_SHIFT) == {"emoji", "sd3", "sd35", "longcat"}


def test_longcats_published_budget():
    assert (longcat_cdm().steps, longcat_cdm().batch) == (2001, 64)


def test_the_recipe_names_its_variant():
    assert EmojiCDMSettings(**TEACHER).recipe() == "emoji_cdm"
    assert EmojiCDMSettings(**TEACHER, variant="no-dm").recipe() == "emoji_cdm no-dm"


def test_a_fixed_schedule_is_the_samplers(tiny_model):
    work = tiny_distillation(tiny_model, schedule="fixed", fixed_steps=3)
    for step in range(3):
        torch.testing.assert_close(work.schedule(step), torch.tensor(work.family.sigmas(3)[:-1]))
    assert set(tiny_part(work).anchor.sigma_B.tolist()) <= set(work.schedule(0).tolist())


def test_guidance_of_the_dm_teacher_moves_its_target(tiny_model):
    def delta(**changes: float) -> float:
        work = tiny_distillation(tiny_model, weight_ca=0.0, weight_cdm=0.0, **changes)
        return float(work.student_loss(tiny_part(work), student_draws(work))[1]["dm_delta"])

    assert delta() == pytest.approx(0, abs=1e-6)  # the fake teacher starts as the teacher
    assert delta(dm_guidance=3.0) == pytest.approx(2 * delta(dm_guidance=2.0), rel=1e-3)
    assert delta(dm_guidance=2.0) > 1e-3


def test_off_trajectory_points_stay_below_the_anchor_if_asked(tiny_model, monkeypatch):
    from training import losses

    seen = []
    real = losses.off_trajectory

    def spy(kind, anchor, sigma, eps):
        seen.append((sigma <= anchor.sigma_B.clamp(0.02, 0.98)).all().item())
        return real(kind, anchor, sigma, eps)

    monkeypatch.setattr(losses, "off_trajectory", spy)
    for below in (True, False):
        work = tiny_distillation(tiny_model, off_below_anchor=below, n_max=8)
        for step in range(6):
            work.terms(tiny_part(work, step), student_draws(work, step))
    assert all(seen[:6])
    assert not all(seen[6:])


def test_flags_that_leave_a_variant_nothing_to_learn_are_one_sentence(tiny_model, tmp_path, capsys):
    from training.main import main

    prompts = tmp_path / "p.txt"
    prompts.write_text("red apple\n")
    given = [
        "emoji-cdm",
        "--teacher",
        str(tiny_model),
        "--prompts",
        str(prompts),
        "--out",
        str(tmp_path / "out"),
    ]
    assert main([*given, "--variant", "cdm-only", "--weight-cdm", "0"]) == 2
    error = capsys.readouterr().err
    assert "nothing would be learnt; set one of them" in error
    assert error.count("\n") == 1
