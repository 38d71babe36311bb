"""`cdm-bench rewrites`: what each exact rewrite of a model's family brings to one denoiser call.

The model is exported once with all rewrites (`Family.rewrites`), its denoiser once more without each of them, and the
two take turns in one run on one runtime. Both are held to torch when they are exported.

    cdm-bench rewrites --longcat 8 --size 512x512 --threads 2     # random weights, LongCat-Image's real classes
    cdm-bench rewrites --model runs/emoji-cdm/student --batches 1,8 --threads 2
"""

from __future__ import annotations

import shutil
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field, field_validator, model_validator

from benchmarks.random_longcat import build_random_longcat
from benchmarks.report import show
from benchmarks.rewrites_exports import exports_folder, with_all, without
from benchmarks.roofline import denoiser_inputs
from benchmarks.turns import spread, take_turns
from engines.base import EngineOptions, GraphEngine, load_engine
from engines.bundle import Bundle
from engines.cli import CommandSettings, UsageError
from engines.export.settings import read_size
from engines.families.base import INDEX, Family, FamilyError, load_family
from engines.files import replace_folder

GOALS = {"rotate_half": 1.4}
"""What leaving a rewrite out must cost at least, in step time over that with all, in bf16."""


class RewritesBenchSettings(CommandSettings, env_prefix="CDM_BENCH_REWRITES_"):
    """Time one denoiser call with all exact rewrites of the model, and without each of them, in alternating rounds."""

    model: Path | None = Field(None, description="diffusers folder of a student")
    longcat: int = Field(
        0, ge=0, le=30, description="instead: LongCat-Image of so many blocks with random weights"
    )
    heads: int = Field(
        0,
        ge=0,
        le=24,
        description="width of that in heads of 128; 0: as many as 2 GiB of float32 weights hold",
    )
    size: str = Field("", description="picture size WxH; empty: the model's own")
    batches: list[int] = Field([1], min_length=1, description="pictures per call")
    engine: Literal["openvino", "onnxruntime"] = Field("openvino", description="runtime")
    precision: str = Field("bf16", description="the runtime's precision")
    rewrites: list[str] = Field([], description="rewrites to leave out in turn; empty: all of the family's")
    rounds: int = Field(20, ge=2, description="measured rounds; both forms run once in each")
    threads: int = Field(0, ge=0, description="threads; 0 lets the runtime choose")
    work: Path | None = Field(
        None, description="folder to keep the exports in, for the next run; none keeps none"
    )
    seed: int = Field(0, ge=0, description="seed of inputs and order")

    @field_validator("batches")
    @classmethod
    def _are_batches(cls, value: list[int]) -> list[int]:
        if wrong := [batch for batch in value if not 1 <= batch <= 64]:
            raise ValueError(f"{wrong[0]} is not a batch size; 1 to 64 are allowed")
        return value

    @field_validator("size")
    @classmethod
    def _is_size(cls, value: str) -> str:
        if value:
            read_size(value)
        return value

    @model_validator(mode="after")
    def _one_model(self) -> Self:
        if (self.model is None) == (self.longcat == 0):
            raise ValueError("give either --model FOLDER or --longcat LAYERS, which say what to export")
        if self.heads and not self.longcat:
            raise ValueError(f"--heads={self.heads} means nothing without --longcat; leave it out")
        return self


def run(settings: RewritesBenchSettings) -> int:
    """Export what is not kept, measure, print the table and the JSON line.

    Raises:
        UsageError: no such model, or no such rewrite of its family.
        ExportError: an export failed or is another model than torch's.
        RuntimeUnavailable: the runtime or its precision is not there.
    """
    with _folder(settings.work) as work:
        model = _model(settings, work)
        family = _loaded(model)
        names = settings.rewrites or list(family.rewrites)
        if unknown := [name for name in names if name not in family.rewrites]:
            known = ", ".join(family.rewrites) or "none"
            raise UsageError(f"--rewrites={unknown[0]}: {family.name} has {known}")
        root = work / exports_folder(model, settings.size)
        every = with_all(model, root, settings.size, f"{settings.engine}:{settings.precision}")
        rows = [row for name in names for row in _rows(settings, every, without(model, every, name, root))]
    show(
        "rewrites",
        rows,
        bundle=every.manifest.name,
        family=family.name,
        size=every.manifest.default_size.model_dump(),
        precision=settings.precision,
        threads=settings.threads,
        goals={name: _goal(rows, name, settings.precision) for name in names if name in GOALS},
    )
    return 0


