"""`cdm-bench tensorrt`: what TensorRT-RTX makes of a bundle, built for GPUs that need not be here.

One row per component, precision and compute capability: sizes, scratch memory, whether attention is one kernel. Nothing
is run, so nothing here is a speed.

    cdm-bench tensorrt --bundle bundles/mine --capabilities 8.9,12.0
    cdm-bench tensorrt --bundle bundles/mine --cache-dir engines-cache     # and keep the engines for a server there

With `--plans` it is TensorRT itself that builds, for the GPU here, what Triton's TensorRT backend runs:

    cdm-bench tensorrt --bundle bundles/mine --plans plans
"""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Self

from pydantic import Field, model_validator

from benchmarks.report import show
from engines.bundle import Bundle, load_bundle
from engines.cli import CommandSettings
from engines.errors import ExportError
from engines.tensorrt_build import build_engines
from engines.tensorrt_library import RTX, open_library
from engines.tensorrt_plans import write_plans
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
    plans: Path | None = Field(
        None,
        description="folder for bare engines that TensorRT, not TensorRT-RTX, builds for the GPU here: what cdm-export "
        "--triton-plans takes",
    )

    @model_validator(mode="after")
    def _plans_are_for_the_gpu_here(self) -> Self:
        if self.plans is None:
            return self
        for flag, name in (("--capabilities", "capabilities"), ("--cache-dir", "cache_dir")):
            if name in self.model_fields_set:
                raise ValueError(
                    f"{flag} means nothing with --plans, which are for the GPU here; leave it out"
                )
        if len(self.precisions) > 1:
            raise ValueError(
                f"--plans is a folder of one precision, not of {', '.join(self.precisions)}; name one in --precisions"
            )
        return self


def run(settings: TensorRTBenchSettings) -> int:
    """Build, print the table and the JSON line."""
    bundle = load_bundle(settings.bundle)
    reports = _plans(bundle, settings, settings.plans) if settings.plans else _engines(bundle, settings)
    show(
        "tensorrt",
        [report.row() for report in reports],
        library=open_library("tensorrt" if settings.plans else RTX).title,
        bundle=bundle.manifest.name,
        max_batch=settings.max_batch,
        sizes=[f"{size.width}x{size.height}" for size in bundle.manifest.sizes],
    )
    return max(_told(report) for report in reports)


def _engines(bundle: Bundle, settings: TensorRTBenchSettings) -> list[Report]:
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
    return reports


def _plans(bundle: Bundle, settings: TensorRTBenchSettings, folder: Path) -> list[Report]:
    """Build them, and say what to do with them."""
    (precision,) = settings.precisions
    print(f"building {precision} for the GPU here", file=sys.stderr, flush=True)
    reports = write_plans(bundle, folder, max_batch=settings.max_batch, precision=precision)
    command = [
        *("cdm-export", str(settings.bundle), "--to", "triton", "--triton-backend", "tensorrt"),
        *("--triton-device", "gpu", "--triton-precision", precision),
        *("--triton-max-batch", str(settings.max_batch), "--triton-plans", str(folder)),
    ]
    print(f"{shlex.join(command)} --out REPOSITORY", file=sys.stderr, flush=True)
    return reports


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
