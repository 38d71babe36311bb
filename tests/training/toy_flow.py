"""A flow whose score is known: one Gaussian per prompt in the plane (no prompt: both), as latents `(B, 2, 1, 1)`.

`ToyNet` is the exact velocity plus a small MLP whose last layer starts at zero: the teacher is analytic, and student
and fake teacher start as it, as in any distillation.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from engines.families.base import Conditioning, Family, TextEncoder

MEANS = {"left": (-1.0, 0.5), "right": (1.0, -0.5)}
PROMPTS = tuple(MEANS)
SPREAD = 0.6


class ToyNet(nn.Module):
    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Linear(2 + 1 + len(MEANS), width),
            nn.SiLU(),
            nn.Linear(width, width),
            nn.SiLU(),
            nn.Linear(width, 2),
        )
        nn.init.zeros_(self.mlp[-1].weight)
        nn.init.zeros_(self.mlp[-1].bias)
        self.register_buffer("means_K2", torch.tensor(list(MEANS.values())))

    def forward(self, x_B2: Tensor, sigma_B: Tensor, weight_BK: Tensor) -> Tensor:
        """v = (x − E[x0 | x_σ]) / σ for the mixture with weights `weight_BK`, plus what was learnt."""
        sigma_B1 = sigma_B[:, None]
        variance_B1 = (1 - sigma_B1) ** 2 * SPREAD**2 + sigma_B1**2
        away_BK2 = x_B2[:, None] - (1 - sigma_B1)[..., None] * self.means_K2
        logits_BK = weight_BK.log() - away_BK2.square().sum(-1) / (2 * variance_B1)
        gain_B1 = (1 - sigma_B1) * SPREAD**2 / variance_B1
        x0_BK2 = self.means_K2 + gain_B1[..., None] * away_BK2
        x0_B2 = (logits_BK.softmax(-1)[..., None] * x0_BK2).sum(1)
        features = torch.cat([x_B2, sigma_B1, weight_BK], dim=1)
        return (x_B2 - x0_B2) / sigma_B1 + self.mlp(features)


class ToyFamily(Family):
    """The smallest family: what the loop uses of one, and nothing more."""

    name = "toy"
    latent_channels = 2
    latent_size = (1, 1)

    def __init__(self, seed: int = 0) -> None:
        torch.manual_seed(seed)
        self.transformer = ToyNet().requires_grad_(False)

    @classmethod
    def load(cls, folder: Path, dtype: torch.dtype, only: Collection[str] | None = None) -> ToyFamily:
        raise NotImplementedError

    def encode(self, prompts: Sequence[str]) -> Conditioning:
        rows = [[float(prompt in ("", side)) for side in MEANS] for prompt in prompts]
        weight = torch.tensor(rows)
        return {"weight": weight / weight.sum(1, keepdim=True)}

    def tokenize(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        raise NotImplementedError

    def text_encoders(self) -> list[TextEncoder]:
        return []

    def join(self, outputs: dict[str, Tensor]) -> Conditioning:
        raise NotImplementedError

    def low_precision(self) -> tuple[str, ...]:
        return ()

    def velocity(
        self, transformer: nn.Module, x: Tensor, sigma: Tensor, conditioning: Conditioning
    ) -> Tensor:
        return transformer(x.flatten(1), sigma, conditioning["weight"])[:, :, None, None]

    def sigmas(self, steps: int) -> tuple[float, ...]:
        return (*(1 - step / steps for step in range(steps)), 0.0)

    def decode(self, latents: Tensor) -> Tensor:
        raise NotImplementedError

    def text_modules(self) -> dict[str, nn.Module]:
        return {}

    def tokenizer_specs(self) -> list[dict[str, object]]:
        raise NotImplementedError

    def save(self, folder: Path, transformer: nn.Module | None = None) -> None:
        raise NotImplementedError


def true_samples(prompt: str, count: int, seed: int) -> Tensor:
    """Draws of the target distribution, `(count, 2)`."""
    generator = torch.Generator().manual_seed(seed)
    return torch.tensor(MEANS[prompt]) + SPREAD * torch.randn(count, 2, generator=generator)


def sliced_wasserstein(a_N2: Tensor, b_N2: Tensor, directions: int = 64) -> float:
    """Mean W1 over lines through the origin; both sets of one size."""
    angle = torch.arange(directions) * torch.pi / directions
    line_2D = torch.stack([angle.cos(), angle.sin()])
    return float(((a_N2 @ line_2D).sort(0).values - (b_N2 @ line_2D).sort(0).values).abs().mean())
