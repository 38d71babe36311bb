"""What a model family is to training and export: the only place that knows a model's forward, text and scales.

Conventions (rectified flow): x_σ = (1−σ)·x0 + σ·ε, v = ε − x0, x̂0 = x_σ − σ·v. Shapes: B batch, C latent channels,
H and W latent pixels, L text tokens. Latents are *scaled* ones (after scaling and shift factors).

    family = load_family(Path("runs/teacher"))             # a diffusers folder; the class is read from model_index.json
    cond = family.encode(["red apple", ""])     # {"encoder_hidden_states": (2, L, D), "pooled_projections": (2, P)}
    v_BCHW = family.velocity(family.transformer, x_BCHW, sigma_B, cond)
    family.sigmas(4)                                       # (1.0, …, 0.0), after the scheduler's shift
"""

from __future__ import annotations

import importlib
import json
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

Conditioning = dict[str, Tensor]
"""Prompt embeddings by name, every tensor with the batch first. The names are those of the exported graphs."""


class FamilyError(Exception):
    """A folder is not a model of a family that is known here, or lacks a component."""


class Family(ABC):
    """One loaded model of a family: its modules, and how to call them.

    `transformer` may be swapped for another of the same class (a student, a fake teacher): `velocity` takes it
    as an argument for that reason.
    """

    name: ClassVar[str]
    pipeline_class: ClassVar[str]
    """The diffusers pipeline that `model_index.json` names."""
    fsdp_units: ClassVar[tuple[str, ...]]
    """Class names of the transformer's blocks."""

    transformer: nn.Module
    vae: nn.Module
    root: Path

    # latents
    latent_channels: int
    latent_size: tuple[int, int]
    """Default (height, width) in latent pixels."""
    downscale: int
    scaling_factor: float
    shift_factor: float

    @classmethod
    @abstractmethod
    def load(cls, folder: Path, dtype: torch.dtype) -> Family:
        """Load every component from a local diffusers folder (safetensors only)."""

    @abstractmethod
    def encode(self, prompts: Sequence[str]) -> Conditioning:
        """Embeddings of prompts, without gradient, as the diffusers pipeline computes them."""

    @abstractmethod
    def tokenize(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        """Input ids by text-encoder input name, each `(B, L)` int64."""

    @abstractmethod
    def embed(self, ids: dict[str, Tensor]) -> Conditioning:
        """Embeddings of ids: what `encode` does after `tokenize`, differentiable and exportable."""

    @abstractmethod
    def velocity(
        self, transformer: nn.Module, x: Tensor, sigma: Tensor, conditioning: Conditioning
    ) -> Tensor:
        """v at x, both `(B, C, H, W)`, sigma `(B,)` float32 in [0, 1], post-shift; the time path is float32."""

    @abstractmethod
    def sigmas(self, steps: int) -> tuple[float, ...]:
        """The `steps + 1` sigmas of few-step inference, after the scheduler's shift, ending in 0."""

    @abstractmethod
    def decode(self, latents: Tensor) -> Tensor:
        """Pictures in [−1, 1], `(B, 3, height, width)`, from scaled latents."""

    @abstractmethod
    def text_modules(self) -> dict[str, nn.Module]:
        """Text encoders by diffusers component name."""

    @abstractmethod
    def tokenizer_specs(self) -> list[dict[str, Any]]:
        """For the bundle: per text-encoder input `{"input", "length", "pad_id", "json": tokenizers-JSON text}`."""

    @abstractmethod
    def save(self, folder: Path, transformer: nn.Module | None = None) -> None:
        """Write a diffusers folder like the one loaded, with `transformer` in place of the loaded one."""


FAMILIES: dict[str, str] = {
    "StableDiffusion3Pipeline": "engines.families.sd3:SD3Family",
}
"""Pipeline class → `module:class`. A new family is one file and one line here."""


def load_family(folder: Path, dtype: torch.dtype = torch.float32) -> Family:
    """Load a diffusers folder by the pipeline class that its `model_index.json` names.

    Raises:
        FamilyError: no such folder or index, a pipeline of no known family, or a missing component.
    """
    index = folder / "model_index.json"
    try:
        class_name = json.loads(index.read_text(encoding="utf-8"))["_class_name"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise FamilyError(
            f"{folder} is not a diffusers folder: model_index.json is missing or unreadable"
        ) from error
    if class_name not in FAMILIES:
        raise FamilyError(f"{index} names {class_name!r}; families known here: {', '.join(FAMILIES)}")
    module_name, family_name = FAMILIES[class_name].split(":")
    family: type[Family] = getattr(importlib.import_module(module_name), family_name)
    return family.load(folder, dtype)
