"""Continuous-time consistency distillation of a rectified flow, from prompts alone: the baseline beside CDM.

F is the student, v_T the teacher's guided velocity v_∅ + g·(v_c − v_∅), R the samples of a micro-batch of one process.

The student's answer f(x, σ) = x − σ·F(x, σ) has f(x, 0) = x by its form. It is consistent if it does not change along
the teacher's ODE dx/dσ = v_T, that is if 0 = df/dσ = v_T − F − σ·dF/dσ, where dF/dσ = ∂F/∂x·v_T + ∂F/∂σ is one
Jacobian-vector product with the tangents (v_T, 1). Discrete consistency, ½‖f(x_σ) − sg[f(x_{σ−Δ})]‖², has for Δ → 0
the gradient Δ·(∂f/∂θ)ᵀ·df/dσ (Song et al. 2023, arXiv 2303.01469); with ∂f/∂θ = −σ·∂F/∂θ that is
Δ·σ·(∂F/∂θ)ᵀ·g for the tangent

    g = F − v_T + r·σ·dF/dσ,  r = 1.

Left without the weight Δ·σ, it is the gradient of ½(F − sg[F − g])². At r = 0 the target is v_T itself, the teacher's
flow, where the student starts; r is faded in, and g/(‖g‖/√numel + c) takes its place, as sCM does (Lu & Song 2024,
arXiv 2410.11081, there for TrigFlow). MeanFlow's identity (Geng et al. 2025, arXiv 2505.13447) with its end point at 0,
u = v − σ·du/dσ, has the same fixed point. What is learnt is trained where it is asked: on the teacher's trajectories.
"""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from engines.families.base import Conditioning, Family
from training.config import ConsistencyConfig
from training.cpu_kernels import torch_kernels
from training.distill import PROMPTS, ROLLOUT, SCHEDULE, STUDENT
from training.draws import Draws, generator
from training.embeddings import EmbeddingTable
from training.losses import Info, euler_step, per_sample, predict_x0
from training.means import Means, Values
from training.prompts import Prompts
from training.roles import Roles
from training.rollout import rollout
from training.run import numpy_generator

AT_ANCHOR = 0.25
"""Share of samples trained at their anchor itself, so that σ = 1, where sampling starts, comes up often."""

GRID = 1000
"""Points of the family's schedule between which its shift is interpolated."""

Velocity = Callable[[Tensor, Tensor], Tensor]
"""(x_RCHW, sigma_R) → v_RCHW."""


def total_derivative(
    velocity: Velocity, x_RCHW: Tensor, sigma_R: Tensor, v_RCHW: Tensor, step: float = 0.0
) -> Tensor:
    """dF/dσ = ∂F/∂x·v + ∂F/∂σ `(R, C, H, W)`, without gradient.

    Exact by forward-mode autodiff, or with `step` > 0 a difference quotient over σ ± step, cut off at 1 and at σ/2.
    SD3 and LongCat feed sin(1000·σ), so to equal the derivative a step must be far below 1e-3, and the rounding of F is
    divided by it. On tiny models of random weights a step of 1e-4 is off by 0.1 % in float32 and 200 % in bfloat16 (at
    best, at 1e-3, 30 %); the exact one in bfloat16 by 0.8 %. Learning wants neither: the exact derivative follows the
    sines, where a step of 0.02 takes the mean slope over them, and the rounding is small beside it.
    """
    with torch.no_grad():
        if step == 0:
            _load_rules()
            # Neither our kernels nor torch's fused attention have a forward-mode derivative.
            with torch_kernels(), sdpa_kernel(SDPBackend.MATH):
                tangents = (v_RCHW, torch.ones_like(sigma_R))
                derivative: Tensor = torch.func.jvp(velocity, (x_RCHW, sigma_R), tangents)[1]
            return derivative
        high_R, low_R = (sigma_R + step).clamp_max(1.0), torch.maximum(sigma_R - step, sigma_R / 2)
        above, below = (
            velocity(euler_step(x_RCHW, v_RCHW, sigma_R, at_R), at_R).float() for at_R in (high_R, low_R)
        )
        return (above - below) / per_sample(high_R - low_R)


