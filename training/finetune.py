"""Fine-tuning of any diffusers folder of a known family by flow matching on captioned pictures.

    x_σ = (1−σ)·x0 + σ·ε,   loss = mean |v(x_σ, σ, text) − (ε − x0)|²      (SD3, eq. 14)

σ is logit-normal and passed through the family's own shift, so that training and sampling agree. The network, LoRA,
average, checkpoints and loop are those of a distillation: a method with no fake teacher. For teachers: few-step
pictures of a distilled student fine-tuned so regress to the mean of the data (`training/keep.py` is for those).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from engines.families.base import Conditioning, Family
from training.config import FinetuneConfig
from training.draws import Draws
from training.embeddings import EmbeddingTable
from training.losses import renoise
from training.means import Means, Values
from training.pictures import Pictures
from training.prompts import Prompts
from training.roles import Roles
from training.rollout import family_shift, shifted
from training.run import numpy_generator

PICTURES, LEARN = 10, 11
"""Streams of randomness, apart from those of `training.distill`."""


class Finetune:
    """What `training.distill.distill` runs: one update on a batch of pictures an iteration."""

    def __init__(
        self, family: Family, config: FinetuneConfig, roles: Roles, pictures: Pictures, latents_NCHW: Tensor,
        prompts: Prompts, table: EmbeddingTable, micro_batch: int = 0,
    ) -> None:  # fmt: skip
        """`prompts` and `table` are those of the pictures' captions."""
        self.family, self.config, self.roles, self.table = family, config, roles, table
        self.parallel, self.device = roles.parallel, roles.parallel.device
        self.micro_batch = micro_batch
        self.latents_NCHW = latents_NCHW
        self.shift = family_shift(family)
        self.cumulative_N = np.cumsum(pictures.weights_N) / pictures.weights_N.sum()
        number = {text: index for index, text in enumerate(prompts.texts)}
        self.prompt_N = np.array([number[text] for text in pictures.captions_N], dtype=np.int64)

    def iterate(self, step: int) -> Values:
        """One update; loss and gradient norm."""
        drawn = numpy_generator(self.config.seed, step, PICTURES).random(self.config.batch)
        pictures_B = np.searchsorted(self.cumulative_N, drawn, side="right").clip(max=len(self.prompt_N) - 1)
        means, student = Means(), self.roles.student
        with student.training():
            for rows in self.parallel.parts(self.config.batch, self.micro_batch):
                loss = self.loss(step, rows, pictures_B[list(rows)])
                share = len(rows) / self.parallel.share(self.config.batch)
                (loss * share).backward()  # type: ignore[no-untyped-call]
                means.add({"flow_loss": loss.detach()}, len(rows))
        norm = student.update(step)
        self.roles.ema.update(student.masters)
        return self.parallel.mean(means.values() | {"student_norm": norm})

    def loss(self, step: int, rows: Sequence[int], pictures_R: np.ndarray) -> Tensor:
        """Flow matching of a micro-batch, with gradient: samples `rows` of the batch show pictures `pictures_R`."""
        draws = Draws(self.config.seed, step, LEARN, rows, self.device)
        x0_RCHW = self.latents_NCHW[torch.from_numpy(pictures_R)].to(self.device).float()
        sigma_R = shifted(torch.sigmoid(draws.normal(())), self.shift)
        dropped_R = draws.uniform() < self.config.caption_dropout
        eps_RCHW = draws.normal(x0_RCHW.shape[1:])
        x_RCHW = renoise(x0_RCHW, eps_RCHW, sigma_R)
        with self.roles.student.active():
            v_RCHW = self.family.velocity(
                self.roles.student.net,
                x_RCHW,
                sigma_R,
                self.conditioning(self.prompt_N[pictures_R], dropped_R),
            )
        return (v_RCHW.float() - (eps_RCHW - x0_RCHW)).square().mean()

    def conditioning(self, prompts_R: np.ndarray, dropped_R: Tensor) -> Conditioning:
        """Embeddings of captions; of the empty prompt where the caption is dropped."""
        cond, empty = (
            self.table.rows(prompts_R, self.device),
            self.table.unconditional(len(prompts_R), self.device),
        )
        return {
            name: torch.where(dropped_R.reshape(-1, *[1] * (value.ndim - 1)), empty[name], value)
            for name, value in cond.items()
        }
