"""`cdm-bench tensorrt`: what TensorRT-RTX makes of a bundle, built for GPUs that need not be here.

One row per component, precision and compute capability: sizes, scratch memory, whether attention is one kernel. Nothing
is run, so nothing here is a speed.

    cdm-bench tensorrt --bundle bundles/mine --capabilities 8.9,12.0
    cdm-bench tensorrt --bundle bundles/mine --cache-dir engines-cache     # and keep the engines for a server there
"""

from __future__ import annotations

import sys
from pathlib import Path

from pydantic import Field

from benchmarks.report import show
from engines.bundle import load_bundle
from engines.cli import CommandSettings
from engines.errors import ExportError
from engines.tensorrt_build import build_engines
from engines.tensorrt_library import RTX, open_library
from engines.tensorrt_report import Report


class TensorRTBenchSettings(CommandSettings, env_prefix="CDM_BENCH_TENSORRT_"):
    """Build a bundle's engines with TensorRT-RTX, without a GPU, and report sizes, memory and fusions.

    Exit code 1 where an attention in bfloat16 is not one kernel.
    """

    bundle: Path = Field(description="bundle folder")
    capabilities: list[str] = Field(
        ["8.9"], min_length=1, description="compute capabilities of the GPUs to build for"
    )
    precisions: list[str] = Field(["bf16"], min_length=1, description="precisions to build: bf16, f32")
    max_batch: int = Field(
        8, ge=1, description="largest batch that the engines take; a server must ask for the same"
    )
    cache_dir: Path | None = Field(
        None, description="folder to keep the engines in, for a server on such a GPU; none keeps none"
    )


def run(settings: TensorRTBenchSettings) -> int:
    """Build, print the table and the JSON line."""
    bundle = load_bundle(settings.bundle)
    reports: list[Report] = []
    for capability in settings.capabilities:
        for precision in settings.precisions:
            print(f"building {precision} for {capability}", file=sys.stderr, flush=True)
            reports += build_engines(
                bundle,
                capability=capability,
                cache_dir=settings.cache_dir,
                max_batch=settings.max_batch,
                precision=precision,
            )
    show(
        "tensorrt",
        [report.row() for report in reports],
        library=open_library(RTX).title,
        bundle=bundle.manifest.name,
        max_batch=settings.max_batch,
        sizes=[f"{size.width}x{size.height}" for size in bundle.manifest.sizes],
    )
    return max(_told(report) for report in reports)


def _told(report: Report) -> int:
    """1 if attention fell apart in bfloat16, which is then said; in float32 it always does."""
    if report.precision == "f32":
        return 0
    try:
        report.require_attention(report.component)
    except ExportError as error:
        print(error, file=sys.stderr)
        return 1
    return 0
