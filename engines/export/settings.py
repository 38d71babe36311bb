"""The flags of `cdm-export`: those of a bundle here, those of a Triton repository in `engines/export/to_triton.py`.

Without torch: help and mistakes need none.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Literal, Self

from pydantic import Field, field_validator, model_validator
from pydantic_settings import CliPositionalArg

from engines.bundle import Precision, Size
from engines.cli import CommandSettings
from engines.export.fusion import read_fusion_check
from engines.export.to_triton import TritonSettings
from engines.export.tolerance import Tolerance

SHARED = ("student", "out", "to")
"""Fields that mean something whatever is written."""


class BundleSettings(CommandSettings):
    """What is exported, where to, and how a bundle is made of a student."""

    student: CliPositionalArg[str] = Field(
        min_length=1,
        description="diffusers folder of the student (safetensors), or its hub id org/name or org/name@revision; "
        "for --to triton the folder of a bundle",
    )
    out: Path = Field(description="folder to write; what was exported there before is replaced")
    to: Literal["bundle", "triton"] = Field(
        "bundle", description="what to write: a bundle, or of a bundle a model repository for a Triton server"
    )
    lora: Path | None = Field(
        None, description="LoRA adapter to merge into the student: a safetensors file, or its folder"
    )
    name: str = Field(
        "", max_length=128, description="model name in the manifest; empty: the student folder's name"
    )
    default_steps: int = Field(4, ge=1, description="steps of a picture whose request names none")
    max_steps: int = Field(8, ge=1, le=100, description="schedules are written for 1 to this many steps")
    sizes: list[str] = Field([], description="picture sizes WxH, default first; empty: the model's own")
    precisions: list[Precision] = Field(
        ["float32"],
        min_length=1,
        description="graphs to write: float32 (opset 20, for CPUs), bfloat16 (opset 23, for GPUs)",
    )
    skip_rewrites: list[str] = Field(
        [], description="exact rewrites of the model to leave out, to compare with"
    )
    weights: bool = Field(
        False,
        description="put the student's own folder into the bundle too: the torch and aotinductor engines need it",
    )
    verify: list[str] = Field(
        [],
        description="runtimes that must match torch, such as openvino or onnxruntime:int8; empty: those of every CPU",
    )
    fusion_check: list[str] = Field(
        [],
        description="compilers that must make each attention one kernel, for a GPU that need not be here: "
        "tensorrt-rtx:8.9 (by its compute capability), which reads the bfloat16 graphs",
    )
    batches: list[int] = Field([1, 2, 3, 5], min_length=1, description="batch sizes compared with torch")
    seed: int = Field(0, ge=0, description="seed of the random inputs compared")
    tolerance_stored: float = Field(
        Tolerance.stored, gt=0, description="largest relative L2 error against torch with the stored weights"
    )
    tolerance_original: float = Field(
        Tolerance.original,
        gt=0,
        description="largest relative L2 error against torch with the original weights",
    )

    tolerance_low: float = Field(
        Tolerance.low,
        gt=0,
        description="largest relative L2 error of a lower precision (bfloat16, int8) against torch in float32",
    )
    tolerance_psnr: float = Field(
        Tolerance.psnr, gt=0, description="least PSNR (dB) of whole float32 pictures against torch"
    )

    allow_unfused: bool = Field(
        False,
        description="write the bundle even if a runtime's compiler leaves attention in parts (slower)",
    )

    @field_validator("batches")
    @classmethod
    def _are_batches(cls, value: list[int]) -> list[int]:
        if wrong := [batch for batch in value if not 1 <= batch <= 64]:
            raise ValueError(f"{wrong[0]} is not a batch size; 1 to 64 are allowed")
        return value

    @field_validator("fusion_check")
    @classmethod
    def _are_capabilities(cls, value: list[str]) -> list[str]:
        for text in value:
            read_fusion_check(text)
        return value

    @field_validator("sizes")
    @classmethod
    def _are_sizes(cls, value: list[str]) -> list[str]:
        for text in value:
            read_size(text)
        return value


class ExportSettings(TritonSettings, BundleSettings, env_prefix="CDM_EXPORT_"):
    """Export a student (a diffusers folder) to a bundle (ONNX and a manifest), and prove that it is the same model.

    Every component is compared with torch on random inputs; above the tolerances nothing is written. With --to triton,
    write a bundle as a model repository for NVIDIA Triton Inference Server.
    """

    @model_validator(mode="after")
    def _every_flag_means_something(self) -> Self:
        """A flag that would change nothing is a mistake about what is written."""
        other = BundleSettings if self.to == "triton" else TritonSettings
        given = [name for name in other.model_fields if name in self.model_fields_set and name not in SHARED]
        if given:
            flags = ", ".join(f"--{name.replace('_', '-')} (or CDM_EXPORT_{name.upper()})" for name in given)
            means, it = ("means", "it") if len(given) == 1 else ("mean", "them")
            instead = f"export the bundle with {it}" if self.to == "triton" else "add --to triton"
            raise ValueError(f"{flags} {means} nothing with --to {self.to}; leave {it} out, or {instead}")
        return self


def read_size(text: str) -> Size:
    """`128x96` as a size in pixels.

    Raises:
        ValueError: it is no size.
    """
    found = re.fullmatch(r"([1-9]\d{0,4})x([1-9]\d{0,4})", text)
    if not found:
        raise ValueError(f"{text!r} is not a size; write WIDTHxHEIGHT in pixels, as 128x128")
    return Size(width=int(found[1]), height=int(found[2]))
