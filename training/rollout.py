"""The dynamic continuous schedule and the student's rollout to its anchors (arXiv 2605.06376).

Every iteration draws one schedule for the whole batch (N and its anchors), and an anchor index k per sample; the same
k serves every branch of that iteration. Nothing after the anchor is used, so k is drawn first and a sample's rollout
ends there: (N+1)/2 student passes per sample on average instead of N.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from engines.families.base import Family
from training.losses import euler_step, predict_x0


class VelocityOfRows(Protocol):
    """v of some samples of the batch; `rows` `(R,)` says which, so that their conditioning can be picked."""

    def __call__(self, x_RCHW: Tensor, sigma_R: Tensor, rows: Tensor) -> Tensor: ...


@dataclass(frozen=True)
class Rollout:
    """Each sample at its own anchor. Nothing carries gradient."""

    x_BCHW: Tensor
    v_BCHW: Tensor
    sigma_B: Tensor
    x0_BCHW: Tensor
    passes: int
    """Network passes spent, counted in samples."""


def shifted(sigma: Tensor, shift: float) -> Tensor:
    """The flow-matching shift s·σ / (1 + (s−1)·σ); 1 leaves σ alone."""
    return shift * sigma / (1 + (shift - 1) * sigma)


def family_shift(family: Family) -> float:
    """s of the scheduler's shift s·σ/(1 + (s−1)·σ) at the family's size: read off where it sends σ = ½."""
    middle = family.sigmas(2)[1]
    return middle / (1 - middle)


def draw_schedule(
    generator: torch.Generator, n_max: int, low: float, high: float, shift: float = 1.0
) -> Tensor:
    """Anchors `(N,)` float32: N ~ U{1…n_max}, σ_0 = 1, then N−1 draws of U(low, high), sorted descending.

    `shift` passes every anchor through the scheduler's shift, as the authors' code does.
    """
    n = int(torch.randint(1, n_max + 1, (), generator=generator))
    inner = low + (high - low) * torch.rand(n - 1, generator=generator)
    return shifted(torch.cat([torch.ones(1), inner.sort(descending=True).values]), shift)


@torch.no_grad()
def rollout(
    velocity: VelocityOfRows, noise_BCHW: Tensor, sigma_N: Tensor, k_B: Tensor, truncate: bool = True, at_least: int = 0
) -> Rollout:  # fmt: skip
    """Euler steps without guidance from noise along `sigma_N`; (x, v, σ, x̂0) of each sample at its anchor `k_B`.

    With `truncate` only samples that have not reached their anchor are advanced; without, all N steps are run as in
    the authors' code, and the result is the same. `at_least` passes are run even if no sample needs them: processes
    that share the weights (FSDP) must all run as many.
    """
    device = noise_BCHW.device
    sigma_N, k_B = sigma_N.to(device), k_B.to(device)
    n, batch = len(sigma_N), len(noise_BCHW)
    x_BCHW = noise_BCHW.clone()
    x_anchor_BCHW, v_anchor_BCHW = torch.empty_like(x_BCHW), torch.empty_like(x_BCHW)
    last = int(k_B.max()) if truncate else n - 1
    passes = 0
    for i in range(max(last + 1, at_least)):
        rows = (k_B >= i).nonzero().squeeze(1) if truncate else torch.arange(batch, device=device)
        if i > last:
            velocity(x_BCHW[:1], sigma_N[:1], torch.zeros(1, dtype=torch.int64, device=device))
            continue
        x_RCHW, sigma_R = x_BCHW[rows], sigma_N[i].expand(len(rows))
        v_RCHW = velocity(x_RCHW, sigma_R, rows)
        passes += len(rows)
        here = k_B[rows] == i
        x_anchor_BCHW[rows[here]] = x_RCHW[here]
        v_anchor_BCHW[rows[here]] = v_RCHW[here]
        if i < last:
            x_BCHW[rows] = euler_step(x_RCHW, v_RCHW, sigma_R, sigma_N[i + 1].expand(len(rows)))
    sigma_B = sigma_N[k_B]
    return Rollout(
        x_anchor_BCHW, v_anchor_BCHW, sigma_B, predict_x0(x_anchor_BCHW, v_anchor_BCHW, sigma_B), passes
    )
