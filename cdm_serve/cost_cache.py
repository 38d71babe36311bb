"""Measured costs on disk, beside the engine's compiled models: a restarted server predicts from its first request on.

    read_costs(path, costs)            # before the warm-up, which refreshes them
    write_costs(path, costs)           # after it, and at the end

Like the compiled models a cache is never a reason to fail: what cannot be read or written is measured anew.
"""

from __future__ import annotations

import json
import logging
import math
from pathlib import Path
from typing import Any

from cdm_serve.costs import STAGES, Bucket, CostModel
from engines.base import Engine
from engines.files import write_text_atomically

log = logging.getLogger("cdm_serve.costs")

MOST = 2**16
"""Pictures in a call; a file that claims more is damaged."""


def cost_file(engine: Engine) -> Path | None:
    """Where this engine's costs are kept: one file per way of batching, in the folder of its compiled models."""
    if engine.cache_folder is None:
        return None
    return engine.cache_folder / f"costs-{engine.info.max_batch}-{engine.info.invariant_batch}.json"


def read_costs(path: Path, costs: CostModel) -> int:
    """Take over what is stored; how many measurements that were. A damaged file counts as none."""
    try:
        rows = [_checked(row) for row in json.loads(path.read_text(encoding="utf-8"))]
    except FileNotFoundError:
        return 0
    except (OSError, ValueError, TypeError, OverflowError, RecursionError) as error:
        log.warning("%s is not used: %s", path, error)
        return 0
    for stage, bucket, batch, seconds in rows:
        costs.record(stage, bucket, batch, seconds)
    return len(rows)


def write_costs(path: Path, costs: CostModel) -> None:
    """Store all measurements, whole or not at all."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text_atomically(path, json.dumps(costs.rows()) + "\n")
    except OSError as error:
        log.warning("%s could not be written: %s", path, error)


def _checked(row: Any) -> tuple[Any, Bucket, int, float]:
    stage, bucket, batch, seconds = row
    sides = 0 if stage == "encode" else 2  # text has no size
    if (
        stage not in STAGES
        or type(batch) is not int
        or not 1 <= batch <= MOST
        or len(bucket) != sides
        or not all(type(side) is int and side >= 1 for side in bucket)
        or not (math.isfinite(seconds) and seconds >= 0)
    ):
        raise ValueError(f"{row} is no measurement")
    return stage, tuple(bucket), batch, float(seconds)
