"""`cdm-bench sensitivity`: what each layer of the denoiser costs in error when it alone computes in bfloat16.

The report behind `Family.low_precision`: layers of the same place in every block are lowered together, all else stays
float32, and the velocity is compared with float32's over σ from 1 to 0. Then the family's policy, and everything.

    cdm-bench sensitivity --student runs/emoji-cdm/student
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from pydantic import Field
from torch import Tensor, nn

from benchmarks.report import show
from engines.cli import CommandSettings, UsageError
from engines.export.parity import random_prompts
from engines.export.precision import LOW, lower_
from engines.families.base import Conditioning, Family, FamilyError, load_family

SIGMAS = (1.0, 0.9, 0.7, 0.5, 0.3, 0.1)


class SensitivitySettings(CommandSettings, env_prefix="CDM_BENCH_SENSITIVITY_"):
    """Lower the denoiser's layers to bfloat16 one kind at a time, and measure the error of the velocity."""

    student: Path = Field(description="diffusers folder")
    prompts: list[str] = Field([], description="prompts to measure with; empty: made-up ones")
    batch: int = Field(4, ge=1, le=64, description="pictures per σ")
    seed: int = Field(0, ge=0, description="seed of noise and made-up prompts")
    threads: int = Field(0, ge=0, description="torch's threads; 0 lets it choose")


def run(settings: SensitivitySettings) -> int:
    """Measure, print the table and the JSON line."""
    if settings.threads:
        torch.set_num_threads(settings.threads)
    try:
        family = load_family(settings.student)
    except FamilyError as error:
        raise UsageError(f"--student: {error}") from error
    made_up = random_prompts(settings.batch, settings.seed)
    prompts = [
        (settings.prompts or made_up)[row % len(settings.prompts or made_up)] for row in range(settings.batch)
    ]
    conditioning = family.encode(prompts)
    shape = (settings.batch, family.latent_channels, *family.latent_size)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(settings.seed))
    reference = velocities(family, family.transformer, x, conditioning)
    total = parameters(family.transformer.parameters())
    rows = []
    for pattern in places(family.transformer):
        lowered = _AroundFloat32(copy.deepcopy(family.transformer))
        names = lower_(lowered.inner, (pattern,))
        count = sum(parameters(family.transformer.get_submodule(name).parameters()) for name in names)
        rows.append(
            _row(
                pattern,
                len(names),
                count / total,
                relative_error(family, lowered, x, conditioning, reference),
            )
        )
        del lowered
    rows.sort(key=lambda row: -float(row["rel L2"]))
    policy = _AroundFloat32(copy.deepcopy(family.transformer))
    names = lower_(policy.inner, family.low_precision())
    kept = sum(parameters(family.transformer.get_submodule(name).parameters()) for name in names) / total
    rows.append(
        _row(
            "the family's policy",
            len(names),
            kept,
            relative_error(family, policy, x, conditioning, reference),
        )
    )
    del policy
    whole = copy.deepcopy(family.transformer).to(LOW)
    rows.append(
        _row(
            "everything, residual stream too",
            1,
            1.0,
            relative_error(family, whole, x, conditioning, reference),
        )
    )
    show(
        "sensitivity", rows, student=family.root.name, family=family.name, sigmas=SIGMAS, batch=settings.batch
    )
    return 0


class _AroundFloat32(nn.Module):
    """A transformer whose first parameter, by which families know its dtype, is float32 whatever has been lowered."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.first = nn.Parameter(torch.zeros(0))
        self.inner = inner

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.inner(*args, **kwargs)


def places(transformer: nn.Module) -> list[str]:
    """Every place of a layer with weights, once for all blocks: `transformer_blocks.*.attn.to_q`."""
    layers = [
        name
        for name, module in transformer.named_modules()
        if next(module.parameters(recurse=False), None) is not None
    ]
    return list(dict.fromkeys(re.sub(r"_blocks\.\d+\.", "_blocks.*.", name) for name in layers if name))


def parameters(tensors: Iterable[Tensor]) -> int:
    """How many numbers."""
    return sum(tensor.numel() for tensor in tensors)


@torch.no_grad()
def velocities(family: Family, transformer: nn.Module, x: Tensor, conditioning: Conditioning) -> Tensor:
    """v at every σ of `SIGMAS`, in float64."""
    found = [family.velocity(transformer, x, torch.full((len(x),), sigma), conditioning) for sigma in SIGMAS]
    return torch.stack(found).double()


def relative_error(
    family: Family, transformer: nn.Module, x: Tensor, conditioning: Conditioning, reference: Tensor
) -> float:
    """Relative L2 error of all velocities together."""
    found = velocities(family, transformer, x, conditioning)
    return float((found - reference).norm() / reference.norm())


def _row(place: str, layers: int, share: float, rel_l2: float) -> dict[str, str | int | float]:
    return {
        "in bfloat16": place,
        "layers": layers,
        "% of weights": round(100 * share, 1),
        "rel L2": float(f"{rel_l2:.3g}"),
    }
