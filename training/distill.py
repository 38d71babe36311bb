"""The CDM loop: prompts → cached embeddings → rollout → fake-teacher step → student step. Works on any family.

Shapes as in `training/losses.py`; equations there and in arXiv 2605.06376. Every random number of iteration `step`
comes from (seed, step), so an iteration can be repeated alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from engines.families.base import Conditioning, Family
from training import losses
from training.config import CDMConfig
from training.cpu_kernels import cpu_kernels
from training.prompts import EmbeddingTable, Prompts
from training.roles import Roles
from training.rollout import Rollout, draw_anchor, draw_schedule, rollout
from training.run import Run, generator, numpy_generator

PROMPTS, ROLLOUT, FAKE, STUDENT = range(4)
"""Streams of randomness within one iteration: turning one part off leaves the others' draws alone."""

Values = dict[str, float]


@dataclass(frozen=True)
class Query:
    """One point of a no-gradient pass: a network is asked for x̂0 at (x, τ) under a conditioning."""

    x_BCHW: Tensor
    tau_B: Tensor
    conditioning: Conditioning


@dataclass(frozen=True)
class Draw:
    """Random numbers of one branch, drawn on the CPU so that they do not depend on the device."""

    generator: torch.Generator
    device: torch.device

    def uniform_B(self, batch: int, low: float | Tensor, high: float | Tensor) -> Tensor:
        """U(low, high) per sample, float32."""
        return low + (high - low) * torch.rand(batch, generator=self.generator).to(self.device)

    def normal(self, like_BCHW: Tensor) -> Tensor:
        """ε of a tensor's shape, float32."""
        return torch.randn(like_BCHW.shape, generator=self.generator).to(self.device)


