"""The objective of Continuous-Time Distribution Matching (arXiv 2605.06376) as pure functions.

Rectified flow: x_σ = (1−σ)·x0 + σ·ε, velocity v = ε − x0, prediction x̂0 = x_σ − σ·v.
Shape suffixes: B batch, C latent channels, H and W latent pixels. Times `sigma_B` and `tau_B` are float32 in [0, 1].
Losses return `(loss, info)`: a float32 scalar to differentiate, and detached float32 scalars to log.

    x_BCHW = renoise(x0_student_BCHW.detach(), eps_BCHW, tau_B)
    x0_teacher_BCHW, x0_fake_BCHW = …                              # both networks at (x, τ), no gradient
    loss, info = distribution_matching_loss(x0_student_BCHW, x0_teacher_BCHW, dm_delta(x0_teacher_BCHW, x0_fake_BCHW))
"""

from __future__ import annotations

from typing import Literal, Protocol

import torch
from torch import Tensor

Info = dict[str, Tensor]


class Anchor(Protocol):
    """A rollout at each sample's anchor."""

    @property
    def x_BCHW(self) -> Tensor: ...
    @property
    def v_BCHW(self) -> Tensor: ...
    @property
    def x0_BCHW(self) -> Tensor: ...
    @property
    def sigma_B(self) -> Tensor: ...


def per_sample(value_B: Tensor) -> Tensor:
    """`(B,)` → `(B, 1, 1, 1)`: one number per sample against BCHW."""
    return value_B[:, None, None, None]


def renoise(x0_BCHW: Tensor, eps_BCHW: Tensor, sigma_B: Tensor) -> Tensor:
    """x_σ = (1−σ)·x0 + σ·ε."""
    sigma_B111 = per_sample(sigma_B)
    return (1 - sigma_B111) * x0_BCHW + sigma_B111 * eps_BCHW


def predict_x0(x_BCHW: Tensor, v_BCHW: Tensor, sigma_B: Tensor) -> Tensor:
    """x̂0 = x_σ − σ·v, float32."""
    return x_BCHW.float() - per_sample(sigma_B) * v_BCHW.float()


def euler_step(x_BCHW: Tensor, v_BCHW: Tensor, sigma_B: Tensor, sigma_next_B: Tensor) -> Tensor:
    """x_{σ'} = x_σ + (σ'−σ)·v; σ' may lie above or below σ."""
    return x_BCHW + per_sample(sigma_next_B - sigma_B) * v_BCHW


def fake_teacher_loss(v_fake_BCHW: Tensor, x0_BCHW: Tensor, eps_BCHW: Tensor) -> tuple[Tensor, Info]:
    """Flow matching on the student's own samples: mean (v_φ − (ε − x̂0))²."""
    target_BCHW = (eps_BCHW - x0_BCHW).detach().float()
    loss = (v_fake_BCHW.float() - target_BCHW).square().mean()
    return loss, {"fake": loss.detach()}


def ca_delta(x0_cond_BCHW: Tensor, x0_uncond_BCHW: Tensor, guidance: float) -> Tensor:
    """CFG augmentation: Δ = g·(x̂0_teacher(cond) − x̂0_teacher(uncond))."""
    return guidance * (x0_cond_BCHW - x0_uncond_BCHW)


def dm_delta(x0_teacher_BCHW: Tensor, x0_fake_BCHW: Tensor) -> Tensor:
    """Distribution matching: Δ = x̂0_teacher(cond, no CFG) − x̂0_fake(cond)."""
    return x0_teacher_BCHW - x0_fake_BCHW


def guided_x0(x0_cond_BCHW: Tensor, x0_uncond_BCHW: Tensor, scale: float) -> Tensor:
    """Classifier-free guidance of x̂0 (Ho & Salimans 2022): the teacher of DMD2's DM term, where CDM has none."""
    return x0_uncond_BCHW + scale * (x0_cond_BCHW - x0_uncond_BCHW)


