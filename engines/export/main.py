"""`cdm-export STUDENT --out BUNDLE`: a diffusers folder becomes a bundle that `cdm-serve` serves."""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from pathlib import Path

from pydantic import Field, field_validator
from pydantic_settings import CliPositionalArg

from engines.bundle import Manifest, Precision, Size
from engines.cli import CommandSettings, run_command
from engines.commands import importing
from engines.export.tolerance import Tolerance

EPILOG = """
cdm-export runs/student --out bundles/student
cdm-export runs/student --out bundles/student --sizes 128x128,160x96 --default-steps 2
"""


class ExportSettings(CommandSettings, env_prefix="CDM_EXPORT_"):
    """Export a student (a diffusers folder) to a bundle (ONNX and a manifest), and prove that it is the same model.

    Every component is compared with torch on random inputs; above the tolerances nothing is written.
    """

    student: CliPositionalArg[Path] = Field(description="diffusers folder of the student (safetensors)")
    out: Path = Field(description="bundle folder to write; a bundle that is there is replaced")
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
        description="write the bundle even if a runtime leaves the denoiser's attention in parts (slower)",
    )

    @field_validator("batches")
    @classmethod
    def _are_batches(cls, value: list[int]) -> list[int]:
        if wrong := [batch for batch in value if not 1 <= batch <= 64]:
            raise ValueError(f"{wrong[0]} is not a batch size; 1 to 64 are allowed")
        return value

    @field_validator("sizes")
    @classmethod
    def _are_sizes(cls, value: list[str]) -> list[str]:
        for text in value:
            _size(text)
        return value


def _size(text: str) -> Size:
    found = re.fullmatch(r"([1-9]\d{0,4})x([1-9]\d{0,4})", text)
    if not found:
        raise ValueError(f"{text!r} is not a size; write WIDTHxHEIGHT in pixels, as 128x128")
    return Size(width=int(found[1]), height=int(found[2]))


def parity_table(manifest: Manifest) -> str:
    """The measured errors: the worst over batches and sizes by component, runtime and reference; whole pictures."""
    rows = [
        f"{'component':<16}{'on':<34}{'against torch with':<19}{'shapes':>7}{'max abs':>10}{'rel L2':>11}"
    ]
    for name, component in manifest.components.items():
        for key in dict.fromkeys((item.runtime, item.precision, item.weights) for item in component.parity):
            found = [item for item in component.parity if (item.runtime, item.precision, item.weights) == key]
            runtime, precision, weights = key
            rows.append(
                f"{name:<16}{f'{runtime} {precision}':<34}{f'{weights} weights':<19}{len(found):>7}"
                f"{max(item.max_abs for item in found):>10.2e}{max(item.rel_l2 for item in found):>11.2e}"
            )
    for picture in manifest.pictures:
        size = f"{picture.size.width}x{picture.size.height}"
        rows.append(
            f"{f'picture {size}':<16}{f'{picture.runtime} {picture.precision}':<34}{f'{picture.steps} steps':<19}"
            f"{picture.batch:>7}{picture.max_abs:>7} /255{picture.psnr:>8.1f} dB"
        )
    return "\n".join(rows)


def export(settings: ExportSettings) -> int:
    """Export and print the parity table.

    Raises:
        UsageError: a package of the `train` extra is not installed.
        ExportError: there is nothing to export, or no bundle came of it.
    """
    with importing("cdm-export", "train"):  # not above: --help and mistakes need no torch
        from engines.export.export import ExportOptions, export_bundle

    options = ExportOptions(
        name=settings.name,
        default_steps=settings.default_steps,
        max_steps=settings.max_steps,
        sizes=tuple(_size(text) for text in settings.sizes),
        precisions=tuple(settings.precisions),
        skip=tuple(settings.skip_rewrites),
        weights=settings.weights,
        runtimes=tuple(settings.verify),
        batches=tuple(settings.batches),
        seed=settings.seed,
        tolerance=Tolerance(
            stored=settings.tolerance_stored,
            original=settings.tolerance_original,
            low=settings.tolerance_low,
            psnr=settings.tolerance_psnr,
            unfused=settings.allow_unfused,
        ),
    )
    report = export_bundle(
        settings.student, settings.out, options, progress=lambda text: print(f"… {text}", file=sys.stderr)
    )
    print(parity_table(report.manifest))
    print(f"\n{settings.out}: {report.manifest.name}, {report.bytes / 1e6:.1f} MB")
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Console entry point: 0 exported, 2 refused with one sentence."""
    return run_command(ExportSettings, export, argv, prog="cdm-export", epilog=EPILOG)


if __name__ == "__main__":
    sys.exit(main())
