"""Laws of the dynamic continuous schedule and of the rollout that stops at its anchors."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from training.draws import Draws
from training.rollout import draw_schedule, rollout, shifted


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@given(seed=st.integers(0, 2**31), n_max=st.integers(1, 28))
@settings(max_examples=60, deadline=None)
def test_a_schedule_starts_at_one_and_descends_within_its_bounds(seed, n_max):
    sigma = draw_schedule(seeded(seed), n_max, 0.25, 0.95)
    assert 1 <= len(sigma) <= n_max
    assert sigma[0] == 1
    assert sigma.dtype == torch.float32
    assert ((sigma[1:] >= 0.25) & (sigma[1:] <= 0.95)).all()
    assert (sigma.diff() <= 0).all()


def test_every_length_is_equally_likely():
    lengths = torch.tensor([len(draw_schedule(seeded(seed), 5, 0.25, 0.95)) for seed in range(4000)])
    share = torch.bincount(lengths, minlength=6)[1:] / 4000
    assert (share - 0.2).abs().max() < 0.03


def test_every_step_of_a_schedule_is_equally_likely_an_anchor_and_samples_draw_their_own():
    k = Draws(0, 0, 0, range(20_000), torch.device("cpu")).integers(5)
    assert ((torch.bincount(k, minlength=5) / 20_000 - 0.2).abs() < 0.015).all()


def test_the_shift_is_the_schedulers():
    from diffusers import FlowMatchEulerDiscreteScheduler

    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    grid = torch.tensor([1.0, 0.75, 0.5, 0.25])
    scheduler.set_timesteps(sigmas=grid.tolist())
    torch.testing.assert_close(shifted(grid, 3.0), scheduler.sigmas[:-1].float())
    assert torch.equal(shifted(grid, 1.0), grid)
    plain, moved = (
        draw_schedule(seeded(3), 28, 0.25, 0.95),
        draw_schedule(seeded(3), 28, 0.25, 0.95, shift=3.0),
    )
    torch.testing.assert_close(moved, shifted(plain, 3.0))


class Curved:
    """A velocity that depends on place, time and sample; counts what it is asked."""

    def __init__(self) -> None:
        self.samples = 0

    def __call__(self, x: torch.Tensor, sigma: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        self.samples += len(x)
        return torch.sin(3 * x) + sigma[:, None, None, None] * (1 + rows[:, None, None, None])


NOISE = torch.randn(6, 2, 3, 3, generator=seeded(1))
SIGMA = torch.tensor([1.0, 0.9, 0.6, 0.3])
K = torch.tensor([0, 3, 1, 0, 2, 3])


@pytest.mark.parametrize("k", [K, torch.zeros_like(K), torch.full_like(K, 3)])
def test_a_truncated_rollout_equals_the_full_one_at_the_anchor(k):
    full, short = (rollout(Curved(), NOISE, SIGMA, k, truncate) for truncate in (False, True))
    for name in ("x_BCHW", "v_BCHW", "sigma_B", "x0_BCHW"):
        assert torch.equal(getattr(full, name), getattr(short, name)), name


def test_a_truncated_rollout_asks_only_for_what_is_on_the_way_to_an_anchor():
    short, full = Curved(), Curved()
    assert rollout(short, NOISE, SIGMA, K).passes == short.samples == int((K + 1).sum())
    assert rollout(full, NOISE, SIGMA, K, truncate=False).passes == full.samples == len(K) * len(SIGMA)


def test_truncation_spends_about_half_of_the_passes():
    spent = whole = 0
    for seed in range(300):
        generator = seeded(seed)
        sigma = draw_schedule(generator, 28, 0.25, 0.95)
        k = torch.randint(0, len(sigma), (16,), generator=generator)
        spent += int((k + 1).sum())
        whole += 16 * len(sigma)
    assert spent / whole == pytest.approx((14.5 + 1) / 2 / 14.5, abs=0.02)


def test_each_sample_stands_where_its_own_steps_lead():
    result = rollout(Curved(), NOISE, SIGMA, K)
    velocity = Curved()
    for b, k in enumerate(K.tolist()):
        x, row = NOISE[b : b + 1], torch.tensor([b])
        for i in range(k):
            x = x + (SIGMA[i + 1] - SIGMA[i]) * velocity(x, SIGMA[i : i + 1], row)
        torch.testing.assert_close(result.x_BCHW[b : b + 1], x)
        v = velocity(x, SIGMA[k : k + 1], row)
        torch.testing.assert_close(result.v_BCHW[b : b + 1], v)
        torch.testing.assert_close(result.x0_BCHW[b : b + 1], x - SIGMA[k] * v)
    assert torch.equal(result.sigma_B, SIGMA[K])


def test_a_rollout_carries_no_gradient_and_leaves_its_noise_alone():
    gain = torch.tensor(2.0, requires_grad=True)
    before = NOISE.clone()
    result = rollout(lambda x, sigma, rows: gain * x, NOISE, SIGMA, K)
    assert not result.x0_BCHW.requires_grad
    assert torch.equal(NOISE, before)
