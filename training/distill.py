"""The CDM loop: prompts → cached embeddings → rollout → fake-teacher step → student step. Works on any family.

Shapes as in `training/losses.py`; equations there and in arXiv 2605.06376. R is the samples of one micro-batch of one
process. Ablations and the baselines without a loop of their own (decoupled DMD, DMD2) are settings of `CDMConfig`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from engines.families.base import Conditioning, Family
from training import checkpoint, losses
from training.config import CDMConfig
from training.cpu_kernels import cpu_kernels
from training.draws import Draws, generator
from training.embeddings import EmbeddingTable
from training.means import Means, Values
from training.prompts import Prompts
from training.roles import Network, Roles
from training.rollout import Rollout, draw_schedule, rollout
from training.run import Run, numpy_generator
from training.watchdog import Watchdog, WatchdogConfig

PROMPTS, SCHEDULE, ROLLOUT, FAKE, STUDENT = range(5)
"""Streams of randomness within one iteration: turning one part off leaves the others' draws alone."""


class Method(Protocol):
    """What the loop runs: CDM and its kin here, `training/consistency.py` there."""

    family: Family
    roles: Roles

    def iterate(self, step: int) -> Values:
        """One iteration; everything to log."""


@dataclass(frozen=True)
class Query:
    """One point of a no-gradient pass: a network is asked for x̂0 at (x, τ) under a conditioning."""

    x_RCHW: Tensor
    tau_R: Tensor
    conditioning: Conditioning


@dataclass(frozen=True)
class Part:
    """A micro-batch: its samples' numbers in the whole batch, their prompts' embeddings, and where they stand."""

    rows: Sequence[int]
    cond: Conditioning
    anchor: Rollout


@dataclass(frozen=True)
class Term:
    """One term of the objective before the teachers are asked: x̂0 with gradient, and sg[x̂0] re-noised to τ."""

    name: str
    weight: float
    x0_RCHW: Tensor
    x_RCHW: Tensor
    tau_R: Tensor

    @classmethod
    def renoised(cls, name: str, weight: float, x0_RCHW: Tensor, eps_RCHW: Tensor, tau_R: Tensor) -> Term:
        """The term of x̂0, asked about at τ."""
        return cls(name, weight, x0_RCHW, losses.renoise(x0_RCHW.detach(), eps_RCHW, tau_R), tau_R)


