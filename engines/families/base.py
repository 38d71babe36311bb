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
import re
from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

Conditioning = dict[str, Tensor]
"""Prompt embeddings by name, every tensor with the batch first. The names are those of the exported graphs."""


class TextEncoder(NamedTuple):
    """One text encoder as a graph: `module(ids)` takes what `tokenize` calls `input`, and gives `outputs` in order.

    `component` is diffusers' name of it, and the bundle's.
    """

    component: str
    input: str
    outputs: tuple[str, ...]
    module: nn.Module


class FamilyError(Exception):
    """A folder is not a model of a family that is known here, or lacks a component."""


class Family(ABC):
    """One loaded model of a family: its modules, and how to call them.

    A family may be loaded in part (`only`): the modules left out are absent, and asking for them is a mistake.

    `transformer` may be swapped for another of the same class (a student, a fake teacher): `velocity` takes it
    as an argument for that reason.
    """

    name: ClassVar[str]
    pipeline_class: ClassVar[str]
    """The diffusers pipeline that `model_index.json` names."""
    fsdp_units: ClassVar[tuple[str, ...]]
    """Class names of the transformer's blocks."""
    lora_targets: ClassVar[Mapping[str, str]]
    """Of "attention" and "attention+ff": a regular expression of the full names of the transformer's linear layers."""

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
    patch_size: int
    """Latent pixels that one token of the transformer covers, along each side."""
    pooled: tuple[str, ...] = ()
    """Which of the text encoders' outputs are `(B, D)`; all others have a row per token."""

    @classmethod
    @abstractmethod
    def load(cls, folder: Path, dtype: torch.dtype, only: Collection[str] | None = None) -> Family:
        """Load from a local diffusers folder, or a hub id (safetensors only); of the modules those in `only`, or all.

        Tokenizers, scheduler and every module's configuration are always there.
        """

    @abstractmethod
    def encode(self, prompts: Sequence[str]) -> Conditioning:
        """Embeddings of prompts, without gradient, as the diffusers pipeline computes them."""

    @abstractmethod
    def tokenize(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        """Input ids by text-encoder input name, each `(B, L)` int64."""

    @abstractmethod
    def text_encoders(self) -> list[TextEncoder]:
        """The text encoders that are loaded, in the order of their names."""

    @abstractmethod
    def join(self, outputs: dict[str, Tensor]) -> Conditioning:
        """What the transformer takes, from what all text encoders gave. It is part of the denoiser's graph."""

    def embed(self, ids: dict[str, Tensor]) -> Conditioning:
        """Embeddings of ids: what `encode` does after `tokenize`, differentiable."""
        outputs: dict[str, Tensor] = {}
        for encoder in self.text_encoders():
            outputs |= zip(encoder.outputs, encoder.module(ids[encoder.input]), strict=True)
        return self.join(outputs)

    @abstractmethod
    def velocity(
        self, transformer: nn.Module, x: Tensor, sigma: Tensor, conditioning: Conditioning
    ) -> Tensor:
        """v at x, both `(B, C, H, W)`, sigma `(B,)` float32 in [0, 1], post-shift; the time path is float32."""

    def guided(self, v_cond: Tensor, v_uncond: Tensor, scale: float) -> Tensor:
        """Classifier-free guidance as the diffusers pipeline does it by default: v_∅ + g·(v_c − v_∅).

        All `(B, C, H, W)`; v_∅ is the empty prompt's.
        """
        return v_uncond + scale * (v_cond - v_uncond)

    @abstractmethod
    def sigmas(self, steps: int, size: tuple[int, int] | None = None) -> tuple[float, ...]:
        """The `steps + 1` sigmas of few-step inference, after the scheduler's shift, ending in 0.

        A shift may depend on the picture's size: (height, width) in latent pixels; None: `latent_size`.
        """

    @abstractmethod
    def decode(self, latents: Tensor) -> Tensor:
        """Pictures in [−1, 1], `(B, 3, height, width)`, from scaled latents."""

    @abstractmethod
    def text_modules(self) -> dict[str, nn.Module]:
        """Text encoders by diffusers component name."""

    def drop_text_encoders(self) -> None:
        """Free the text encoders' memory. The family can encode no more."""
        for module in self.text_modules().values():
            module.to("meta")

    @abstractmethod
    def tokenizer_specs(self) -> list[dict[str, Any]]:
        """For the bundle, one per tokenizer: the fields of `engines.bundle.Tokenizer`, "json" (text) for its file."""

    rewrites: ClassVar[tuple[str, ...]] = ()
    """Names of what `fuse` does, in order."""

    def fuse(self, skip: Collection[str] = ()) -> None:  # noqa: B027  (a family without rewrites has nothing to do)
        """Rewrite the modules into fewer, larger operations that compute the same, before a graph is made of them.

        `skip` names rewrites to leave out. The model must not be trained or saved after it.
        """

    @abstractmethod
    def low_precision(self) -> tuple[str, ...]:
        """Patterns (`fnmatch`) of the transformer's submodules that run in bfloat16 in a bfloat16 graph, each whole.

        All else, the residual stream between them above all, stays float32.
        """

    @abstractmethod
    def save(self, folder: Path, transformer: nn.Module | None = None) -> None:
        """Write a diffusers folder like the one loaded, with `transformer` in place of the loaded one."""


FAMILIES: dict[str, str] = {
    "StableDiffusion3Pipeline": "engines.families.sd3:SD3Family",
    "LongCatImagePipeline": "engines.families.longcat:LongCatFamily",
}
"""Pipeline class → `module:class`. A new family is one file and one line here."""


INDEX = "model_index.json"
HUB_ID = re.compile(r"[\w][\w.-]*/[\w][\w.-]*", re.ASCII)


def load_family(
    folder: Path, dtype: torch.dtype = torch.float32, only: Collection[str] | None = None
) -> Family:
    """Load a diffusers folder by the pipeline class that its `model_index.json` names; `only` as `Family.load` has it.

    Where there is no such folder, `folder` may be a model's id on the Hugging Face hub, such as
    `stabilityai/stable-diffusion-3-medium-diffusers`; a local folder never asks the network.

    Raises:
        FamilyError: no such folder or index, a hub that cannot be reached, a pipeline of no known family, or a missing
            component.
    """
    index = _find_index(folder)
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
    return family.load(folder, dtype, only)


def _find_index(folder: Path) -> Path:
    hub_id = folder.as_posix()
    if folder.exists() or not HUB_ID.fullmatch(hub_id):
        return folder / INDEX
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(hub_id, INDEX))
    except Exception as error:  # the hub's, its HTTP client's and the cache's errors share no base
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
        raise FamilyError(
            f"there is no folder {hub_id}, and the hub's model {hub_id!r} cannot be had ({reason}); name a local "
            "diffusers folder, or download the model once with a connection (and `hf auth login` where it asks for one)"
        ) from error
