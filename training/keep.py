"""Fine-tuning a distilled student without blurring it: CDM from the student towards a fine-tuned teacher.

Flow matching on a few-step student pulls each of its predictions to the mean of the data, and its pictures blur. So the
*teacher* is fine-tuned (`training/finetune.py`), and the student goes on being distilled from it:

- θ starts as the old student, not as the teacher;
- φ starts as the teacher, and learns the old student's distribution for `fake_warmup` iterations alone;
- a share of every batch are general prompts, on which the student is held to what it was:
  λ·mean (x̂0_θ − x̂0_old)², at the rollout's anchors.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from engines.families.base import Family, load_family
from training import losses
from training.config import KeepConfig
from training.distill import PROMPTS, Distillation, Part, Term
from training.embeddings import EmbeddingTable
from training.errors import TrainingError
from training.prompts import Prompts
from training.roles import Network, Roles
from training.run import numpy_generator

GENERAL = 20
"""Stream of the general prompts' draws, apart from those of `training.distill`."""


def together(domain: Prompts, general: Prompts) -> Prompts:
    """All prompts once, the domain's first and with their own weights; `Keep` draws from either part."""
    pairs = list(zip(domain.texts, np.diff(domain.cumulative, prepend=0.0).tolist(), strict=True))
    return Prompts.of([*pairs, *((text, 0.0) for text in general.texts)], "the prompts")


def load_student(folder: Path, transformer: nn.Module) -> nn.Module:
    """The transformer of a student's folder, float32; it must have the parameters of `transformer`.

    Raises:
        TrainingError: it has not.
        FamilyError: the folder is no model.
    """
    old = load_family(folder, torch.float32, only=("transformer",)).transformer
    have = {name: tuple(value.shape) for name, value in old.named_parameters()}
    want = {name: tuple(value.shape) for name, value in transformer.named_parameters()}
    for name in sorted(have.keys() ^ want.keys()) or [name for name in want if have[name] != want[name]]:
        raise TrainingError(
            f"--student={folder} has another shape than the teacher: {name} is {have.get(name, 'absent')} there and "
            f"{want.get(name, 'absent')} in the teacher; give the student that was distilled from this teacher's base"
        )
    return old


class Keep(Distillation):
    """`Distillation` from an existing student, held to what it was on general prompts."""

    config: KeepConfig

    def __init__(
        self, family: Family, config: KeepConfig, roles: Roles, old: nn.Module, domain: Prompts, general: Prompts,
        prompts: Prompts, table: EmbeddingTable, pass_batch: int = 128, micro_batch: int = 0,
    ) -> None:  # fmt: skip
        """`old`: the student to start from and to keep, float32, taken over; `prompts`: `together(domain, general)`.

        `roles` start as it; a resumed run then puts its checkpoint over it.
        """
        super().__init__(family, config, roles, prompts, table, pass_batch, micro_batch)
        roles.start_student(dict(old.named_parameters()))
        dtype = getattr(torch, config.dtype)
        old = nn.Module.to(old, self.device, dtype).eval().requires_grad_(False)
        self.old = Network(self.parallel.shard(old, family.fsdp_units))
        number = {text: index for index, text in enumerate(prompts.texts)}
        self.domain, self.general = domain, general
        self.numbers_D, self.numbers_G = _numbers(number, domain.texts), _numbers(number, general.texts)
        self.kept = round(config.keep_share * config.batch)
        """General prompts of a batch: its first samples."""

    def draw_prompts(self, step: int) -> NDArray[np.int64]:
        """`kept` general prompts, then those of the domain."""
        general = self.general.draw(numpy_generator(self.config.seed, step, GENERAL), self.kept)
        domain = self.domain.draw(
            numpy_generator(self.config.seed, step, PROMPTS), self.config.batch - self.kept
        )
        return np.concatenate([self.numbers_G[general], self.numbers_D[domain]])

    def student_turn(self, step: int) -> bool:
        """As in CDM, once the fake teacher had its warm-up."""
        return step >= self.config.fake_warmup and super().student_turn(step)

    def extra_loss(self, part: Part, terms: Sequence[Term]) -> tuple[Tensor, losses.Info]:
        """λ·mean (x̂0_θ − x̂0_old)² of the general samples of a micro-batch, at their anchors.

        Divided by their share of the whole batch, so that micro-batches and processes add up to the mean.
        """
        general_R = torch.tensor([float(row < self.kept) for row in part.rows], device=self.device)
        if not self.config.keep_weight or not self.kept:
            return super().extra_loss(part, terms)
        anchor = part.anchor
        at_anchor = [term.x0_RCHW for term in terms if term.name != "cdm"]
        x0_RCHW = (
            at_anchor[0]
            if at_anchor
            else self.x0(self.roles.student, anchor.x_BCHW, anchor.sigma_B, part.cond)
        )
        with torch.no_grad():
            x0_old_RCHW = self.x0(self.old, anchor.x_BCHW, anchor.sigma_B, part.cond)
        apart_R = (x0_RCHW - x0_old_RCHW).square().flatten(1).mean(1)
        value = (apart_R * general_R).mean() * (self.config.batch / self.kept)
        return self.config.keep_weight * value, {"keep": value.detach()}


def _numbers(number: Mapping[str, int], texts: Sequence[str]) -> NDArray[np.int64]:
    return np.array([number[text] for text in texts], dtype=np.int64)
