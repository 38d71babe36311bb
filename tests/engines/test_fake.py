"""Laws of the fake engine: deterministic, batch-invariant, honest about schedules, failing only when told to."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from engines.base import EngineOptions, load_engine
from engines.bundle import Bundle
from engines.errors import ExecutionError
from engines.fake import FakeEngine, fake_bundle
from engines.noise import noise


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return fake_bundle(tmp_path_factory.mktemp("fake"))


@pytest.fixture
def engine(bundle: Bundle) -> FakeEngine:
    return FakeEngine(bundle, EngineOptions(max_batch=4))


def draw(
    engine: FakeEngine, prompt: str, seed: int, steps: int, size: tuple[int, int] = (16, 16)
) -> NDArray[np.uint8]:
    conditioning = engine.encode([engine.tokenize(prompt)])
    x = [engine.put(noise(seed, (4, *size)))]
    for sigma, sigma_next in pairwise(engine.manifest.sigmas(steps)):
        x, _ = engine.denoise(x, [sigma], [sigma_next], conditioning)
    picture: NDArray[np.uint8] = engine.decode(x)[0]
    return picture


def test_picture_is_uint8_rgb_of_the_asked_size(engine: FakeEngine) -> None:
    picture = draw(engine, "red apple", 7, 4, size=(8, 16))
    assert picture.shape == (64, 128, 3)
    assert picture.dtype == np.uint8
    assert picture.std() > 5


def test_prompt_seed_and_steps_each_change_the_picture(engine: FakeEngine) -> None:
    pictures = [
        draw(engine, "red apple", 7, 4),
        draw(engine, "blue car", 7, 4),
        draw(engine, "red apple", 8, 4),
        draw(engine, "red apple", 7, 1),
    ]
    assert len({picture.tobytes() for picture in pictures}) == 4


def test_same_row_alone_or_batched_at_another_sigma_is_byte_equal(engine: FakeEngine) -> None:
    codes = engine.encode([engine.tokenize(prompt) for prompt in ("red apple", "blue car", "cat")])
    samples = [engine.put(noise(seed, (4, 8, 8))) for seed in (1, 2, 3)]
    together, _ = engine.denoise(samples, [1.0, 0.5, 0.25], [0.5, 0.25, 0.0], codes)
    alone, _ = engine.denoise(samples[1:2], [0.5], [0.25], codes[1:2])
    assert together[1].tobytes() == alone[0].tobytes()
    assert engine.decode(together)[1].tobytes() == engine.decode(alone)[0].tobytes()


def test_step_to_sigma_zero_lands_on_the_preview(engine: FakeEngine) -> None:
    codes = engine.encode([engine.tokenize("cat")])
    x, x0 = engine.denoise([engine.put(noise(1, (4, 8, 8)))], [0.75], [0.0], codes)
    np.testing.assert_allclose(x[0], x0[0], atol=1e-5)


def test_ids_have_the_manifests_length_whatever_the_prompt(engine: FakeEngine) -> None:
    for prompt in ("", "cat", "word " * 200, "\u0000 😀 \U0010ffff"):
        assert [len(ids) for ids in engine.tokenize(prompt)] == [77]
    assert engine.tokenize("Red  Apple") == engine.tokenize("red apple")


def test_told_failure_hits_that_call_and_no_other(engine: FakeEngine) -> None:
    engine.fail("encode", after=1)
    ids = [engine.tokenize("cat")]
    engine.encode(ids)
    with pytest.raises(ExecutionError, match="encode call 2"):
        engine.encode(ids)
    engine.encode(ids)


def test_cost_is_slept_per_call_and_batch(bundle: Bundle) -> None:
    slept: list[float] = []
    engine = FakeEngine(bundle, EngineOptions(), cost=lambda _, batch: float(batch), sleep=slept.append)
    engine.encode([engine.tokenize("a"), engine.tokenize("b")])
    engine.decode([noise(1, (4, 8, 8))])
    assert slept == [2.0, 1.0]
    assert list(engine.calls) == [("encode", 2), ("decode", 1)]


def test_registry_loads_it_by_name(bundle: Bundle) -> None:
    engine = load_engine(bundle, EngineOptions(runtime="fake", max_batch=3))
    assert isinstance(engine, FakeEngine)
    assert engine.info.max_batch == 3


def test_manifest_options_reach_the_bundle(tmp_path: Path) -> None:
    bundle = fake_bundle(tmp_path, sizes=[(64, 32)], steps=[2], default_steps=2)
    assert bundle.manifest.schedules.keys() == {2}
    assert (bundle.manifest.default_size.width, bundle.manifest.default_size.height) == (64, 32)
