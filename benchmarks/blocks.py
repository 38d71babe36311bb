"""What was measured, block by block (one variant, one rate, one round): kept as CSV at once, pooled at the end."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from benchmarks.openloop import Answer, Body
from benchmarks.outcomes import Outcome, codes, in_time, quantiles, summary
from benchmarks.overhead import parse_server_timing
from benchmarks.scrape import NOTHING, BatchSizes
from cdm_serve.picture import STAGES

COLUMNS = (
    "round", "rate", "variant", "index", "warmup", "scheduled_s", "lag_ms", "latency_ms", "status", "code",
    "http_status", "steps_asked", "steps_run", "width", "height", "deadline_ms", "priority", "bytes",
    *(f"{stage}_ms" for stage in STAGES), "server_total_ms",
)  # fmt: skip


@dataclass(frozen=True)
class Block:
    """One variant's answers to one trace. Seconds; `batches` were counted after the warm-up."""

    variant: str
    number: int
    rate: float
    warmup: float
    duration: float
    bodies: Sequence[Body]
    answers: Sequence[Answer]
    batches: BatchSizes

    @property
    def measured(self) -> list[Outcome]:
        """Of those who arrived after the warm-up."""
        return [item.outcome for item in self.answers if item.outcome.at >= self.warmup]

    @property
    def warming(self) -> list[Outcome]:
        """Of those who arrived in the warm-up."""
        return [item.outcome for item in self.answers if item.outcome.at < self.warmup]


class Blocks:
    """All blocks of a run; a block's requests are in the file as soon as it was added."""

    def __init__(self, path: Path) -> None:
        self._all: list[Block] = []
        self._file = path.open("w", encoding="utf-8", newline="")
        self._writer = csv.writer(self._file)
        self._writer.writerow(COLUMNS)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    def add(self, block: Block) -> None:
        """Keep a block."""
        self._all.append(block)
        for index, (body, answer) in enumerate(zip(block.bodies, block.answers, strict=True)):
            self._writer.writerow(_line(block, index, body, answer))
        self._file.flush()

    def rows(
        self, variants: Sequence[str], slos: Sequence[float]
    ) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
        """A row per rate and variant, its rounds pooled; and beside each what is too much for a table."""
        rows, details = [], []
        for rate in dict.fromkeys(block.rate for block in self._all):
            for variant in variants:
                blocks = [item for item in self._all if (item.rate, item.variant) == (rate, variant)]
                row, detail = _pooled(blocks, slos)
                rows.append(row)
                details.append(detail)
        return rows, details


def _pooled(blocks: Sequence[Block], slos: Sequence[float]) -> tuple[dict[str, Any], dict[str, Any]]:
    first = blocks[0]
    which = {"variant": first.variant, "rate /s": round(first.rate, 3)}
    outcomes = [outcome for block in blocks for outcome in block.measured]
    warming = [outcome for block in blocks for outcome in block.warming]
    lags = [item.lag * 1e3 for block in blocks for item in block.answers]
    batches = reduce(BatchSizes.plus, (block.batches for block in blocks), NOTHING)
    row = {
        **which,
        **summary(outcomes, sum(block.duration for block in blocks), slos),
        "batch": batches.mean,
        "lag p99 ms": quantiles(lags)["p99"],
    }
    detail = {
        **which,
        "not_served": codes(outcomes),
        "in_time": in_time(outcomes, slos),
        "batches": batches.histogram(),
        "warmup": summary(warming, sum(block.warmup for block in blocks) or 1.0, slos),
        "lag_ms": quantiles(lags),
        "by_round": [summary(block.measured, block.duration, slos) for block in blocks],
    }
    return row, detail


def _line(block: Block, index: int, body: Body, answer: Answer) -> list[Any]:
    outcome = answer.outcome
    times = parse_server_timing(answer.timing) if answer.timing else {}
    return [
        block.number, f"{block.rate:.3f}", block.variant, index, int(outcome.at < block.warmup),
        f"{outcome.at:.6f}", f"{answer.lag * 1e3:.3f}", f"{outcome.latency * 1e3:.3f}", outcome.status,
        outcome.code, answer.http_status, body["steps"], outcome.steps or "", body["width"], body["height"],
        body.get("deadline_ms", ""), body["priority"], answer.bytes,
        *(times.get(stage, "") for stage in STAGES), times.get("total", ""),
    ]  # fmt: skip
