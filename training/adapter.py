"""The student's LoRA as a file that diffusers, `cdm-export --lora` and `--teacher-lora` take.

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
from engines.export.adapter import find_adapter
from training.errors import Diverged, TrainingError
from training.lora import Size

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