class Distillation:
    """What an iteration needs and does not change: the family's forward, the constants, the prompts."""

    def __init__(
        self, family: Family, config: CDMConfig, roles: Roles, prompts: Prompts, table: EmbeddingTable,
        pass_batch: int = 128,
    ) -> None:  # fmt: skip
        self.family, self.config, self.roles = family, config, roles
        self.prompts, self.table = prompts, table
        self.device = next(roles.teacher.parameters()).device
        self.pass_batch = pass_batch
        self.latent_shape = (family.latent_channels, *family.latent_size)

    def iterate(self, step: int) -> Values:
        """One iteration: a fake-teacher step, and every `student_every`th time a student step. Everything to log."""
        config = self.config
        rows = self.prompts.draw(numpy_generator(config.seed, step, PROMPTS), config.batch)
        cond = self.table.rows(rows, self.device)
        anchor = self.rollout(cond, self._draw(step, ROLLOUT))
        values = self.fake_step(anchor, cond, self._draw(step, FAKE))
        if step % config.student_every == config.student_every - 1:
            values |= self.student_step(anchor, cond, self._draw(step, STUDENT))
        return values

    def rollout(self, cond: Conditioning, draw: Draw) -> Rollout:
        """The student from noise to each sample's anchor on one random schedule."""
        config = self.config
        sigma_N = draw_schedule(
            draw.generator, config.n_max, config.anchor_low, config.anchor_high, config.anchor_shift
        )
        k_B = draw_anchor(draw.generator, len(sigma_N), config.batch)
        noise_BCHW = draw.normal(torch.empty(config.batch, *self.latent_shape))

        def velocity(x_RCHW: Tensor, sigma_R: Tensor, rows: Tensor) -> Tensor:
            some = {name: value[rows] for name, value in cond.items()}
            return self.family.velocity(self.roles.student.net, x_RCHW, sigma_R, some)

        return rollout(velocity, noise_BCHW, sigma_N, k_B, config.truncated_rollout)

    def fake_step(self, anchor: Rollout, cond: Conditioning, draw: Draw) -> Values:
        """Flow matching of φ on the student's samples, then the merge φ ← 0.999·φ + 0.001·θ."""
        config, fake = self.config, self.roles.fake
        sigma_B = draw.uniform_B(config.batch, config.tau_low, config.tau_high)
        eps_BCHW = draw.normal(anchor.x0_BCHW)
        x_BCHW = losses.renoise(anchor.x0_BCHW, eps_BCHW, sigma_B)
        v_BCHW = self.family.velocity(fake.net, x_BCHW, sigma_B, cond)
        loss, _ = losses.fake_teacher_loss(v_BCHW, anchor.x0_BCHW, eps_BCHW)
        loss.backward()  # type: ignore[no-untyped-call]
        norm = fake.update(config)
        self.roles.merge_fake()
        return {"fake": float(loss.detach()), "fake_norm": norm}

    def student_step(self, anchor: Rollout, cond: Conditioning, draw: Draw) -> Values:
        """CA + DM at the anchor and CDM off the trajectory, one backward."""
        loss, values = self.student_loss(anchor, cond, draw)
        loss.backward()  # type: ignore[no-untyped-call]
        values["student_norm"] = self.roles.student.update(self.config)
        self.roles.ema.update(self.roles.student.mixed.masters)
        return values

    def student_loss(self, anchor: Rollout, cond: Conditioning, draw: Draw) -> tuple[Tensor, Values]:
        """The student's objective with gradient, and its terms."""
        config, student = self.config, self.roles.student.net
        batch, low, high = config.batch, config.tau_low, config.tau_high
        uncond = self.table.unconditional(batch, self.device)
        tau_ca_B = draw.uniform_B(batch, 0.0, anchor.sigma_B).clamp(low, high)  # τ ~ U(0, σ_k), clamped
        tau_dm_B = draw.uniform_B(batch, low, high)
        tau_cdm_B = draw.uniform_B(batch, low, high)
        sigma_off_B = draw.uniform_B(batch, low, high)  # σ', above or below σ_k
        eps_ca_BCHW, eps_dm_BCHW, eps_cdm_BCHW = (draw.normal(anchor.x_BCHW) for _ in range(3))

        # Student forwards, with gradient: at the anchor (CA and DM use the same), and off the trajectory.
        x0_ca_BCHW = self.x0(student, anchor.x_BCHW, anchor.sigma_B, cond)
        x0_dm_BCHW = x0_ca_BCHW
        if not config.shared_forward:
            x0_dm_BCHW = self.x0(student, anchor.x_BCHW, anchor.sigma_B, cond)
        x_off_BCHW = losses.off_trajectory(anchor.x_BCHW, anchor.v_BCHW, anchor.sigma_B, sigma_off_B)
        x0_off_BCHW = self.x0(student, x_off_BCHW, sigma_off_B, cond)

        # Both teachers at sg[x̂0] re-noised, without gradient: one batch each.
        x_ca_BCHW = losses.renoise(x0_ca_BCHW.detach(), eps_ca_BCHW, tau_ca_B)
        at_dm = Query(losses.renoise(x0_dm_BCHW.detach(), eps_dm_BCHW, tau_dm_B), tau_dm_B, cond)
        at_cdm = Query(losses.renoise(x0_off_BCHW.detach(), eps_cdm_BCHW, tau_cdm_B), tau_cdm_B, cond)
        at_ca, at_ca_empty = Query(x_ca_BCHW, tau_ca_B, cond), Query(x_ca_BCHW, tau_ca_B, uncond)
        teacher_ca, teacher_empty, teacher_dm, teacher_cdm = self.x0_of_all(
            self.roles.teacher, [at_ca, at_ca_empty, at_dm, at_cdm]
        )
        fake_dm, fake_cdm = self.x0_of_all(self.roles.fake.net, [at_dm, at_cdm])

        delta_ca_BCHW = losses.ca_delta(teacher_ca, teacher_empty, config.guidance)
        delta_dm_BCHW = losses.dm_delta(teacher_dm, fake_dm)
        floor = config.weight_floor
        ca, ca_info = losses.distribution_matching_loss(x0_ca_BCHW, teacher_ca, delta_ca_BCHW, floor)
        dm, dm_info = losses.distribution_matching_loss(x0_dm_BCHW, teacher_dm, delta_dm_BCHW, floor)
        cdm, cdm_info = losses.cdm_loss(x0_off_BCHW, teacher_cdm, fake_cdm, floor)
        loss = config.weight_ca * ca + config.weight_dm * dm + config.weight_cdm * cdm

        values = {
            "student": loss.detach(),
            "cos_ca_dm": losses.mean_cosine(delta_ca_BCHW, delta_dm_BCHW),
            "x0_mean": x0_dm_BCHW.detach().mean(),
            "x0_std": x0_dm_BCHW.detach().std(),
        }
        for term, info in (("ca", ca_info), ("dm", dm_info), ("cdm", cdm_info)):
            values |= {term if key == "loss" else f"{term}_{key}": value for key, value in info.items()}
        return loss, {key: float(value) for key, value in values.items()}

    def x0(self, net: nn.Module, x_BCHW: Tensor, sigma_B: Tensor, cond: Conditioning) -> Tensor:
        """x̂0 of one network, float32."""
        return losses.predict_x0(x_BCHW, self.family.velocity(net, x_BCHW, sigma_B, cond), sigma_B)

    @torch.no_grad()
    def x0_of_all(self, net: nn.Module, queries: Sequence[Query]) -> list[Tensor]:
        """x̂0 at every query, in as few passes of at most `pass_batch` samples as it takes."""
        x = torch.cat([query.x_BCHW for query in queries])
        tau = torch.cat([query.tau_B for query in queries])
        cond = {
            name: torch.cat([query.conditioning[name] for query in queries])
            for name in queries[0].conditioning
        }
        parts = []
        for start in range(0, len(x), self.pass_batch):
            part = slice(start, start + self.pass_batch)
            parts.append(
                self.x0(net, x[part], tau[part], {name: value[part] for name, value in cond.items()})
            )
        return list(torch.split(torch.cat(parts), [len(query.x_BCHW) for query in queries]))

    def _draw(self, step: int, stream: int) -> Draw:
        return Draw(generator(self.config.seed, step, stream), self.device)


def distill(work: Distillation, run: Run, after: Callable[[int], None] = lambda done: None) -> int:
    """Iterate until `run` is complete, from its newest checkpoint if it has one; the number of iterations behind it.

    `after` is called with the number of iterations done, after each: sample grids, exports.

    Raises:
        Diverged: a loss or gradient is not finite; the step is in no checkpoint.
    """
    start = run.resume(work.roles)
    with cpu_kernels():
        for step in run.steps(start, work.roles):
            run.log(step, every=1, **work.iterate(step))
            after(step + 1)
    return max(start, run.total)
