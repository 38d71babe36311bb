"""Bundle → bare TensorRT engines, for who runs them without cdm-serve: Triton's TensorRT backend.

    write_plans(load_bundle(Path("bundles/mine")), Path("plans"), precision="bf16")      # plans/denoiser.plan, …
    cdm-export bundles/mine --to triton --triton-backend tensorrt --triton-plans plans …

They are the engines that `engines/tensorrt.py` would build here, but for the decoder's: a model in Triton has one limit
to its batches, and a repository gives all of a bundle's the same.
"""

from __future__ import annotations

import shutil
import tempfile
from contextlib import closing
from pathlib import Path
from typing import Any

from engines.bundle import Bundle
from engines.cuda import Cuda
from engines.errors import ExportError
from engines.files import replace_folder
from engines.tensorrt_build import Order, build, choose_precision
from engines.tensorrt_library import open_library
from engines.tensorrt_report import Report

SUFFIX = ".plan"


def write_plans(
    bundle: Bundle,
    folder: Path,
    *,
    max_batch: int = 8,
    precision: str = "auto",
    trt: Any = None,
    runtime: Any = None,
) -> list[Report]:
    """Build every component with TensorRT for this machine's first GPU, into `folder`, whole or not at all.

    A folder of such files is replaced. `trt` and `runtime` take the place of the packages.

    Raises:
        RuntimeUnavailable: no TensorRT or no GPU here, or neither has the precision.
        ExportError: a component cannot be built, or `folder` holds something else or cannot be written.
    """
    library = open_library("tensorrt", trt)
    _check_holds_plans(folder)
    staging: Path | None = None
    with closing(Cuda(runtime)) as cuda:
        target = f"{cuda.name} ({cuda.capability})"
        chosen = choose_precision(precision, bundle.manifest, cuda.capability)
        order = Order(library, bundle, chosen, target, max_batch, cuda.free_bytes(), whole_batches=True)
        reports = []
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            staging = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
            staging.chmod(0o755)  # mkdtemp's 0700 would hide them from others
            for component in bundle.manifest.components:
                plan, report = build(order, component)
                (staging / f"{component}{SUFFIX}").write_bytes(plan)
                reports.append(report)
            replace_folder(staging, folder)
        except OSError as error:
            raise ExportError(f"{folder} cannot be written: {error.strerror or error}") from error
        finally:
            if staging is not None:
                shutil.rmtree(staging, ignore_errors=True)
    return reports


def _check_holds_plans(folder: Path) -> None:
    """Refuse to replace what another hand has made."""
    entries = sorted(folder.iterdir()) if folder.is_dir() else [folder] if folder.exists() else []
    if other := [path for path in entries if path.suffix != SUFFIX]:
        raise ExportError(
            f"{folder} holds {other[0].name}, and is replaced as a whole; give another folder for the plans"
        )
