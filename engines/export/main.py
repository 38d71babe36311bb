"""`cdm-export STUDENT --out BUNDLE`: a diffusers folder becomes a bundle that `cdm-serve` serves."""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from pathlib import Path

from pydantic import Field, field_validator
from pydantic_settings import CliPositionalArg

from engines.bundle import Manifest, Size
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
    seed: int = Field(0, ge=0, description="seed of the random inputs compared")
    tolerance_stored: float = Field(
        Tolerance.stored, gt=0, description="largest relative L2 error against torch with the stored weights"
    )
    tolerance_original: float = Field(
        Tolerance.original,
        gt=0,
        description="largest relative L2 error against torch with the original weights",
    )

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
    """The measured errors, one row per component, batch size and reference."""
    rows = [f"{'component':<13}{'batch':>6}  {'against torch with':<19}{'max abs':>10}{'rel L2':>11}"]
    for name, component in manifest.components.items():
        for parity in component.parity:
            reference = f"{parity.weights} weights"
            rows.append(
                f"{name:<13}{parity.batch:>6}  {reference:<19}{parity.max_abs:>10.2e}{parity.rel_l2:>11.2e}"
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
        seed=settings.seed,
        tolerance=Tolerance(stored=settings.tolerance_stored, original=settings.tolerance_original),
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
