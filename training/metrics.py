"""The measures of a generator, as pure functions of feature arrays. Numpy only; no model, no files, no clock.

    frechet_distance(features_of_pictures, features_of_real_pictures)
    alignment(embedding, caption_embedding, distractor_embedding).mean()
    diversity(features_PSD)

N, M pictures; D feature width, E embedding width, K distractors, P prompts, S seeds.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from training.errors import TrainingError

Floats = NDArray[np.floating[Any]]


def frechet_distance(a_ND: Floats, b_MD: Floats) -> float:
    """Fréchet distance between Gaussians fitted to two feature sets (Heusel et al. 2017, equation 6), in float64.

        |μa − μb|² + tr(Σa + Σb − 2·(Σa·Σb)^½)

    Biased: it falls as N and M grow (about as 1/N), so only rows with the same N and M may be compared, and the
    distance between two sets of real pictures is its floor, not 0.

    Raises:
        TrainingError: fewer than two pictures on a side.
    """
    if min(len(a_ND), len(b_MD)) < 2:
        raise TrainingError(
            f"a Fréchet distance needs 2 pictures or more on each side, got {len(a_ND)} and {len(b_MD)}"
        )
    a, b = np.asarray(a_ND, np.float64), np.asarray(b_MD, np.float64)
    mean = a.mean(0) - b.mean(0)
    covariance_a, covariance_b = (
        np.atleast_2d(np.cov(a, rowvar=False)),
        np.atleast_2d(np.cov(b, rowvar=False)),
    )
    # tr (Σa·Σb)^½ = tr (Σa^½·Σb·Σa^½)^½: the latter is symmetric, so that its roots are real even where Σ is singular.
    root = _symmetric_root(covariance_a)
    values = np.linalg.eigvalsh(root @ covariance_b @ root)
    cross = np.sqrt(np.clip(values, 0, None)).sum()
    return float(mean @ mean + np.trace(covariance_a) + np.trace(covariance_b) - 2 * cross)


def _symmetric_root(matrix: NDArray[np.float64]) -> NDArray[np.float64]:
    values, vectors = np.linalg.eigh(matrix)
    root: NDArray[np.float64] = (vectors * np.sqrt(np.clip(values, 0, None))) @ vectors.T
    return root


def distractors(names: Sequence[str], pool: Sequence[str], count: int, seed: int) -> NDArray[np.int64]:
    """For each of `names`, `count` positions in `pool` (names of captions): distinct names, none the picture's own.

    Drawn uniformly over distinct names, then over a name's captions; row i depends on `(seed, i)` and the pool alone.

    Raises:
        TrainingError: the pool has too few distinct names.
    """
    positions: dict[str, list[int]] = {}
    for position, name in enumerate(pool):
        positions.setdefault(name, []).append(position)
    distinct = list(positions)
    if len(distinct) < count + 1:
        raise TrainingError(
            f"{count} distractors with names of their own need {count + 1} names, the data has {len(distinct)}; "
            f"lower the number of choices to {len(distinct)} or fewer"
        )
    drawn = np.empty((len(names), count), np.int64)
    for row, name in enumerate(names):
        rng = np.random.default_rng([seed, row])
        # One more than needed, so that the picture's own name can be left out.
        others = [
            distinct[i] for i in rng.choice(len(distinct), count + 1, replace=False) if distinct[i] != name
        ]
        drawn[row] = [positions[other][rng.integers(len(positions[other]))] for other in others[:count]]
    return drawn


def alignment(image_NE: Floats, caption_NE: Floats, distractor_NKE: Floats) -> NDArray[np.bool_]:
    """Whether each picture is nearer to its own caption than to every distractor; a tie counts as a miss.

    Its mean is the top-1 accuracy among K + 1 captions.
    """
    own = np.einsum("ne,ne->n", image_NE, caption_NE)
    others = np.einsum("ne,nke->nk", image_NE, distractor_NKE)
    hit: NDArray[np.bool_] = own > others.max(axis=1)
    return hit


def standard_error(hits: NDArray[np.bool_]) -> float:
    """Of the mean of independent hits."""
    share = float(hits.mean())
    return math.sqrt(share * (1 - share) / len(hits))


def diversity(features_PSD: Floats) -> float:
    """Mean Euclidean distance between pictures of one prompt at different seeds, averaged over prompts.

    Divided by √(2·D): two independent pictures with standardised features are at about 1.

    Raises:
        TrainingError: fewer than two seeds.
    """
    _, seeds, width = features_PSD.shape
    if seeds < 2:
        raise TrainingError(f"diversity compares seeds of one prompt and needs 2 or more, got {seeds}")
    features = np.asarray(features_PSD, np.float64)
    first, second = np.triu_indices(seeds, k=1)
    distances = np.linalg.norm(features[:, first] - features[:, second], axis=-1)
    return float(distances.mean() / math.sqrt(2 * width))
