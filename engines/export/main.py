"""`cdm-export STUDENT --out BUNDLE`: a diffusers folder becomes a bundle that `cdm-serve` serves.

`cdm-export BUNDLE --to triton --out REPOSITORY`: a bundle becomes what a Triton server serves.
"""

from __future__ import annotations

import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from engines.bundle import Manifest
from engines.cli import run_command
from engines.commands import importing
from engines.export.fusion import read_fusion_check
from engines.export.settings import ExportSettings, read_size
from engines.export.to_triton import export_to_triton
from engines.export.tolerance import Tolerance

EPILOG = """
cdm-export runs/student --out bundles/student
cdm-export runs/student --out bundles/student --sizes 128x128,160x96 --default-steps 2
cdm-export runs/student --out bundles/student --precisions float32,bfloat16 --fusion-check tensorrt-rtx:8.9
cdm-export runs/base --lora runs/adapter --out bundles/student --name student
cdm-export bundles/student --to triton --out triton/student --triton-backend python
"""


def parity_table(manifest: Manifest) -> str:
    """The worst errors over batches and sizes by component, runtime and reference; whole pictures; fused attentions."""
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
    for name, component in manifest.components.items():
        rows += [
            f"{name:<16}{f'{item.runtime} {item.precision} {item.target}':<34}{item.report}"
            for item in component.fusions
        ]
    return "\n".join(rows)


def export(settings: ExportSettings) -> int:
    """Export to what `settings.to` says, and print what was written.

    Raises:
        UsageError: a package of the `train` or `triton` extra is not installed.
        BundleError: the bundle to write a repository of cannot be served.
        ExportError: there is nothing to export, or nothing came of it.
    """
    if settings.to == "triton":
        models = export_to_triton(Path(settings.student), settings.out, settings)
        print(f"{settings.out}: {', '.join(models)}")
        return 0
    return _export_bundle(settings)


def _export_bundle(settings: ExportSettings) -> int:
    with importing("cdm-export", "train"):  # not above: --help and mistakes need no torch
        from engines.export.export import ExportOptions, export_bundle

    options = ExportOptions(
        name=settings.name,
        lora=settings.lora,
        default_steps=settings.default_steps,
        max_steps=settings.max_steps,
        sizes=tuple(read_size(text) for text in settings.sizes),
        precisions=tuple(settings.precisions),
        skip=tuple(settings.skip_rewrites),
        weights=settings.weights,
        runtimes=tuple(settings.verify),
        fusion_check=tuple(read_fusion_check(text) for text in settings.fusion_check),
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


def _end(number: int, _: object) -> None:
    """What has begun is cleaned up on the way out."""
    raise SystemExit(128 + number)


def main(argv: Sequence[str] | None = None) -> int:
    """Console entry point: 0 exported, 2 refused with one sentence, 143 ended by SIGTERM, with nothing left behind."""
    previous = signal.signal(signal.SIGTERM, _end)
    try:
        return run_command(ExportSettings, export, argv, prog="cdm-export", epilog=EPILOG)
    finally:
        signal.signal(signal.SIGTERM, previous)


if __name__ == "__main__":
    sys.exit(main())