class Distillation:
    """What an iteration needs and does not change: the family's forward, the constants, the prompts."""

    def __init__(
        self, family: Family, config: CDMConfig, roles: Roles, prompts: Prompts, table: EmbeddingTable,
        pass_batch: int = 128, micro_batch: int = 0,
    ) -> None:  # fmt: skip
        self.family, self.config, self.roles = family, config, roles
        self.prompts, self.table = prompts, table
        self.parallel = roles.parallel
        self.device = self.parallel.device
        self.pass_batch = pass_batch
        self.micro_batch = micro_batch
        self.latent_shape = (family.latent_channels, *family.latent_size)
        fixed = torch.tensor(family.sigmas(config.fixed_steps)[:-1]) if config.schedule == "fixed" else None
        self.fixed_sigma_N = fixed
        self._rolled_out: tuple[int, list[Part]] | None = None

    def iterate(self, step: int) -> Values:
        """One iteration: a fake-teacher step, and every `student_every`th time a student step. Everything to log."""
        parts = self.samples(step)
        values = self.fake_step(step, parts)
        if self.student_turn(step):
            values |= self.student_step(step, parts)
            self._rolled_out = None
        return self.parallel.mean(values)

    def samples(self, step: int) -> list[Part]:
        """The student's rollouts that an iteration learns from.

        With `shared_rollout` the iterations up to a student step learn from one: the student does not change between
        them, so it is its own distribution still. A run resumed between them rolls out the same again.
        """
        drawn = step - step % self.config.student_every if self.config.shared_rollout else step
        if self._rolled_out is not None and self._rolled_out[0] == drawn:
            return self._rolled_out[1]
        self._rolled_out = None
        prompts, sigma_N, parts = self.draw_prompts(drawn), self.schedule(drawn), []
        for rows in self.parallel.parts(self.config.batch, self.micro_batch):
            cond = self.table.rows(prompts[list(rows)], self.device)
            parts.append(Part(rows, cond, self.rollout(sigma_N, cond, self._draws(drawn, ROLLOUT, rows))))
        if self.config.shared_rollout:
            self._rolled_out = drawn, parts
        return parts

    def draw_prompts(self, step: int) -> NDArray[np.int64]:
        """Indices of the whole batch's prompts."""
        return self.prompts.draw(numpy_generator(self.config.seed, step, PROMPTS), self.config.batch)

    def student_turn(self, step: int) -> bool:
        """Whether the student, too, takes a step."""
        return step % self.config.student_every == self.config.student_every - 1

    def schedule(self, step: int) -> Tensor:
        """Anchors of an iteration, `(N,)`, the same for the whole batch."""
        if self.fixed_sigma_N is not None:
            return self.fixed_sigma_N
        config = self.config
        return draw_schedule(
            generator(config.seed, step, SCHEDULE),
            config.n_max, config.anchor_low, config.anchor_high, config.anchor_shift,
        )  # fmt: skip

    def rollout(self, sigma_N: Tensor, cond: Conditioning, draws: Draws) -> Rollout:
        """The student from noise to each sample's anchor on one schedule."""
        k_R = draws.integers(len(sigma_N))
        noise_RCHW = draws.normal(self.latent_shape)

        def velocity(x_RCHW: Tensor, sigma_R: Tensor, rows: Tensor) -> Tensor:
            some = {name: value[rows] for name, value in cond.items()}
            return self.velocity(self.roles.student, x_RCHW, sigma_R, some)

        truncate = self.config.truncated_rollout
        return rollout(
            velocity, noise_RCHW, sigma_N, k_R, truncate, len(sigma_N) if self.parallel.fsdp else 0
        )

    def fake_step(self, step: int, parts: Sequence[Part]) -> Values:
        """Flow matching of φ on the student's samples, then the merge φ ← 0.999·φ + 0.001·θ."""
        config, fake, means = self.config, self.roles.fake, Means()
        with fake.training():
            for part in parts:
                draws, x0_RCHW = self._draws(step, FAKE, part.rows), part.anchor.x0_BCHW
                sigma_R = draws.uniform_between(config.tau_low, config.tau_high)
                eps_RCHW = draws.normal(self.latent_shape)
                x_RCHW = losses.renoise(x0_RCHW, eps_RCHW, sigma_R)
                v_RCHW = self.velocity(fake, x_RCHW, sigma_R, part.cond)
                loss, info = losses.fake_teacher_loss(v_RCHW, x0_RCHW, eps_RCHW)
                self.backward(loss, part)
                means.add(info, len(part.rows))
        norm = fake.update(step)
        self.roles.merge_fake()
        return means.values() | {"fake_norm": norm}

    def student_step(self, step: int, parts: Sequence[Part]) -> Values:
        """CA + DM at the anchor and CDM off the trajectory, one backward."""
        means, student = Means(), self.roles.student
        with student.training():
            for part in parts:
                loss, info = self.student_loss(part, self._draws(step, STUDENT, part.rows))
                self.backward(loss, part)
                means.add(info, len(part.rows))
        norm = student.update(step)
        self.roles.ema.update(student.masters)
        return means.values() | {"student_norm": norm}

    def student_loss(self, part: Part, draws: Draws) -> tuple[Tensor, losses.Info]:
        """The student's objective with gradient, and its terms."""
        config = self.config
        terms = self.terms(part, draws)
        matched = [term for term in terms if term.name != "ca"]
        uncond = self.table.unconditional(len(part.rows), self.device)
        emptied = terms if config.dm_guidance != 1 else [term for term in terms if term.name == "ca"]
        # Both teachers, without gradient: one batch each.
        at = [Query(term.x_RCHW, term.tau_R, part.cond) for term in terms]
        at_empty = [Query(term.x_RCHW, term.tau_R, uncond) for term in emptied]
        asked = self.x0_of_all(self.roles.teacher, [*at, *at_empty])
        cond = dict(zip([term.name for term in terms], asked, strict=False))
        empty = dict(zip([term.name for term in emptied], asked[len(terms) :], strict=True))
        asked_fake = self.x0_of_all(
            self.roles.fake, [Query(term.x_RCHW, term.tau_R, part.cond) for term in matched]
        )
        fake = dict(zip([term.name for term in matched], asked_fake, strict=True))

        floor, loss, values = config.weight_floor, torch.zeros((), device=self.device), losses.Info()
        matching: Tensor | None = None
        for term in terms:
            teacher = cond[term.name]
            if term.name == "ca":
                value, info = losses.ca_loss(term.x0_RCHW, teacher, empty["ca"], config.guidance, floor)
            else:
                if config.dm_guidance != 1:
                    teacher = losses.guided_x0(teacher, empty[term.name], config.dm_guidance)
                if term.name == "dm":
                    matching = teacher - fake["dm"]
                of_term = losses.dm_loss if term.name == "dm" else losses.cdm_loss
                value, info = of_term(term.x0_RCHW, teacher, fake[term.name], floor)
            loss = loss + term.weight * value
            values |= {term.name if key == "loss" else f"{term.name}_{key}": v for key, v in info.items()}
        extra, info = self.extra_loss(part, terms)
        loss, values = loss + extra, values | info
        if "ca" in cond and matching is not None:
            values["cos_ca_dm"] = losses.mean_cosine(cond["ca"] - empty["ca"], matching)
        x0_RN = terms[0].x0_RCHW.detach().flatten(1)
        values |= {"student": loss.detach(), "x0_mean": x0_RN.mean(), "x0_std": x0_RN.std(1).mean()}
        # The teacher's own prediction there: what a sane spread is, whatever the run was from its first step on.
        values["teacher_std"] = cond[terms[0].name].flatten(1).std(1).mean()
        return loss, values

    def extra_loss(self, part: Part, terms: Sequence[Term]) -> tuple[Tensor, losses.Info]:
        """What a method built on this one adds to the objective, with gradient, and what to log of it."""
        return torch.zeros((), device=self.device), losses.Info()

    def terms(self, part: Part, draws: Draws) -> list[Term]:
        """The student's forwards, with gradient, at the anchor (CA, DM) and off the trajectory (CDM), re-noised.

        Every number is drawn whichever terms are in force, so that an ablation leaves the others' draws alone.
        """
        config, student, anchor = self.config, self.roles.student, part.anchor
        low, high = config.tau_low, config.tau_high
        tau_ca_R = draws.uniform_between(0.0, anchor.sigma_B).clamp(low, high)  # τ ~ U(0, σ_k), clamped
        tau_dm_R, tau_cdm_R = draws.uniform_between(low, high), draws.uniform_between(low, high)
        top = anchor.sigma_B.clamp(low, high) if config.off_below_anchor else high
        sigma_off_R = draws.uniform_between(low, top)  # σ'
        eps_ca, eps_dm, eps_cdm, eps_off = (draws.normal(self.latent_shape) for _ in range(4))

        terms: list[Term] = []
        x0_RCHW: Tensor | None = None
        for name, weight, tau_R, eps_RCHW in (
            ("ca", config.weight_ca, tau_ca_R, eps_ca), ("dm", config.weight_dm, tau_dm_R, eps_dm)
        ):  # fmt: skip
            if not weight:
                continue
            if x0_RCHW is None or not config.shared_forward:
                x0_RCHW = self.x0(student, anchor.x_BCHW, anchor.sigma_B, part.cond)
            terms.append(Term.renoised(name, weight, x0_RCHW, eps_RCHW, tau_R))
        if config.weight_cdm:
            x_off_RCHW, sigma_off_R = losses.off_trajectory(
                config.off_trajectory, anchor, sigma_off_R, eps_off
            )
            x0_off_RCHW = self.x0(student, x_off_RCHW, sigma_off_R, part.cond)
            terms.append(Term.renoised("cdm", config.weight_cdm, x0_off_RCHW, eps_cdm, tau_cdm_R))
        return terms

    def velocity(self, network: Network, x_RCHW: Tensor, sigma_R: Tensor, cond: Conditioning) -> Tensor:
        """v of one network."""
        with network.active():
            return self.family.velocity(network.net, x_RCHW, sigma_R, cond)

    def x0(self, network: Network, x_RCHW: Tensor, sigma_R: Tensor, cond: Conditioning) -> Tensor:
        """x̂0 of one network, float32."""
        return losses.predict_x0(x_RCHW, self.velocity(network, x_RCHW, sigma_R, cond), sigma_R)

    @torch.no_grad()
    def x0_of_all(self, network: Network, queries: Sequence[Query]) -> list[Tensor]:
        """x̂0 at every query, in as few passes of at most `pass_batch` samples as it takes."""
        if not queries:
            return []
        x = torch.cat([query.x_RCHW for query in queries])
        tau = torch.cat([query.tau_R for query in queries])
        names = queries[0].conditioning
        cond = {name: torch.cat([query.conditioning[name] for query in queries]) for name in names}
        parts = []
        for start in range(0, len(x), self.pass_batch):
            part = slice(start, start + self.pass_batch)
            some = {name: value[part] for name, value in cond.items()}
            parts.append(self.x0(network, x[part], tau[part], some))
        return list(torch.split(torch.cat(parts), [len(query.x_RCHW) for query in queries]))

    def backward(self, loss: Tensor, part: Part) -> None:
        """Gradients of a micro-batch's mean, as its share of this process's mean."""
        share = len(part.rows) / self.parallel.share(self.config.batch)
        (loss * share).backward()  # type: ignore[no-untyped-call]

    def _draws(self, step: int, stream: int, rows: Sequence[int]) -> Draws:
        return Draws(self.config.seed, step, stream, rows, self.device)