@contextmanager
def _folder(kept: Path | None) -> Iterator[Path]:
    if kept is not None:
        kept.mkdir(parents=True, exist_ok=True)
        yield kept
        return
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)


def _model(settings: RewritesBenchSettings, work: Path) -> Path:
    if settings.model is not None:
        return settings.model
    name = f"longcat-{settings.longcat}" + (f"-{settings.heads}-heads" if settings.heads else "")
    folder = work / name
    if not (folder / INDEX).is_file():
        print(f"building {name}", file=sys.stderr, flush=True)
        partial_folder = work / f".{name}.partial"
        shutil.rmtree(partial_folder, ignore_errors=True)
        try:
            build_random_longcat(partial_folder, settings.longcat, heads=settings.heads)
        except ValueError as error:
            raise UsageError(f"--longcat={settings.longcat}: {error}") from error
        replace_folder(partial_folder, folder)
    return folder


def _loaded(model: Path, *only: str) -> Family:
    try:
        return load_family(model, torch.float32, only)
    except FamilyError as error:
        raise UsageError(f"--model: {error}") from error


def _rows(
    settings: RewritesBenchSettings, every: Bundle, other: tuple[str, Bundle]
) -> Iterator[dict[str, Any]]:
    """A row a batch. Two engines are in memory at once."""
    name, lacking = other
    options = EngineOptions(
        settings.engine, settings.precision, settings.threads, max_batch=max(settings.batches)
    )
    on = _engine(every, options)
    try:
        off = _engine(lacking, options)
    except (
        Exception
    ) as error:  # a runtime may have no way to run what the rewrite removes; their errors share no base
        on.close()
        reason = str(error).strip().splitlines() or [type(error).__name__]
        yield {"rewrite": name, "failed without it": reason[0]}
        return
    engines = {"on": on, "off": off}
    inputs = {batch: denoiser_inputs(every.manifest, batch) for batch in settings.batches}
    calls = {
        (form, batch): partial(engine.run, "denoiser", inputs[batch])
        for form, engine in engines.items()
        for batch in settings.batches
    }
    print(f"{name}:", file=sys.stderr)
    times = take_turns(calls, settings.rounds, settings.seed)
    for batch in settings.batches:
        times_on, times_off = (spread(f"{form},", times[form, batch]) for form in ("on", "off"))
        yield {
            "rewrite": name,
            "batch": batch,
            **times_on,
            **times_off,
            "off / on": times_off["off, ms"] / times_on["on, ms"],
            "difference, rel L2": _difference(calls["on", batch](), calls["off", batch]()),
            "n": settings.rounds,
        }
    for engine in engines.values():
        engine.close()


def _engine(bundle: Bundle, options: EngineOptions) -> GraphEngine:
    engine = load_engine(bundle, options)
    assert isinstance(engine, GraphEngine)
    return engine


def _difference(on: Mapping[str, NDArray[Any]], off: Mapping[str, NDArray[Any]]) -> float:
    """Of x̂0 with and without the rewrite, in the measured precision."""
    a, b = (answers["x0"].astype(np.float64) for answers in (on, off))
    return float(np.linalg.norm(a - b) / np.linalg.norm(a))


def _goal(rows: list[dict[str, Any]], name: str, precision: str) -> dict[str, Any]:
    """Whether the smallest ratio over the batches reaches the goal; None where nothing says so: a runtime that fails
    without the rewrite, a precision that the goal is not about."""
    ratios = [row["off / on"] for row in rows if row["rewrite"] == name and "off / on" in row]
    if not ratios:
        return {"goal": GOALS[name], "reached": None, "met": None}
    reached = min(ratios)
    met = reached >= GOALS[name] if precision == "bf16" else None
    return {"goal": GOALS[name], "reached": round(reached, 3), "met": met}
