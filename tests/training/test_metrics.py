"""Laws of the metrics, against known values."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.linalg import sqrtm

from training.errors import TrainingError
from training.metrics import alignment, distractors, diversity, frechet_distance, standard_error


def gaussian(rng, mean, covariance, count):
    """A sample whose mean and (unbiased) covariance are exactly those given."""
    x = rng.standard_normal((count, len(mean)))
    x = x - x.mean(0)
    x = x @ np.linalg.inv(np.linalg.cholesky(np.cov(x, rowvar=False))).T
    return x @ np.linalg.cholesky(covariance).T + mean


def test_frechet_distance_of_a_shift_is_its_square():
    features = np.random.default_rng(0).standard_normal((50, 6))
    assert frechet_distance(features, features + np.array([3, 0, 0, 4, 0, 0])) == pytest.approx(25, abs=1e-6)


def test_frechet_distance_to_itself_is_zero():
    features = np.random.default_rng(0).standard_normal((40, 8)) * 100
    assert frechet_distance(features, features[::-1]) == pytest.approx(0, abs=1e-6)


def test_frechet_distance_of_independent_axes_is_the_closed_form():
    """Diagonal covariances: Σ (√a − √b)²."""
    rng = np.random.default_rng(1)
    a = gaussian(rng, np.zeros(3), np.diag([1.0, 4.0, 9.0]), 100)
    b = gaussian(rng, np.ones(3), np.diag([16.0, 4.0, 1.0]), 100)
    assert frechet_distance(a, b) == pytest.approx(3 + (1 - 4) ** 2 + 0 + (3 - 1) ** 2, abs=1e-8)


def test_frechet_distance_equals_the_matrix_root_formula_and_is_symmetric():
    rng = np.random.default_rng(2)
    a, b = rng.standard_normal((60, 5)) @ rng.standard_normal((5, 5)), rng.standard_normal((70, 5)) + 0.3
    cov_a, cov_b = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    expected = ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(cov_a + cov_b - 2 * sqrtm(cov_a @ cov_b).real)
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-9)
    assert frechet_distance(b, a) == pytest.approx(expected, rel=1e-9)


def test_frechet_distance_holds_with_fewer_pictures_than_features():
    rng = np.random.default_rng(3)
    a, b = rng.standard_normal((10, 40)).astype(np.float32), rng.standard_normal((12, 40)).astype(np.float32)
    distance = frechet_distance(a, b)
    assert np.isfinite(distance)
    assert distance > 0


def test_frechet_distance_falls_with_more_pictures_of_one_distribution():
    rng = np.random.default_rng(4)
    few = frechet_distance(rng.standard_normal((40, 16)), rng.standard_normal((40, 16)))
    many = frechet_distance(rng.standard_normal((4000, 16)), rng.standard_normal((4000, 16)))
    assert many < few / 10


def test_frechet_distance_refuses_a_single_picture():
    with pytest.raises(TrainingError, match="2 pictures or more on each side, got 5 and 1"):
        frechet_distance(np.zeros((5, 3)), np.zeros((1, 3)))


POOL = [f"name {i}" for i in range(30) for _ in range(i % 3 + 1)]


def test_distractors_have_distinct_names_and_never_the_pictures_own():
    names = POOL[::4]
    drawn = distractors(names, POOL, 20, seed=0)
    assert drawn.shape == (len(names), 20)
    for name, row in zip(names, drawn, strict=True):
        others = [POOL[position] for position in row]
        assert len(set(others)) == 20
        assert name not in others


def test_distractors_depend_on_the_seed_alone():
    names = POOL[:10]
    assert (distractors(names, POOL, 9, seed=3) == distractors(names, POOL, 9, seed=3)).all()
    assert (distractors(names, POOL, 9, seed=3) != distractors(names, POOL, 9, seed=4)).any()
    # A row does not depend on the rows after it.
    assert (distractors(names, POOL, 9, seed=3)[:4] == distractors(names[:4], POOL, 9, seed=3)).all()


def test_distractors_use_every_name_and_every_caption_of_it():
    drawn = distractors(["name 0"] * 400, POOL, 5, seed=0)
    assert set(drawn.ravel()) == {position for position, name in enumerate(POOL) if name != "name 0"}


def test_too_few_names_for_the_distractors_is_refused_with_the_limit():
    with pytest.raises(
        TrainingError, match="need 41 names, the data has 30; lower the number of choices to 30"
    ):
        distractors(["name 0"], POOL, 40, seed=0)


def test_alignment_counts_pictures_nearest_to_their_own_caption_and_a_tie_as_a_miss():
    image = np.eye(3)
    caption = np.array([[1.0, 0, 0], [0, 0.4, 0], [0, 0, 0.5]])
    other = np.array([[[0.9, 0, 0], [0, 1, 0]], [[0, 0.5, 0], [0, 0, 0]], [[0, 0, 0.5], [0, 0, 0]]])
    assert alignment(image, caption, other).tolist() == [True, False, False]


def test_standard_error_is_the_binomial_one():
    assert standard_error(np.array([True] * 80 + [False] * 20)) == pytest.approx(0.04)


def test_diversity_is_the_mean_pairwise_distance_in_units_of_independent_pictures():
    features = np.zeros((2, 3, 2))
    features[0, :, 0] = [0, 3, 4]  # distances 3, 4, 1
    assert diversity(features) == pytest.approx((8 / 3 + 0) / 2 / 2)
    independent = np.random.default_rng(0).standard_normal((50, 4, 200))
    assert diversity(independent) == pytest.approx(1, abs=0.01)


def test_equal_pictures_have_no_diversity_and_one_seed_is_refused():
    assert diversity(np.ones((4, 3, 5))) == 0
    with pytest.raises(TrainingError, match="2 or more, got 1"):
        diversity(np.ones((4, 1, 5)))