def distribution_matching_loss(
    x0_student_BCHW: Tensor, x0_teacher_BCHW: Tensor, delta_BCHW: Tensor, floor: float = 0.1
) -> tuple[Tensor, Info]:
    """mean (x̂0 − sg[x̂0 + w·Δ])², so that ∂loss/∂x̂0 = −2·w·Δ / numel; gradient flows into `x0_student_BCHW` only.

    The paper writes w = 1/‖·‖₁ and ½‖·‖²; the mean, the floor and the missing ½ are those of the authors' code.
    """
    x0_BCHW = x0_student_BCHW.float()
    with torch.no_grad():
        # w = 1 / max(mean|x̂0_teacher(cond) − x̂0_student|, floor), one number per sample
        distance_B = (x0_teacher_BCHW.float() - x0_BCHW).abs().flatten(1).mean(1)
        weight_B = 1 / distance_B.clamp_min(floor)
        # sg[x̂0 + w·Δ]
        target_BCHW = x0_BCHW + per_sample(weight_B) * delta_BCHW.float()
    loss = (x0_BCHW - target_BCHW).square().mean()
    return loss, {
        "loss": loss.detach(),
        "weight": weight_B.mean(),
        "distance": distance_B.mean(),
        "delta": delta_BCHW.detach().float().abs().mean(),
        "floored": (distance_B < floor).float().mean(),
    }


def ca_loss(
    x0_BCHW: Tensor, x0_cond_BCHW: Tensor, x0_uncond_BCHW: Tensor, guidance: float, floor: float = 0.1
) -> tuple[Tensor, Info]:
    """CFG augmentation at the anchor: both x̂0 are the teacher's, with and without the prompt."""
    delta_BCHW = ca_delta(x0_cond_BCHW, x0_uncond_BCHW, guidance)
    return distribution_matching_loss(x0_BCHW, x0_cond_BCHW, delta_BCHW, floor)


def dm_loss(
    x0_BCHW: Tensor, x0_teacher_BCHW: Tensor, x0_fake_BCHW: Tensor, floor: float = 0.1
) -> tuple[Tensor, Info]:
    """Distribution matching at the anchor."""
    delta_BCHW = dm_delta(x0_teacher_BCHW, x0_fake_BCHW)
    return distribution_matching_loss(x0_BCHW, x0_teacher_BCHW, delta_BCHW, floor)


def cdm_loss(
    x0_local_BCHW: Tensor, x0_teacher_BCHW: Tensor, x0_fake_BCHW: Tensor, floor: float = 0.1
) -> tuple[Tensor, Info]:
    """Continuous-time distribution matching: the DM gradient where the few-step grid never comes.

    Args:
        x0_local_BCHW: x̂0 of a fresh student forward at `off_trajectory(…)`, with gradient.
        x0_teacher_BCHW, x0_fake_BCHW: both teachers at sg[x̂0_local] re-noised to an independent τ, conditional.
        floor: least mean distance in the weight.
    """
    # Δ = x̂0_teacher(cond) − x̂0_fake(cond); loss = mean (x̂0 − sg[x̂0 + w·Δ])²
    delta_BCHW = dm_delta(x0_teacher_BCHW, x0_fake_BCHW)
    return distribution_matching_loss(x0_local_BCHW, x0_teacher_BCHW, delta_BCHW, floor)


def off_trajectory(
    kind: Literal["velocity", "gaussian", "none"], anchor: Anchor, sigma_off_B: Tensor, eps_BCHW: Tensor
) -> tuple[Tensor, Tensor]:
    """Where the CDM term asks the student: (x, σ), without gradient.

    - velocity, the paper's: x_{σ'} = x_k + (σ'−σ_k)·sg[v_k], a straight line off the rollout at k.
    - gaussian: x_{σ'} = (1−σ')·sg[x̂0] + σ'·ε, the same x̂0 with fresh noise. The paper names a "Gaussian
      perturbation" without a formula; this is our reading.
    - none: the anchor itself.
    """
    if kind == "none":
        return anchor.x_BCHW.detach(), anchor.sigma_B
    if kind == "gaussian":
        return renoise(anchor.x0_BCHW.detach(), eps_BCHW, sigma_off_B), sigma_off_B
    moved_BCHW = euler_step(anchor.x_BCHW.detach(), anchor.v_BCHW.detach(), anchor.sigma_B, sigma_off_B)
    return moved_BCHW, sigma_off_B


def mean_cosine(a_BCHW: Tensor, b_BCHW: Tensor) -> Tensor:
    """Cosine between two directions, per sample, averaged: near −1 means that CA and DM pull against each other."""
    return torch.cosine_similarity(a_BCHW.float().flatten(1), b_BCHW.float().flatten(1), dim=1).mean()
