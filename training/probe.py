"""How near the student's samples are to its teacher's, without pictures or a judge: what `keep-best` compares.

The energy distance (Székely & Rizzo 2013) between the averaged student's few-step samples x and the guided teacher's
many-step samples y of the same prompts, in latents: 2·E|x − y| − E|x − x'| − E|y − y'|. It is 0 where the distributions
are equal and positive elsewhere, so that leaving the target, blur and collapse to one picture all raise it. (The
teacher's own correction |x̂0_teacher − x| falls when the student collapses: the middle of a mode is denoised to itself.)
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from engines.families.base import Conditioning, Family
from training.checkpoint import Score
from training.config import CDMConfig, ConsistencyConfig, OptimConfig
from training.embeddings import EmbeddingTable
from training.prompts import Prompts
from training.roles import Network, Roles
from training.run import numpy_generator
from training.sampling import sample, sample_renoise

PROMPTS, SEEDS = 16, 4
STUDENT_STEPS, TEACHER_STEPS = 4, 28
STREAM = 1001
"""Far from the streams of `training.distill`, and not that of the sample grids."""


class Probe:
    """Scores of one run: prompts and noise are fixed by its seed, the teacher's samples drawn once a start."""

    def __init__(
        self, family: Family, roles: Roles, prompts: Prompts, table: EmbeddingTable, pass_batch: int = 128,
        count: int = PROMPTS,
    ) -> None:  # fmt: skip
        """`count`: prompts, of `SEEDS` samples each. Draws the teacher's samples; every process takes part."""
        self.family, self.roles, self.table, self.pass_batch = family, roles, table, pass_batch
        drawn = prompts.draw(numpy_generator(roles.config.seed, 0, STREAM), count)
        self.rows = np.repeat(drawn, SEEDS)
        self.teacher_KSD = self._samples(roles.teacher, TEACHER_STEPS, target_guidance(roles.config), 1 << 20)

    def score(self) -> Score:
        """Of the averaged student; every process takes part. Lower is better; it may be a little below 0 by chance."""
        with self.roles.averaged() as student:
            student_KSD = self._samples(student, STUDENT_STEPS, 1.0, 0)
        return Score(energy_distance(student_KSD, self.teacher_KSD))

    def _samples(self, network: Network, steps: int, guidance: float, first_seed: int) -> Tensor:
        """Flattened latents by prompt and seed, `(count, SEEDS, C·H·W)` float32 on the CPU."""
        family, kept, parts = self.family, self.family.transformer, []
        with network.active():
            family.transformer = network.net
            try:
                for at in range(0, len(self.rows), self.pass_batch):
                    rows = self.rows[at : at + self.pass_batch]
                    cond = self.table.rows(rows, self.roles.parallel.device)
                    seeds = range(first_seed + at, first_seed + at + len(rows))
                    parts.append(self._sample(cond, steps, guidance, seeds).flatten(1).float().cpu())
            finally:
                family.transformer = kept
        return torch.stack(torch.split(torch.cat(parts), SEEDS))

    def _sample(self, cond: Conditioning, steps: int, guidance: float, seeds: Sequence[int]) -> Tensor:
        sigmas = self.family.sigmas(steps)
        if guidance == 1 and steps == STUDENT_STEPS and isinstance(self.roles.config, ConsistencyConfig):
            return sample_renoise(self.family, cond, sigmas, seeds)
        uncond = None if guidance == 1 else self.table.unconditional(len(seeds), self.roles.parallel.device)
        return sample(self.family, cond, sigmas, seeds, guidance, uncond)


def target_guidance(config: OptimConfig) -> float:
    """The classifier-free guidance scale of the teacher that a student of `config` aims at; 1: none."""
    if isinstance(config, ConsistencyConfig):
        return config.guidance
    assert isinstance(config, CDMConfig)
    return config.guidance + 1 if config.weight_ca else config.dm_guidance


def energy_distance(x_KSD: Tensor, y_KSD: Tensor) -> float:
    """Mean over K prompts of 2·E|x − y| − E|x − x'| − E|y − y'|, unbiased, per root of a dimension."""
    size, root = x_KSD.shape[1], x_KSD.shape[2] ** 0.5
    pairs = size * (size - 1)
    # Not by a matrix product: of near samples it keeps no digits.
    exact = "donot_use_mm_for_euclid_dist"
    across = torch.cdist(x_KSD, y_KSD, compute_mode=exact).mean((1, 2))
    within = [torch.cdist(z, z, compute_mode=exact).sum((1, 2)) / pairs for z in (x_KSD, y_KSD)]
    return float((2 * across - within[0] - within[1]).mean() / root)
