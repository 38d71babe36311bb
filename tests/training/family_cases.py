"""One model of each layout to train, and inputs of it: `CASES`, `load`, `inputs`, `velocity`."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from engines.families.base import Conditioning, Family, load_family
from training.lora import Adapters, Size, add_adapters

CASES = ("sd3-medium", "sd35-medium", "longcat")
"""Of `tests.folders.FOLDERS`: with T5; two attentions, normed, no T5; double and single blocks."""

SIZES = {"student": Size(4, 10.0), "fake": Size(2, 2.0)}


def load(folder: Path, dtype: torch.dtype = torch.float32) -> Family:
    """Its transformer alone."""
    return load_family(folder, dtype, only=("transformer",))


def inputs(family: Family) -> tuple[Tensor, Tensor, Conditioning]:
    """x of two samples, not square, σ, and embeddings of as many tokens as it pleases."""
    random = torch.Generator().manual_seed(5)
    config = family.transformer.config
    cond = {"encoder_hidden_states": torch.randn((2, 5, config.joint_attention_dim), generator=random)}
    if family.name == "sd3":
        cond["pooled_projections"] = torch.randn((2, config.pooled_projection_dim), generator=random)
    x = torch.randn((2, family.latent_channels, 4, 6), generator=random)
    return x, torch.tensor([0.9, 0.3]), cond


def velocity(family: Family, transformer: nn.Module) -> Tensor:
    """v at `inputs`, float32, with gradient."""
    return family.velocity(transformer, *inputs(family))


def adapted(family: Family, dtype: torch.dtype = torch.float32, targets: str = "attention+ff") -> Adapters:
    """`SIZES` on its transformer, B random: both adapters change a lot, each in its own way."""
    adapters = add_adapters(family.transformer, SIZES, family.lora_targets[targets], dtype, seed=0)
    random = torch.Generator().manual_seed(6)
    for adapter in SIZES:
        for name, factor in adapters.parameters(adapter).items():
            if ".lora_B." in name:
                factor.data = (0.5 * torch.randn(factor.shape, generator=random)).to(dtype)
    return adapters
