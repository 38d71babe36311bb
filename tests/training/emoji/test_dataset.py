from __future__ import annotations

from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import pytest

from tests.training.emoji.fake_packages import SET_NAMES, install
from training.emoji.build import EmojiDataSettings, build
from training.emoji.dataset import EmojiDataset, Record, caption
from training.emoji.fetch import DataError

pytest.importorskip("resvg_py")
ROCKET = Record(
    0, "noto", "noto", "rocket", "rocket", "rocket", {}, ("space", "launch", "fast"), "MIT", "nobody", "train"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data")
    with pytest.MonkeyPatch.context() as patch:
        install(path / "cache", patch)
        settings = EmojiDataSettings(out=path / "emoji", cache=path / "cache", sets=SET_NAMES, size=16)
        return build(settings)


def test_splits_cover_every_picture_once(folder: Path) -> None:
    data = EmojiDataset.load(folder)
    rows = [data.indices(split) for split in ("train", "heldout_pair", "heldout_combination")]
    assert sorted(np.concatenate(rows)) == list(range(len(data.records)))
    with pytest.raises(DataError, match="is not one of train"):
        data.indices("test")  # type: ignore[arg-type]


def test_weights_are_even_over_concepts_then_names_then_styles(folder: Path) -> None:
    data = EmojiDataset.load(folder)
    rows = data.indices("train")
    weights = data.concept_weights(rows)
    assert weights.sum() == pytest.approx(1.0)
    concepts: defaultdict[str, float] = defaultdict(float)
    names: defaultdict[tuple[str, str], float] = defaultdict(float)
    for row, weight in zip(rows, weights, strict=True):
        record = data.records[row]
        concepts[record.concept] += weight
        names[record.concept, record.name] += weight
    assert len(concepts) > 3
    assert np.allclose(list(concepts.values()), 1 / len(concepts))
    per_concept = Counter(concept for concept, _ in names)
    for (concept, _), weight in names.items():
        assert weight == pytest.approx(1 / len(concepts) / per_concept[concept])


def test_caption_without_a_generator_is_canonical() -> None:
    assert caption(ROCKET) == "noto rocket"
    assert EmojiDataset.caption(ROCKET) == "noto rocket"


def test_captions_vary_as_often_as_promised() -> None:
    rng = np.random.default_rng(0)
    seen = Counter(caption(ROCKET, rng) for _ in range(4000))
    assert seen["noto rocket"] / 4000 == pytest.approx(0.70, abs=0.03)
    assert seen["rocket"] / 4000 == pytest.approx(0.15, abs=0.03)
    with_keyword = sum(seen[f"noto rocket {word}"] for word in ROCKET.keywords)
    assert with_keyword / 4000 == pytest.approx(0.10, abs=0.02)
    for words in (set(text.split()) for text in seen):
        assert words <= {"noto", "rocket", *ROCKET.keywords}


def test_same_generator_same_captions() -> None:
    one, two = np.random.default_rng(7), np.random.default_rng(7)
    assert [caption(ROCKET, one) for _ in range(50)] == [caption(ROCKET, two) for _ in range(50)]


def test_a_missing_or_torn_folder_says_what_to_do(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no readable dataset\.json.*build the data set first"):
        EmojiDataset.load(tmp_path)
    for name in ("dataset.json", "records.jsonl"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    with pytest.raises(DataError, match="cannot read the data set"):
        EmojiDataset.load(tmp_path)
    np.save(tmp_path / "images.npy", np.zeros((1, 16, 16, 3), np.uint8))
    with pytest.raises(DataError, match=r"images\.npy is uint8 \(1, 16, 16, 3\), expected"):
        EmojiDataset.load(tmp_path)
    (tmp_path / "dataset.json").write_text('{"format_version": 99}')
    with pytest.raises(DataError, match="format version 99, expected 1"):
        EmojiDataset.load(tmp_path)
