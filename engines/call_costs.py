"""A table of what engine calls take, as a JSON file: measured on some machine, or given.

    {"name": "gpu-like", "source": "given, not measured: …", "rows": [
        {"stage": "encode", "batch": 1, "seconds": 0.002},
        {"stage": "denoise", "width": 512, "height": 512, "batch": 1, "seconds": 0.012}, …]}

The fake engine serves by it (`--fake-costs`), simulations run by it. Text has no size, so `encode` has neither.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Literal, Self

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from engines.errors import CostTableError

Stage = Literal["encode", "denoise", "decode"]


class CallCost(BaseModel):
    """Seconds that one call of `stage` takes for `batch` pictures of one size in pixels."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    stage: Stage
    batch: Annotated[int, Field(ge=1)]
    seconds: Annotated[float, Field(ge=0, allow_inf_nan=False)]
    width: Annotated[int | None, Field(ge=1)] = None
    height: Annotated[int | None, Field(ge=1)] = None

    @model_validator(mode="after")
    def _sized_unless_text(self) -> Self:
        if (self.width is None, self.height is None) != ((self.stage == "encode"),) * 2:
            raise ValueError(
                f"stage={self.stage} {'has no' if self.stage == 'encode' else 'needs'} width and height"
            )
        return self


class CostTable(BaseModel):
    """Rows, what they are called, and where they come from: a figure made with them says both."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    source: str
    rows: tuple[CallCost, ...]

    @model_validator(mode="after")
    def _every_stage_once_per_batch(self) -> Self:
        keys = [(row.stage, row.width, row.height, row.batch) for row in self.rows]
        if twice := [key for key in keys if keys.count(key) > 1]:
            raise ValueError(f"{twice[0][0]} of batch {twice[0][3]} is there twice")
        sizes = {
            stage: {key[1:3] for key in keys if key[0] == stage} for stage in ("encode", "denoise", "decode")
        }
        if not sizes["encode"] or not sizes["denoise"] or sizes["denoise"] != sizes["decode"]:
            raise ValueError("encode must have a row, and denoise and decode rows of the same sizes")
        return self

    @property
    def sizes(self) -> list[tuple[int, int]]:
        """(width, height) of its pictures, in the order of their first rows."""
        return list(dict.fromkeys((row.width, row.height) for row in self.rows if row.width and row.height))

    def first_size(self) -> Callable[[str, int], float]:
        """(stage, batch) → seconds for pictures of the first size: on the line between rows, outside per picture."""
        curves = {}
        for stage in ("encode", "denoise", "decode"):
            of_stage = [row for row in self.rows if row.stage == stage]
            points = sorted(
                (row.batch, row.seconds)
                for row in of_stage
                if (row.width, row.height) in {(None, None), self.sizes[0]}
            )
            curves[stage] = [np.array(axis, float) for axis in zip(*points, strict=True)]

        def seconds(stage: str, batch: int) -> float:
            batches, times = curves[stage]
            nearest = min(max(batch, batches[0]), batches[-1])
            return float(np.interp(nearest, batches, times) * batch / nearest)

        return seconds


def read_cost_table(path: Path) -> CostTable:
    """Read a table.

    Raises:
        CostTableError: no such file, or it is no such table.
    """
    try:
        return CostTable.model_validate_json(path.read_bytes())
    except OSError as error:
        raise CostTableError(f"the cost table {path} cannot be read: {error.strerror or error}") from error
    except ValidationError as error:
        problem = error.errors(include_url=False)[0]
        where = ".".join(map(str, problem["loc"]))
        message = problem["msg"].removeprefix("Value error, ")
        raise CostTableError(f"{path} is no cost table: {where + ': ' if where else ''}{message}") from error
