"""The student's LoRA as a file that diffusers, `cdm-export --lora` and another run of the same base take.

    save_adapter(out / "adapter", factors, AdapterRecord(base_sha256, "sd3_cdm", 4001, 64, 128.0, targets))
    StableDiffusion3Pipeline.from_pretrained(BASE).load_lora_weights("OUT/adapter")
    LongCatImagePipeline.from_pretrained(BASE).transformer.load_lora_adapter("OUT/adapter", use_safetensors=True)

One format for every family: `pytorch_lora_weights.safetensors`, names beginning with `transformer.`, and metadata with
diffusers' settings and our record. alpha/rank is multiplied into B, and the file's alpha is its rank: so the adapter is
the same to whoever reads no metadata.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Self

import torch
from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY, LORA_WEIGHT_NAME_SAFE
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from engines.errors import ExportError
from engines.export.adapter import Adapter, find_adapter, read_adapter
from training.errors import Diverged, TrainingError
from training.lora import Adapters, Size

PREFIX = "transformer."
RECORD = "cdm"
"""Key of `AdapterRecord` in the file's metadata."""


@dataclass(frozen=True)
class AdapterRecord:
    """What an adapter is of, and how it came to be."""

    base_sha256: str
    """`TeacherHashes.transformer` of the folder that it was trained on."""
    recipe: str
    steps_trained: int
    rank: int
    alpha: float
    """As trained; the file's own is its rank."""
    targets: str
    """A regular expression of the layers' names."""

    @classmethod
    def of(cls, path: Path) -> Self | None:
        """Of a file or folder; None where it is somebody else's.

        Raises:
            TrainingError: there is none, or it cannot be read.
        """
        try:
            file = find_adapter(path)
            with safe_open(file, framework="pt") as opened:
                text = (opened.metadata() or {}).get(RECORD)
        except ExportError as error:
            raise TrainingError(str(error)) from error
        except (OSError, SafetensorError) as error:
            raise TrainingError(
                f"{file} cannot be read as safetensors ({error}); save or download it again"
            ) from error
        try:
            return None if text is None else cls(**json.loads(text))
        except (ValueError, TypeError) as error:
            raise TrainingError(
                f"{file} has a record of its training that is not understood ({error}); use the version it was written "
                "with"
            ) from error


def save_adapter(folder: Path, factors: Mapping[str, Tensor], record: AdapterRecord) -> Path:
    """Write `factors`, named as `Adapters.parameters` does, in float32; an older file stays until this one is whole.

    Raises:
        Diverged: a factor holds NaN or infinity; nothing is written.
    """
    size = Size(record.rank, record.alpha)
    tensors = {}
    for name, factor in factors.items():
        if not bool(torch.isfinite(factor).all()):
            raise Diverged(f"{name} is not finite; no adapter is written; export an earlier checkpoint")
        scale = size.scale if ".lora_B." in name else 1.0
        tensors[PREFIX + name] = (factor.detach().cpu().float() * scale).contiguous()
    settings = {"r": size.rank, "lora_alpha": size.rank, "target_modules": record.targets}
    metadata = {
        "format": "pt",
        LORA_ADAPTER_METADATA_KEY: json.dumps({PREFIX + key: value for key, value in settings.items()}),
        RECORD: json.dumps(asdict(record)),
    }
    file = folder.joinpath(LORA_WEIGHT_NAME_SAFE)
    partial = file.with_name(f".{file.name}.partial")
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, partial, metadata)
    os.replace(partial, file)
    return file


@torch.no_grad()
def load_adapter(path: Path, adapters: Adapters, adapter: str, base_sha256: str) -> None:
    """Put a file's factors into `adapter`, which computes from then on what the file's does.

    Raises:
        TrainingError: there is none, it cannot be read, or it is of another base, other layers or another rank.
    """
    require_base(path, base_sha256)
    try:
        read = read_adapter(path)
    except ExportError as error:
        raise TrainingError(str(error)) from error
    if set(read.tensors) != {PREFIX.rstrip(".")}:
        named = ", ".join(read.tensors)
        raise TrainingError(
            f"{read.path} is an adapter of {named}; training goes on with one of a transformer alone"
        )
    found, wanted = read.tensors["transformer"], adapters.parameters(adapter)
    size = adapters.sizes[adapter]
    if found.keys() != wanted.keys():
        odd = sorted(found.keys() ^ wanted.keys())
        raise TrainingError(
            f"{read.path} adapts {len(found) // 2} layers and this run {len(wanted) // 2}; {odd[0]} is in one of them "
            "only; use the base and the --lora-targets that it was trained with"
        )
    for name, factor in wanted.items():
        if found[name].shape != factor.shape:
            raise TrainingError(
                f"{read.path}: {name} is {list(found[name].shape)}, this run's {list(factor.shape)}; use the base that "
                f"it was trained on and its rank (--{adapter}-rank is {size.rank})"
            )
    ratio = _scale(read, size.rank) / size.scale
    for name, factor in wanted.items():
        factor.copy_(found[name].float() * (ratio if ".lora_B." in name else 1.0))


def require_base(path: Path, base_sha256: str) -> None:
    """Refuse an adapter whose record names another base than that of `TeacherHashes.transformer`.

    Raises:
        TrainingError: it does, there is none, or it cannot be read.
    """
    record = AdapterRecord.of(path)
    if record is not None and record.base_sha256 != base_sha256:
        raise TrainingError(
            f"{path} is a LoRA of another base (transformer sha256 {record.base_sha256[:12]}, this one is "
            f"{base_sha256[:12]}); give the folder that it was trained on ({record.recipe})"
        )


def _scale(read: Adapter, rank: int) -> float:
    """alpha/rank of all layers."""
    settings = read.settings["transformer"]
    if settings is None and read.folder is not None:
        text = (read.folder / "adapter_config.json").read_text(encoding="utf-8")
        settings = json.loads(text)
    settings = settings or {}
    odd = [name for name in ("rank_pattern", "alpha_pattern", "use_rslora", "use_dora") if settings.get(name)]
    if odd:
        raise TrainingError(
            f"{read.path} sets {odd[0]}; training goes on with one rank and one alpha: merge it (cdm-export --lora, or "
            "diffusers' fuse_lora) and distil the result"
        )
    return float(settings.get("lora_alpha", rank)) / rank