def _load_rules() -> None:
    """Torch loads its forward-mode rules at the first use, through `torch.jit.script`, of which it warns itself."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`torch.jit.script` is", DeprecationWarning)
        importlib.import_module("torch._decomp.decompositions_for_jvp")


def tangent(
    F_RCHW: Tensor, v_RCHW: Tensor, derivative_RCHW: Tensor | float, sigma_R: Tensor, ratio: float = 1.0
) -> Tensor:
    """g = F − v_T + r·σ·dF/dσ, float32: minus df/dσ at r = 1."""
    return F_RCHW.float() - v_RCHW.float() + ratio * per_sample(sigma_R) * derivative_RCHW


def consistency_loss(F_RCHW: Tensor, tangent_RCHW: Tensor, scale: float) -> tuple[Tensor, Info]:
    """mean (F − sg[F − g/(‖g‖/√numel + c)])²; gradient flows into `F_RCHW` only."""
    with torch.no_grad():
        norm_R = tangent_RCHW.square().flatten(1).mean(1).sqrt()
        target_RCHW = F_RCHW.float() - tangent_RCHW / per_sample(norm_R + scale)
    loss = (F_RCHW.float() - target_RCHW).square().mean()
    return loss, {"loss": loss.detach(), "tangent": norm_R.mean()}


class Consistency:
    """What an iteration needs and does not change; the loop runs it in `Distillation`'s place."""

    def __init__(
        self, family: Family, config: ConsistencyConfig, roles: Roles, prompts: Prompts, table: EmbeddingTable,
        pass_batch: int = 128, micro_batch: int = 0,
    ) -> None:  # fmt: skip
        self.family, self.config, self.roles = family, config, roles
        self.prompts, self.table = prompts, table
        self.parallel = roles.parallel
        self.device = self.parallel.device
        self.pass_batch, self.micro_batch = pass_batch, micro_batch
        self.latent_shape = (family.latent_channels, *family.latent_size)
        self._grid = np.array(family.sigmas(GRID), dtype=np.float64)[::-1].copy()

    def ratio(self, step: int) -> float:
        """r of an iteration: linearly from 0 to 1 over `tangent_warmup` iterations."""
        return min(1.0, step / self.config.tangent_warmup) if self.config.tangent_warmup else 1.0

    def iterate(self, step: int) -> Values:
        """One iteration; everything to log."""
        config, student, means = self.config, self.roles.student, Means()
        prompts = self.prompts.draw(numpy_generator(config.seed, step, PROMPTS), config.batch)
        time_N = self.schedule(step)
        for rows in self.parallel.parts(config.batch, self.micro_batch):
            cond = self.table.rows(prompts[list(rows)], self.device)
            x_RCHW, sigma_R = self.points(time_N, cond, self._draws(step, ROLLOUT, rows), step, rows)
            with student.training():
                loss, info = self.loss(x_RCHW, sigma_R, cond, self.ratio(step))
                share = len(rows) / self.parallel.share(config.batch)
                (loss * share).backward()  # type: ignore[no-untyped-call]
            means.add(info, len(rows))
        norm = student.update(step)
        self.roles.ema.update(student.masters)
        return self.parallel.mean(means.values() | {"ratio": self.ratio(step), "student_norm": norm})

    def schedule(self, step: int) -> Tensor:
        """Times before the shift `(N + 1,)`, from 1 to 0: N ~ U{1…n_max}, one draw in each of N − 1 equal strata."""
        draw = generator(self.config.seed, step, SCHEDULE)
        n = int(torch.randint(1, self.config.n_max + 1, (), generator=draw))
        inner = 1 - (torch.arange(n - 1) + torch.rand(n - 1, generator=draw)) / n
        return torch.cat([torch.ones(1), inner, torch.zeros(1)])

    def shifted(self, time: Tensor) -> Tensor:
        """σ of times in [0, 1]: the family's own shift."""
        sigma = np.interp(time.cpu().numpy(), np.linspace(0, 1, GRID + 1), self._grid)
        return torch.from_numpy(sigma).to(time.device, torch.float32)

    def points(
        self, time_N: Tensor, cond: Conditioning, draws: Draws, step: int, rows: Sequence[int]
    ) -> tuple[Tensor, Tensor]:
        """(x, σ) on the teacher's trajectories: Euler steps to an anchor, then part of the step to the next one."""
        k_R = draws.integers(len(time_N) - 1)
        noise_RCHW = draws.normal(self.latent_shape)

        def velocity(x_RCHW: Tensor, sigma_R: Tensor, rows: Tensor) -> Tensor:
            return self.teacher(x_RCHW, sigma_R, {name: value[rows] for name, value in cond.items()})

        sigma_N = self.shifted(time_N[:-1])
        at_least = len(sigma_N) if self.parallel.fsdp else 0
        anchor = rollout(velocity, noise_RCHW, sigma_N, k_R, at_least=at_least)
        draws = self._draws(step, STUDENT, rows)
        moves_R, along_R = draws.uniform() >= AT_ANCHOR, draws.uniform()
        times = time_N.to(self.device)
        time_R = torch.lerp(times[k_R], times[k_R + 1], along_R)
        sigma_R = torch.where(moves_R, self.shifted(time_R), anchor.sigma_B)
        return euler_step(anchor.x_BCHW, anchor.v_BCHW, anchor.sigma_B, sigma_R), sigma_R

    def loss(self, x_RCHW: Tensor, sigma_R: Tensor, cond: Conditioning, ratio: float) -> tuple[Tensor, Info]:
        """The student's objective with gradient, and what to log."""
        config, net = self.config, self.roles.student.net

        def student(x_RCHW: Tensor, sigma_R: Tensor) -> Tensor:
            return self.family.velocity(net, x_RCHW, sigma_R, cond)

        v_RCHW = self.teacher(x_RCHW, sigma_R, cond)
        with self.roles.student.active():
            F_RCHW = student(x_RCHW, sigma_R)
            derivative = (
                total_derivative(student, x_RCHW, sigma_R, v_RCHW, config.tangent_step) if ratio else 0.0
            )
        tangent_RCHW = tangent(F_RCHW.detach(), v_RCHW, derivative, sigma_R, ratio)
        loss, info = consistency_loss(F_RCHW, tangent_RCHW, config.tangent_scale)
        x0_RN = predict_x0(x_RCHW, F_RCHW.detach(), sigma_R).flatten(1)
        return loss, info | {"x0_mean": x0_RN.mean(), "x0_std": x0_RN.std(1).mean()}

    @torch.no_grad()
    def teacher(self, x_RCHW: Tensor, sigma_R: Tensor, cond: Conditioning) -> Tensor:
        """The teacher's guided velocity; without guidance (1) the prompt's alone."""
        # Processes that share weights (FSDP) must run as many passes, whatever number of samples each advances.
        most = len(x_RCHW) if self.parallel.fsdp else max(1, self.pass_batch // 2)
        network, scale = self.roles.teacher, self.config.guidance
        made = []
        for start in range(0, len(x_RCHW), most):
            x, sigma = x_RCHW[start : start + most], sigma_R[start : start + most]
            some = {name: value[start : start + most] for name, value in cond.items()}
            if scale != 1:
                empty = self.table.unconditional(len(x), self.device)
                some = {name: torch.cat([empty[name], value]) for name, value in some.items()}
                x, sigma = torch.cat([x, x]), torch.cat([sigma, sigma])
            with network.active():
                v = self.family.velocity(network.net, x, sigma, some).float()
            if scale != 1:
                v_empty, v_cond = v.chunk(2)
                v = self.family.guided(v_cond, v_empty, scale)
            made.append(v)
        return torch.cat(made)

    def _draws(self, step: int, stream: int, rows: Sequence[int]) -> Draws:
        return Draws(self.config.seed, step, stream, rows, self.device)
