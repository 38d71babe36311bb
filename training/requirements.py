"""What must hold before the first step, each a question with a clear answer: a mistake found after hours is too late.

    require_prompts(prompts.texts, config.batch)
    require_model(family)
    require_embeddings(family, table)
    require_adapter(family.transformer, Path("lora.safetensors"), base_sha256)
    require_disk(out, [Need("3 checkpoints", 9_000_000_000), …])

All raise `TrainingError`, which says what was wrong, what is needed and what to do.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from engines.families.base import INDEX, Conditioning, Family
from training.embeddings import EmbeddingTable
from training.errors import TrainingError

BASE_SHA256 = "base_sha256"
"""Key of an adapter file's metadata: SHA-256 of the transformer it was trained on, as `TeacherHashes.transformer`."""

_A, _B = (".lora_A", ".lora.down", ".lora_down"), (".lora_B", ".lora.up", ".lora_up")


def require_prompts(texts: Sequence[str], batch: int) -> None:
    """A batch's worth of distinct prompts, at least."""
    distinct = len(set(texts))
    if not distinct:
        raise TrainingError("there are no prompts; give a list with at least as many as --batch")
    if distinct < batch:
        raise TrainingError(
            f"{distinct} distinct prompts are fewer than --batch={batch}: every step would see the same ones several "
            f"times; give more prompts, or --batch={distinct} or less"
        )


def require_components(folder: Path) -> None:
    """Every component that the folder's index names is there, with its configuration and weights; nothing is loaded."""
    try:
        entries = json.loads((folder / INDEX).read_text(encoding="utf-8")).items()
    except (OSError, ValueError, AttributeError) as error:
        raise TrainingError(
            f"{folder / INDEX} cannot be read ({error}); --teacher takes a local diffusers folder"
        ) from error
    named = [name for name, entry in entries if isinstance(entry, list) and entry[0] is not None]
    for name in named:
        part = folder / name
        if not part.is_dir():
            raise TrainingError(
                f"{folder} lacks its component {name}, which {INDEX} names; save or download it again"
            )
        weighted = name in ("transformer", "vae") or name.startswith("text_encoder")
        if weighted and not any(part.glob("*.safetensors")):
            raise TrainingError(
                f"{part} has no weights (*.safetensors), only {_listed(file.name for file in part.iterdir())}; save or "
                "download it again, with safetensors"
            )


def require_model(family: Family) -> None:
    """Transformer and autoencoder speak of the same latents, and the latents fall into whole patches."""
    made = int(getattr(family.vae.config, "latent_channels", 0))
    if made != family.latent_channels:
        raise TrainingError(
            f"the autoencoder's latents have {made} channels, the transformer takes {family.latent_channels}; use the "
            "autoencoder that the transformer was trained with"
        )
    patch = family.patch_size
    if any(side % patch for side in family.latent_size):
        height, width = family.latent_size
        raise TrainingError(
            f"latents of {height}×{width} do not fall into the transformer's patches of {patch}×{patch}; give a "
            f"--resolution that is a multiple of {patch * family.downscale}"
        )


def require_embeddings(family: Family, table: EmbeddingTable) -> None:
    """The transformer takes the table's rows: one forward of one prompt would say the same, minutes later."""
    config, row = family.transformer.config, table.empty
    wanted = {
        "encoder_hidden_states": getattr(config, "joint_attention_dim", None),
        "pooled_projections": getattr(config, "pooled_projection_dim", None),
    }
    for name, width in wanted.items():
        if name in row and width is not None and row[name].shape[-1] != width:
            raise TrainingError(
                f"embeddings {name} are {_shape(row[name])} per prompt, the transformer takes a width of {width}; "
                "these are another model's: delete the embedding folder, or use the teacher's own text encoders"
            )
    _require_finite(row)


