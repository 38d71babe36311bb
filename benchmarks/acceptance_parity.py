"""A runtime's answers beside torch's in float32: errors, and whether `engines/export/tolerance.py` lets them pass."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from benchmarks.acceptance_engine import Arrays, read
from benchmarks.acceptance_report import Missed, Row
from engines.bundle import Parity, PictureParity, Size
from engines.errors import ExportError
from engines.export.tolerance import Tolerance

EQUAL_DB = 99.0
"""PSNR of pictures that are equal, as in a bundle's manifest: infinity is no JSON number."""


@dataclass(frozen=True)
class Examined:
    """Whose answers these are. `own_weights`: it runs the model's original weights, not those that the graphs store."""

    label: str
    runtime: str
    precision: str
    own_weights: bool


def errors(actual: Arrays, reference: Arrays) -> tuple[float, float]:
    """The worst over the outputs: largest difference, relative L2 error.

    Raises:
        Missed: an output is missing, of another shape, or not finite.
    """
    worst_abs = worst_l2 = 0.0
    for name, array in reference.items():
        if name not in actual or actual[name].shape != array.shape:
            found = actual[name].shape if name in actual else "nothing"
            raise Missed(f"{name} is {found}, not {array.shape}")
        exact = array.astype(np.float64)
        difference = actual[name].astype(np.float64) - exact
        if not np.isfinite(difference).all():
            raise Missed(f"{name} is not finite")
        worst_abs = max(worst_abs, float(np.abs(difference).max()))
        worst_l2 = max(worst_l2, float(np.linalg.norm(difference)) / max(float(np.linalg.norm(exact)), 1e-12))
    return worst_abs, worst_l2


def psnr(picture: NDArray[np.uint8], other: NDArray[np.uint8]) -> float:
    """In dB; `EQUAL_DB` if they are equal."""
    mean_square = float(np.mean((picture.astype(np.float64) - other.astype(np.float64)) ** 2))
    return min(EQUAL_DB, round(10 * float(np.log10(255**2 / mean_square)), 2)) if mean_square else EQUAL_DB


def component_rows(references: Path, outputs: Path, who: Examined, tolerance: Tolerance) -> Iterator[Row]:
    """A row a component: its worst errors over all shapes, against torch with the original and the stored weights."""
    for component, files in _by_component(references).items():
        row: Row = {"what": f"{who.label}: {component}", "result": "ok", "shapes": len(files)}
        try:
            for file in files:
                actual = read(outputs / file.name, "")
                for parity in _parities(file, component, actual, who):
                    column = f"rel L2, {parity.weights} weights"
                    row[column] = max(row.get(column, 0.0), parity.rel_l2)
                    row["max abs"] = max(row.get("max abs", 0.0), parity.max_abs)
                    tolerance.check(component, parity)
        except (ExportError, Missed, OSError) as error:
            row["result"] = f"failed: {error}"
        yield row


def _parities(file: Path, component: str, actual: Arrays, who: Examined) -> Iterator[Parity]:
    """In float32 against the very weights that run as well: nothing but rounding order may differ then."""
    batch = len(next(iter(actual.values())))
    original, stored = read(file, "original."), read(file, "stored.")
    pairs = {"original": original}
    if who.precision == "f32":
        pairs["stored"] = original if who.own_weights else stored
    for weights, reference in pairs.items():
        try:
            max_abs, rel_l2 = errors(actual, reference)
        except Missed as error:
            raise Missed(f"{component} at batch {batch} on {who.label}: {error}") from error
        yield Parity(
            runtime=who.runtime,
            precision=who.precision,
            weights="stored" if weights == "stored" else "original",
            batch=batch,
            max_abs=max_abs,
            rel_l2=rel_l2,
        )


def picture_rows(
    references: Path, outputs: Path, who: Examined, steps: int, tolerance: Tolerance
) -> Iterator[Row]:
    """A row a size: whole pictures, from token ids and noise to pixels."""
    for file in sorted(references.glob("picture-*.npz")):
        wanted = read(file, "")["image"]
        count, height, width, _ = wanted.shape
        row: Row = {"what": f"{who.label}: pictures of {width}x{height}", "result": "ok", "shapes": 1}
        try:
            found = read(outputs / file.name, "")["image"]
            if found.shape != wanted.shape:
                raise Missed(f"pictures are {found.shape}, not {wanted.shape}")
            largest = int(np.abs(found.astype(np.int16) - wanted.astype(np.int16)).max())
            parity = PictureParity(
                runtime=who.runtime,
                precision=who.precision,
                size=Size(width=width, height=height),
                steps=steps,
                batch=count,
                psnr=psnr(found, wanted),
                max_abs=largest,
            )
            row |= {"PSNR dB": parity.psnr, "max abs": largest}
            tolerance.check_picture(parity)
        except (ExportError, Missed, OSError) as error:
            row["result"] = f"failed: {error}"
        yield row


def alone_row(batched: Path, alone: Path, who: Examined, tolerance: Tolerance) -> Row:
    """Every row of the denoiser's batches, each at a σ of its own, beside the same row alone."""
    limit = tolerance.stored if who.precision == "f32" else tolerance.low
    worst, rows, equal = 0.0, 0, 0
    for file in sorted(alone.glob("denoiser-*.npz")):
        together, apart = read(batched / file.name, ""), read(file, "")
        for row in range(len(together["x_next"])):
            pair = [{name: array[row] for name, array in arrays.items()} for arrays in (together, apart)]
            worst = max(worst, errors(*pair)[1])
            equal += all(np.array_equal(pair[0][name], pair[1][name]) for name in pair[0])
            rows += 1
    found: Row = {"rows": rows, "equal bytes": equal, "rel L2": worst}
    if not rows:
        raise Missed("there were no rows to compare")
    if not worst <= limit:
        raise Missed(
            f"a row in a batch is off from itself alone by {worst:.2e}; at most {limit:.0e} is allowed"
        )
    return found


def _by_component(references: Path) -> dict[str, list[Path]]:
    found: dict[str, list[Path]] = {}
    for file in sorted(references.glob("*-*.npz")):
        component = file.stem.rpartition("-")[0]
        if component != "picture":
            found.setdefault(component, []).append(file)
    if not found:
        raise Missed(f"{references} holds no references")
    return found
