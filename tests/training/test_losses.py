"""Laws of the objective: the equations of `training.losses`, checked against their definitions."""

from __future__ import annotations

import pytest
import torch

from training import losses
from training.rollout import Rollout


def normal(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


SHAPE = (3, 2, 4, 4)
SIGMA = torch.tensor([0.02, 0.5, 0.98])


def test_x0_is_recovered_from_any_noise_level_by_the_true_velocity():
    x0, eps = normal(0, *SHAPE), normal(1, *SHAPE)
    x = losses.renoise(x0, eps, SIGMA)
    torch.testing.assert_close(losses.predict_x0(x, eps - x0, SIGMA), x0)


def test_an_euler_step_along_the_true_velocity_lands_on_the_straight_path():
    x0, eps, after = normal(0, *SHAPE), normal(1, *SHAPE), torch.tensor([0.9, 0.1, 0.0])
    stepped = losses.euler_step(losses.renoise(x0, eps, SIGMA), eps - x0, SIGMA, after)
    torch.testing.assert_close(stepped, losses.renoise(x0, eps, after))


def test_noise_levels_are_per_sample():
    x0, eps = normal(0, *SHAPE), normal(1, *SHAPE)
    for i in range(3):
        alone = losses.renoise(x0[i : i + 1], eps[i : i + 1], SIGMA[i : i + 1])
        assert torch.equal(losses.renoise(x0, eps, SIGMA)[i : i + 1], alone)


def test_the_fake_loss_is_zero_at_the_true_velocity_and_trains_only_the_fake():
    x0, eps = normal(0, *SHAPE).requires_grad_(), normal(1, *SHAPE)
    assert losses.fake_teacher_loss((eps - x0).detach(), x0, eps)[0] == 0
    v = normal(2, *SHAPE).requires_grad_()
    loss, info = losses.fake_teacher_loss(v, x0, eps)
    loss.backward()
    torch.testing.assert_close(v.grad, 2 * (v.detach() - (eps - x0.detach())) / v.numel())
    assert x0.grad is None
    assert info["fake"] == loss
    assert not info["fake"].requires_grad


def test_the_gradient_is_minus_the_weighted_delta_and_flows_into_the_student_alone():
    student, teacher, delta = (normal(seed, *SHAPE).requires_grad_() for seed in range(3))
    loss, info = losses.distribution_matching_loss(student, teacher, delta)
    loss.backward()
    weight = 1 / (teacher - student).detach().abs().mean(dim=(1, 2, 3)).clamp_min(0.1)
    expected = -2 * weight[:, None, None, None] * delta.detach() / student.numel()
    torch.testing.assert_close(student.grad, expected, rtol=1e-4, atol=1e-7)
    assert teacher.grad is None
    assert delta.grad is None
    torch.testing.assert_close(info["weight"], weight.mean())


def test_the_weight_has_a_floor():
    student = normal(0, *SHAPE)
    delta = torch.ones(SHAPE)
    for floor in (0.1, 0.5):
        loss, info = losses.distribution_matching_loss(student, student + 1e-3, delta, floor)
        torch.testing.assert_close(info["weight"], torch.tensor(1 / floor))
        torch.testing.assert_close(loss, torch.tensor(1 / floor**2))


def test_one_samples_distance_does_not_weigh_another():
    student = torch.zeros(2, 1, 2, 2, requires_grad=True)
    teacher = torch.stack([torch.full((1, 2, 2), 0.5), torch.full((1, 2, 2), 4.0)])
    losses.distribution_matching_loss(student, teacher, torch.ones(2, 1, 2, 2))[0].backward()
    torch.testing.assert_close(student.grad[0] / student.grad[1], torch.full((1, 2, 2), 8.0))


def test_bfloat16_inputs_are_weighed_in_float32():
    student, teacher, delta = (normal(seed, *SHAPE).bfloat16() for seed in range(3))
    loss, info = losses.distribution_matching_loss(student, teacher, delta)
    assert loss.dtype == torch.float32
    exact, _ = losses.distribution_matching_loss(student.float(), teacher.float(), delta.float())
    assert torch.equal(loss, exact)
    assert {value.dtype for value in info.values()} == {torch.float32}


def test_deltas_are_the_papers():
    cond, uncond, fake = (normal(seed, *SHAPE) for seed in range(3))
    assert torch.equal(losses.ca_delta(cond, uncond, 7.0), 7.0 * (cond - uncond))
    assert torch.equal(losses.dm_delta(cond, fake), cond - fake)


def test_the_cdm_term_is_distribution_matching_of_teacher_against_fake():
    local, teacher, fake = (normal(seed, *SHAPE) for seed in range(3))
    expected, _ = losses.distribution_matching_loss(local, teacher, teacher - fake, 0.2)
    assert torch.equal(losses.cdm_loss(local, teacher, fake, 0.2)[0], expected)


def test_no_term_pulls_once_the_fake_equals_the_teacher():
    local, teacher = normal(0, *SHAPE).requires_grad_(), normal(1, *SHAPE)
    losses.cdm_loss(local, teacher, teacher)[0].backward()
    assert not local.grad.any()


def anchor_of(x: torch.Tensor, v: torch.Tensor) -> Rollout:
    return Rollout(x, v, SIGMA, losses.predict_x0(x, v, SIGMA), 3)


@pytest.mark.parametrize("sigma_off", [0.1, 0.9])
def test_the_off_trajectory_point_lies_on_the_line_through_the_anchor(sigma_off):
    x, v = normal(0, *SHAPE).requires_grad_(), normal(1, *SHAPE).requires_grad_()
    wanted = torch.full((3,), sigma_off)
    off, sigma = losses.off_trajectory("velocity", anchor_of(x, v), wanted, normal(2, *SHAPE))
    assert not off.requires_grad
    assert torch.equal(sigma, wanted)
    # The line's own prediction of x0 is the same everywhere on it.
    torch.testing.assert_close(losses.predict_x0(off, v, wanted), losses.predict_x0(x, v, SIGMA))


def test_a_gaussian_perturbation_noises_the_prediction_afresh_and_none_stays_at_the_anchor():
    x, v, eps = (normal(seed, *SHAPE) for seed in range(3))
    anchor, wanted = anchor_of(x, v), torch.full((3,), 0.3)
    off, sigma = losses.off_trajectory("gaussian", anchor, wanted, eps)
    torch.testing.assert_close(off, losses.renoise(anchor.x0_BCHW, eps, wanted))
    assert torch.equal(sigma, wanted)
    stay, sigma = losses.off_trajectory("none", anchor, wanted, eps)
    assert torch.equal(stay, x)
    assert torch.equal(sigma, SIGMA)


def test_guided_x0_is_the_prediction_of_the_guided_velocity():
    x, v_cond, v_uncond = (normal(seed, *SHAPE) for seed in range(3))
    cond, uncond = (losses.predict_x0(x, v, SIGMA) for v in (v_cond, v_uncond))
    guided = losses.predict_x0(x, v_uncond + 4 * (v_cond - v_uncond), SIGMA)
    torch.testing.assert_close(losses.guided_x0(cond, uncond, 4), guided)


def test_the_cosine_is_per_sample():
    a = normal(0, 2, 1, 2, 2)
    flipped = torch.stack([a[0] * 3, -a[1]])
    assert losses.mean_cosine(a, flipped).abs() < 1e-6
    torch.testing.assert_close(losses.mean_cosine(a, 5 * a), torch.tensor(1.0))
