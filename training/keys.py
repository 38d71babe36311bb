"""What the numbers in `log.jsonl` are: a family, an axis title and a meaning by name, for trackers and the report.

    key_info("cdm_weight")     # Key(family=WEIGHTS, title="CDM · weight", …)

A new number needs no entry: its name decides, and what nothing fits is drawn under "Other".
"""

from __future__ import annotations

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Group:
    """Curves that are read together."""

    name: str
    axis: str
    """What the ordinate is, with its unit."""
    note: str
    """What to look for, in a sentence or two."""


LOSSES = Group(
    "Losses", "loss, latent units²",
    "Mean squared error to a moving target: levels say little, jumps and drifts do. The CDM, DM and CA terms are "
    "weighted differences of two teachers, and do not fall to 0.",
)  # fmt: skip
NORMS = Group(
    "Gradient norms", "‖∇‖₂ before clipping",
    "Above the dashed line the gradient is clipped to it. Spikes are bad batches; a steady rise precedes divergence.",
)  # fmt: skip
WEIGHTS = Group(
    "Loss weights", "w, 1 / latent unit",
    "w = 1 / max(mean|x̂0 of teacher − x̂0 of student|, floor), averaged over the batch. A weight pinned at 1/floor "
    "(dashed) is the floor's doing: student and teacher agree there. Floored: the share of samples it holds for.",
)  # fmt: skip
DIFFERENCES = Group(
    "Distances and directions", "mean |·|, latent units",
    "Distance: how far the teacher's x̂0 is from the student's. Δ: how hard each term pulls; the Δ of DM and CDM is "
    "the gap between teacher and fake teacher.",
)  # fmt: skip
COSINES = Group(
    "Cosines", "cosine, −1 … 1",
    "Near 0 two terms are about different things; near −1 they pull against each other.",
)  # fmt: skip
LATENTS = Group(
    "Latents", "latent units",
    "The student's x̂0 over the batch. A mean that drifts, or a spread that grows far past where it began, is the way "
    "to washed-out or oversaturated pictures.",
)  # fmt: skip
RATES = Group(
    "Learning rates", "learning rate", "What the optimizers were given, warm-up and cool-down included."
)
THROUGHPUT = Group("Throughput", "per second", "From the log's own times, pauses between starts left out.")
SCORES = Group(
    "Score", "energy distance, latent units",
    "From the averaged student's 4-step samples to the guided teacher's, in latents: 0 where both are alike, lower is "
    "better. The best checkpoint is kept (`--score-every`).",
)  # fmt: skip
OTHER = Group("Other", "value", "")

GROUPS = (SCORES, LOSSES, NORMS, WEIGHTS, DIFFERENCES, COSINES, LATENTS, RATES, THROUGHPUT, OTHER)
"""In the order in which a report shows them."""

_FAMILIES = (
    (SCORES, r"^score$"),
    (NORMS, r"(^|_)norm$"),
    (WEIGHTS, r"(^|_)(weight|floored)$"),
    (DIFFERENCES, r"(^|_)(distance|delta|gap)$"),
    (COSINES, r"(^|_)cos(ine)?(_|$)"),
    (RATES, r"(^|_)(lr|rate)(_|$)"),
    (THROUGHPUT, r"(^|_)(second|seconds|per_second|per_s|samples_s|throughput|ms)$"),
    (LATENTS, r"^(x0|latent|latents)(_|$)|(^|_)(saturation|saturated)$"),
    (LOSSES, r"(^|_)loss$|^(student|fake|ca|dm|cdm|consistency|l1|colour|regulariser|reg)$"),
)

_WORDS = {
    "ca": "CA", "dm": "DM", "cdm": "CDM", "x0": "x̂0", "fake": "fake teacher", "cos": "cosine", "lr": "learning rate",
    "std": "standard deviation", "norm": "gradient norm", "delta": "Δ",
}  # fmt: skip

SHARES = ("floored", "saturated", "saturation")
"""Last words of numbers from 0 to 1, whatever their group's unit."""
_TERMS = ("student", "cdm", "dm", "ca", "fake", "")


@dataclass(frozen=True)
class Key:
    """One logged number."""

    name: str
    group: Group
    title: str
    axis: str
    """What the ordinate is, with its unit."""
    term: str
    """`student`, `fake`, `ca`, `dm`, `cdm`: whose number it is, for its colour; empty for none of them."""


def key_info(name: str) -> Key:
    """By the words of the name."""
    group = next((group for group, pattern in _FAMILIES if re.search(pattern, name)), OTHER)
    words = name.split("_")
    if group is RATES and words[0] == "lr":
        words = [*words[1:], "lr"]  # "Student learning rate", as "Student gradient norm"
    told = [_WORDS.get(word, word) for word in words if word]
    title = " ".join(told)
    if group is COSINES and len(told) == 3:
        title = f"cosine of {told[1]} and {told[2]}"
    if group is LOSSES and not title.endswith("loss"):
        title += " loss"
    title = title if title.startswith("x̂") else title[:1].upper() + title[1:]
    term = next((word for word in _TERMS if word and word in words), "")
    axis = "share of samples" if words[-1] in SHARES else group.axis
    return Key(name, group, title, axis, "" if group is COSINES else term)


def reading_order(key: Key) -> tuple[int, bool, str, int]:
    """Sorts keys by group, within it by kind (all distances, then all Δ), within that by term; shares come last."""
    words = key.name.split("_")
    kind = "" if key.group is LOSSES else " ".join(word for word in words if word != key.term)
    return GROUPS.index(key.group), words[-1] in SHARES, kind, _TERMS.index(key.term)