def require_adapter(transformer: nn.Module, file: Path, base_sha256: str | None = None) -> None:
    """A LoRA file (diffusers' or PEFT's names) fits `transformer`: every target is there, and factors have its shape.

    `base_sha256`: of this transformer. Where the file's metadata tell of another base, it is refused as well.
    """
    try:
        with safe_open(file, "pt") as opened:
            told = (opened.metadata() or {}).get(BASE_SHA256)
            shapes = {name: tuple(opened.get_slice(name).get_shape()) for name in opened.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise TrainingError(f"{file} is no readable LoRA (.safetensors): {error}") from error
    if told and base_sha256 and told != base_sha256:
        raise TrainingError(
            f"{file} is a LoRA for another base (transformer sha256 {told[:12]}), this one is {base_sha256[:12]}; use "
            "the base it was trained on"
        )
    layers = {
        name: tuple(weight.shape)
        for name, layer in transformer.named_modules()
        if isinstance(weight := getattr(layer, "weight", None), Tensor) and weight.ndim >= 2
    }
    factors: dict[str, dict[str, tuple[int, ...]]] = {}
    for name, shape in shapes.items():
        for side, marks in (("A", _A), ("B", _B)):
            for mark in marks:
                if mark in name and len(shape) >= 2:  # a factor may have a bias
                    factors.setdefault(_plain(name.split(mark)[0]), {})[side] = shape
    if not factors:
        raise TrainingError(f"{file} holds no LoRA factors, but {_listed(shapes)}; give an adapter file")
    if strange := sorted(factors.keys() - layers.keys()):
        raise TrainingError(
            f"{file} is a LoRA for another base: {len(strange)} of its {len(factors)} targets are no layers of this "
            f"{type(transformer).__name__}, {strange[0]} for one; use the base it was trained on"
        )
    for target, pair in factors.items():
        if pair.keys() != {"A", "B"}:
            raise TrainingError(f"{file} has one factor of two for {target}; it is damaged, export it again")
        out, into = layers[target][:2]
        (rank_a, width), (height, rank_b) = pair["A"][:2], pair["B"][:2]
        if (height, width) != (out, into) or rank_a != rank_b:
            raise TrainingError(
                f"{file} is a LoRA for another base: {target} is {out}×{into} here, its factors are {height}×{rank_b} "
                f"and {rank_a}×{width}; use the base it was trained on"
            )


class Need(NamedTuple):
    """Something that will be written."""

    what: str
    size: int
    """In bytes."""


def checkpoint_bytes(parameters: int, trained: int, roles: int, adam_bytes: int = 8) -> int:
    """Size of one checkpoint: average of the student, masters and moments of each of `roles`.

    `parameters` of the student's average, `trained` of one role, `adam_bytes` of its two moments per parameter.
    """
    return 4 * parameters + roles * trained * (4 + adam_bytes)


def require_disk(folder: Path, needs: Collection[Need]) -> None:
    """The file system of `folder` (it may not exist yet) has room for all `needs`."""
    existing = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    free, wanted = shutil.disk_usage(existing).free, sum(need.size for need in needs)
    if wanted > free:
        parts = ", ".join(f"{need.what} {need.size / 1e9:.1f} GB" for need in needs)
        raise TrainingError(
            f"{folder} needs {wanted / 1e9:.1f} GB ({parts}) and its disk has {free / 1e9:.1f} GB free; make room, "
            "keep fewer checkpoints, or put --out on another disk"
        )


def _require_finite(row: Conditioning) -> None:
    for name, value in row.items():
        if not bool(torch.isfinite(value).all()):
            raise TrainingError(
                f"embeddings {name} of the empty prompt are not finite; delete the embedding folder and run again"
            )


def _plain(target: str) -> str:
    for prefix in ("base_model.model.", "transformer."):
        target = target.removeprefix(prefix)
    return target


def _shape(value: Tensor) -> str:
    return "×".join(map(str, value.shape[1:]))


def _listed(names: Iterable[str]) -> str:
    found = sorted(names)
    return ", ".join(found[:3]) + (" …" if len(found) > 3 else "") if found else "nothing"
