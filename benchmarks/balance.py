"""What a server counted and logged, held against what its callers saw. Pure functions of `/metrics` and of the log."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

from prometheus_client.parser import text_string_to_metric_families

TROUBLE = ("Traceback", "ERROR", "CRITICAL", "unforeseen", "Warning:", "never retrieved", "never awaited")
COUNTED = ("cdm_pictures_total", "cdm_requests_total", "cdm_cancelled", "cdm_deadline_missed_total")
DEPTHS = ("cdm_queue_depth", "cdm_pictures_in_work")


def trouble(log: str) -> list[str]:
    """Lines that should not be there. (That bytes were no HTTP is a warning of uvicorn's, and true.)"""
    return [line for line in log.splitlines() if any(word in line for word in TROUBLE)]


def totals(text: str) -> dict[str, float]:
    """`/metrics` as {"cdm_pictures_total finished": …}: summed over all labels but `outcome`."""
    sums: dict[str, float] = defaultdict(float)
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            if sample.name.endswith("_created"):  # a time, not a number
                continue
            sums[f"{sample.name} {sample.labels.get('outcome', '')}".strip()] += sample.value
    return sums


def unbalanced(grown: dict[str, float], served: int, left: int, refused: int) -> dict[str, Any]:
    """What the server counted against what callers saw: pictures served, asked for by leavers, and calls refused."""
    finished, cancelled = (grown.get(f"cdm_pictures_total {name}", 0.0) for name in ("finished", "cancelled"))
    rejected = grown.get("cdm_requests_total rejected", 0.0)
    names = ("cdm_pictures_total failed", "cdm_requests_total failed", "cdm_requests_total unavailable")
    problems: dict[str, Any] = {name: grown[name] for name in names if grown.get(name)}
    if not served <= finished <= finished + cancelled <= served + left:
        problems["pictures"] = (
            f"{served} came and {left} were asked for by callers who left, but {finished:.0f} were finished and "
            f"{cancelled:.0f} cancelled"
        )
    if not refused <= rejected <= refused + left:
        problems["refusals"] = f"{refused} came and {left} callers left, but {rejected:.0f} were counted"
    return problems