class Watched:
    """What a checkpoint holds: networks, the watchdog's memory, and which checkpoint came before trouble."""

    def __init__(self, roles: Roles, watchdog: Watchdog, run: Run) -> None:
        self.roles, self.watchdog, self.run = roles, watchdog, run

    def tensors(self) -> Mapping[str, Mapping[str, Tensor]]:
        """The roles'."""
        return self.roles.tensors()

    def counters(self) -> Mapping[str, Any]:
        """The roles', and the watchdog's."""
        return {
            **self.roles.counters(), "watchdog": self.watchdog.counters(), "protected": self.run.protected
        }  # fmt: skip

    def restore(self, saved: checkpoint.Checkpoint) -> None:
        """Put all back."""
        self.roles.restore(saved)
        self.watchdog.restore(saved.meta.get("watchdog", {}))
        self.run.protected = saved.meta.get("protected")


def distill(
    work: Method,
    run: Run,
    watchdog: Watchdog | None = None,
    start: Callable[[int], None] = lambda step: None,
    after: Callable[[int, Values], None] = lambda done, values: None,
    score: Callable[[int], checkpoint.Score | None] = lambda done: None,
) -> int:
    """Iterate until `run` is complete, from its newest checkpoint if it has one; the number of iterations behind it.

    `start` is told the first iteration, `after` the number of iterations done and what the last one logged: trackers,
    sample grids, exports. `score` rates the student after that number of iterations, or does not: a checkpoint with a
    score is saved then, and the best is kept.

    Raises:
        Diverged: a loss or gradient is not finite; the step is in no checkpoint.
        Collapsed: the watchdog stopped the run; older checkpoints are kept.
    """
    watchdog = watchdog or Watchdog(WatchdogConfig(watchdog="off"))
    state = Watched(work.roles, watchdog, run)
    first = run.resume(state)
    start(first)
    with cpu_kernels():
        for step in run.steps(first, state, score):
            values = work.iterate(step)
            run.log(step, every=1, **values)
            verdict = watchdog.observe(step, values)
            if not watchdog.troubled:
                run.protected = None
            elif run.protected is None and run.saved_step:
                run.protected = run.saved_step
            if verdict.level != "ok":
                run.tell(step, verdict.level, verdict.diagnosis)
            if verdict.level == "stop":
                raise run.collapsed(verdict.diagnosis)
            after(step + 1, values)
    return max(first, run.total)
