"""Which pictures and captions an evaluation uses: chosen once, by seed, and the same for every model that is measured.

Half of the prompts are captions of training pictures (drawn evenly over concepts), half of held-out ones (evenly over
pictures). The reference of the Fréchet distance is drawn in the same way and by the same halves, and shares no
picture with the prompts: a model that copied its prompts' pictures would still be measured against others.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from training import metrics
from training.emoji.dataset import EmojiDataset
from training.emoji.splits import SPLITS, Split
from training.errors import TrainingError
from training.evaluator import Evaluator, Seen

SEEN_SPLIT: Split = "train"


@dataclass(frozen=True)
class EvalSet:
    """Rows of a dataset: P prompts (seen ones first) with K distractor captions each, and R reference pictures."""

    data: EmojiDataset
    prompts_P: NDArray[np.int64]
    reference_R: NDArray[np.int64]
    distractors_PK: NDArray[np.int64]
    seed: int

    @property
    def captions(self) -> list[str]:
        """Canonical caption of each prompt."""
        return [self.data.caption(self.data.records[row]) for row in self.prompts_P]

    @property
    def groups(self) -> dict[str, NDArray[np.bool_]]:
        """`seen`, `heldout` and each held-out split apart: masks over the prompts."""
        splits = np.array([self.data.records[row].split for row in self.prompts_P])
        groups = {"seen": splits == SEEN_SPLIT, "heldout": splits != SEEN_SPLIT}
        return {
            **groups,
            **{name: splits == name for name in SPLITS if name != SEEN_SPLIT and (splits == name).any()},
        }

    @property
    def reference_groups(self) -> dict[str, NDArray[np.bool_]]:
        """`seen` and `heldout`: masks over the reference."""
        splits = np.array([self.data.records[row].split for row in self.reference_R])
        return {"seen": splits == SEEN_SPLIT, "heldout": splits != SEEN_SPLIT}

    @property
    def seeds(self) -> list[int]:
        """One seed per prompt: the same starting noise for every model and step count."""
        return [self.seed * 1_000_003 + position for position in range(len(self.prompts_P))]


def choose(data: EmojiDataset, count: int, choices: int, seed: int) -> EvalSet:
    """`count` prompts, as many reference pictures from what is left, and `choices` − 1 distractors per prompt.

    Raises:
        TrainingError: the dataset is too small for `count` or `choices`.
    """
    rng = np.random.default_rng([seed, count])
    seen = np.asarray(data.indices(SEEN_SPLIT))
    heldout = np.concatenate([np.asarray(data.indices(name)) for name in SPLITS if name != SEEN_SPLIT])
    half = count // 2
    limit = 2 * min(len(seen) // 2, len(heldout) - 1)
    if not 4 <= count <= limit:
        raise TrainingError(
            f"--count={count}: half of it are held-out captions, of which the data has {len(heldout)}, and some must "
            f"be left for the Fréchet reference; take 4 to {limit}"
        )
    held = rng.permutation(heldout)
    trained = rng.choice(seen, size=2 * half, replace=False, p=data.concept_weights(seen))
    prompts = np.concatenate([trained[:half], held[:half]])
    # As many trained pictures as held-out ones, so that prompts and reference have the same mixture.
    left = min(half, len(heldout) - half)
    reference = np.concatenate([trained[half : half + left], held[half : half + left]])
    names = [record.name for record in data.records]
    drawn = metrics.distractors([names[row] for row in prompts], names, choices - 1, seed)
    return EvalSet(data, prompts, reference, drawn, seed)


class Scorer:
    """An evaluator with everything about the evaluation set computed once."""

    def __init__(self, evaluator: Evaluator, chosen: EvalSet) -> None:
        self.evaluator, self.chosen = evaluator, chosen
        records = chosen.data.records
        wanted = np.unique(np.concatenate([chosen.prompts_P, chosen.distractors_PK.ravel()]))
        embedding = evaluator.texts([chosen.data.caption(records[row]) for row in wanted])
        self._caption_PE = embedding[np.searchsorted(wanted, chosen.prompts_P)]
        self._distractor_PKE = embedding[np.searchsorted(wanted, chosen.distractors_PK)]
        self._reference = evaluator.images(pictures(chosen.data, chosen.reference_R)).features

    def score(self, pictures_PHWC: NDArray[np.uint8]) -> dict[str, Any]:
        """Alignment with standard error, and Fréchet distance, of one picture per prompt; per group of prompts.

        `overall` is over all prompts and against the whole reference; `seen` and `heldout` against their half of it.
        """
        seen = self.evaluator.images(pictures_PHWC)
        hits = self.hits(seen)
        groups = {"overall": np.ones(len(hits), bool), **self.chosen.groups}
        against = {"overall": np.ones(len(self._reference), bool), **self.chosen.reference_groups}
        scores: dict[str, Any] = {}
        for name, mask in groups.items():
            scores[name] = {
                "pictures": int(mask.sum()),
                "alignment": float(hits[mask].mean()),
                "alignment_error": metrics.standard_error(hits[mask]),
            }
            if name in against:
                scores[name]["frechet"] = metrics.frechet_distance(
                    seen.features[mask], self._reference[against[name]]
                )
        return scores

    def hits(self, seen: Seen) -> NDArray[np.bool_]:
        """Whether each prompt's picture is recognised among the choices `(P,)`."""
        return metrics.alignment(seen.embedding, self._caption_PE, self._distractor_PKE)

    def diversity(self, pictures_NHWC: NDArray[np.uint8], seeds: int) -> float:
        """Of N pictures, `seeds` of each prompt in turn."""
        features = self.evaluator.images(pictures_NHWC).features
        return metrics.diversity(features.reshape(-1, seeds, features.shape[-1]))


def pictures(data: EmojiDataset, rows: Sequence[int] | NDArray[np.int64]) -> NDArray[np.uint8]:
    """Real pictures `(len(rows), H, W, 3)`, in the order of `rows`."""
    return np.stack([data.images[int(row)] for row in rows])


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Markdown: one line per measured row."""
    lines = [
        "| pictures | NFE | alignment, seen | held out | Fréchet, all | seen | held out | diversity | s/picture |",
        "|---|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for row in rows:
        scores = row["scores"]
        percent = [
            f"{scores[g]['alignment']:.1%} ± {scores[g]['alignment_error']:.1%}" for g in ("seen", "heldout")
        ]
        distances = [f"{scores[group]['frechet']:.2f}" for group in ("overall", "seen", "heldout")]
        optional = [
            "" if row.get(key) is None else f"{row[key]:{form}}"
            for key, form in (("diversity", ".3f"), ("seconds_per_picture", ".3f"))
        ]
        nfe = "" if row.get("nfe") is None else str(row["nfe"])
        lines.append("| " + " | ".join([row["name"], nfe, *percent, *distances, *optional]) + " |")
    return "\n".join(lines)
