"""Laws of the evaluator and of its training."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from training import checkpoint
from training.draws import generator
from training.emoji import evaluator as recipe
from training.emoji.augment import augment
from training.emoji.dataset import EmojiDataset
from training.emoji.evaluator import (
    EvaluatorSettings,
    build_tokenizer,
    contrastive_loss,
    draw_rows,
    train,
)
from training.emoji.splits import SPLITS
from training.errors import TrainingError
from training.evaluator import ASSETS, Evaluator, EvaluatorConfig, TextTower, token_ids


@pytest.fixture(scope="module")
def data(tiny_data: Path) -> EmojiDataset:
    return EmojiDataset.load(tiny_data)


@pytest.fixture(scope="module")
def evaluator(tiny_evaluator: Path) -> Evaluator:
    return Evaluator.load(tiny_evaluator)


def test_training_teaches_which_caption_a_picture_has(evaluator, data):
    rows = data.indices("train")
    images = evaluator.images(data.images[rows]).embedding
    texts = evaluator.texts([data.caption(data.records[row]) for row in rows])
    right = ((images @ texts.T).argmax(1) == np.arange(len(rows))).mean()
    assert right > 0.25, f"{right:.0%} right; chance is {1 / len(rows):.0%}"


def test_the_folder_says_how_real_pictures_of_every_split_score(tiny_evaluator):
    document = json.loads((tiny_evaluator / "evaluator.json").read_text())
    assert set(document["top1"]) == {"train", "heldout_pair", "heldout_combination"}
    assert document["top1_among"] == 16
    assert document["top1"]["train"] > 3 / 16


def test_training_never_sees_a_held_out_picture(tiny_data, data, tmp_path, monkeypatch):
    drawn = []
    original = recipe.draw_rows

    def recorded(*args):
        rows = original(*args)
        drawn.extend(rows.tolist())
        return rows

    monkeypatch.setattr(recipe, "draw_rows", recorded)
    train(EvaluatorSettings(data=tiny_data, out=tmp_path / "run", steps=8, batch=10))
    assert {data.records[row].split for row in drawn} == {"train"}


def test_the_tokenizer_learns_from_training_captions_alone(data, tmp_path):
    settings = EvaluatorSettings(out=tmp_path, batch=4)
    held_out = {
        word for row in data.indices("heldout_combination") for word in data.records[row].name.split()
    }
    trained = {word for row in data.indices("train") for word in data.records[row].name.split()}
    assert held_out <= trained  # combinations are new, words are not
    vocabulary = recipe.build_evaluator(settings, data, EvaluatorConfig()).tokenizer.get_vocab()
    assert {f"{word}</w>" for word in trained} <= set(vocabulary)


def test_no_two_pictures_of_a_batch_share_a_name(data):
    rows = np.asarray(data.indices("train"))
    settings = EvaluatorSettings(batch=12, by_picture=0.5)
    for seed in range(20):
        drawn = draw_rows(data, rows, data.concept_weights(rows), settings, np.random.default_rng(seed))
        assert len({data.records[row].name for row in drawn}) == 12


def test_a_batch_larger_than_the_number_of_names_is_refused(data):
    rows = np.asarray(data.indices("train"))
    with pytest.raises(TrainingError, match=r"--batch=40 needs as many names, .* trains on 14; lower it"):
        draw_rows(
            data, rows, data.concept_weights(rows), EvaluatorSettings(batch=40), np.random.default_rng(0)
        )


def test_contrastive_loss_of_uninformative_embeddings_is_log_batch_and_of_perfect_ones_is_near_zero():
    same = torch.ones(8, 4) / 2
    assert float(contrastive_loss(same, same, torch.tensor(2.0))) == pytest.approx(math.log(8), abs=1e-5)
    assert float(contrastive_loss(torch.eye(8), torch.eye(8), torch.tensor(math.log(100.0)))) < 1e-6
    swapped = torch.eye(8)[[1, 0, 2, 3, 4, 5, 6, 7]]
    # Two of eight rows have their 20-fold similarity at the wrong caption.
    assert float(contrastive_loss(torch.eye(8), swapped, torch.tensor(math.log(20.0)))) == pytest.approx(
        5, abs=1e-3
    )


def test_the_inverse_temperature_is_kept_at_100():
    a, b = torch.eye(4), torch.eye(4).roll(1, 0)
    at_limit = contrastive_loss(a, b, torch.tensor(math.log(100.0)))
    assert torch.equal(contrastive_loss(a, b, torch.tensor(9.0)), at_limit)


def test_resumed_training_equals_uninterrupted_training(tiny_data, tmp_path):
    settings = {"data": tiny_data, "batch": 8, "steps": 4}
    train(EvaluatorSettings(out=tmp_path / "whole", **settings))
    stopped = EvaluatorSettings(out=tmp_path / "parts", **settings)

    class Killed(Exception):
        pass

    original = recipe.contrastive_loss
    calls = []

    def counted(*args):
        calls.append(1)
        if len(calls) == 3:
            raise Killed
        return original(*args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(recipe, "contrastive_loss", counted)
        # Save after every step, so that the two finished ones are kept: much longer after a save than it took.
        patch.setattr("training.run.time.monotonic", (100.0**turn for turn in range(1, 100)).__next__)
        with pytest.raises(Killed):
            train(stopped)
    assert checkpoint.latest(stopped.out / "checkpoints").step == 2
    train(stopped)
    for name in ("evaluator.safetensors", "tokenizer.json", "evaluator.json"):
        assert (tmp_path / "whole/model" / name).read_bytes() == (stopped.out / "model" / name).read_bytes()


def test_a_saved_evaluator_sees_what_it_saw_before(evaluator, data, tmp_path):
    evaluator.save(tmp_path)
    again = Evaluator.load(tmp_path)
    captions = ["solid red circle", "outline blue bar"]
    # Weights on disk are float16: the loaded ones already are.
    assert np.array_equal(again.texts(captions), evaluator.texts(captions))
    assert np.array_equal(again.images(data.images[:4]).features, evaluator.images(data.images[:4]).features)
    assert again.info == evaluator.info


def test_a_picture_and_a_caption_are_seen_alike_alone_or_in_a_batch(evaluator, data):
    whole = evaluator.images(data.images[:6])
    alone = np.concatenate([evaluator.images(data.images[i : i + 1]).features for i in range(6)])
    assert np.allclose(whole.features, alone, atol=1e-4)
    captions = ["red", "solid green square geometry circle", "qqq ???", ""]
    assert np.allclose(evaluator.texts(captions)[2:3], evaluator.texts(captions[2:3]), atol=1e-5)
    assert np.isfinite(evaluator.texts(captions)).all()
    assert np.allclose(np.linalg.norm(whole.embedding, axis=1), 1, atol=1e-5)


def test_features_of_real_training_pictures_are_standardised(evaluator, data):
    features = evaluator.images(data.images[data.indices("train")]).features
    assert np.abs(features.mean(0)).max() < 0.3
    assert np.median(features.std(0)) == pytest.approx(1, abs=0.15)


def test_padding_changes_no_text_embedding():
    torch.manual_seed(0)
    tower = TextTower(EvaluatorConfig(vocabulary=50)).eval()
    short = torch.tensor([[3, 4, 5]])
    padded = torch.tensor([[3, 4, 5, 0, 0, 0]])
    assert torch.allclose(tower(short), tower(padded), atol=1e-6)
    assert not torch.allclose(tower(short), tower(torch.tensor([[5, 4, 3]])), atol=1e-3)


def test_captions_are_cut_and_padded_to_one_length():
    tokenizer = build_tokenizer(["red circle", "blue square"], 60)
    ids = token_ids(tokenizer, ["red circle", "red " * 30, ""], 5)
    assert ids.shape == (3, 5)
    assert (ids[0, :2] > 0).all()
    assert (ids[0, 2:] == 0).all()
    assert (ids[1] == ids[0, 0]).all()
    assert (ids[2] == 0).all()


def test_augmentation_moves_and_blurs_but_keeps_white_backgrounds_and_never_mirrors():
    picture = np.full((64, 64, 64, 3), 255, np.uint8)
    picture[:, 24:40, 8:24] = (200, 0, 0)  # left of the middle
    x = augment(picture, 64, np.random.default_rng(0), generator(0, 0, 0))
    assert x.shape == (64, 3, 64, 64)
    redness = (x[:, 0] - x[:, 1]).clamp(min=0.3) - 0.3
    columns = (redness.sum(1) * torch.arange(64)).sum(1) / redness.sum((1, 2))
    assert (columns < 30).all()
    assert columns.std() > 1
    assert float(x[:, :, :4, 40:].mean()) == pytest.approx(1, abs=0.05)


def test_a_folder_without_an_evaluator_is_refused_with_the_remedy(tmp_path):
    with pytest.raises(TrainingError, match=r"no readable evaluator .*cdm-train emoji-evaluator"):
        Evaluator.load(tmp_path)


def test_another_format_version_is_refused(tiny_evaluator, tmp_path):
    document = json.loads((tiny_evaluator / "evaluator.json").read_text())
    (tmp_path / "evaluator.json").write_text(json.dumps({**document, "format_version": 99}))
    with pytest.raises(TrainingError, match="format 99, this version reads 1"):
        Evaluator.load(tmp_path)


def test_the_evaluator_that_ships_tells_styles_and_words_apart():
    evaluator = Evaluator.load(ASSETS)
    captions = ["noto red apple", "red apple noto", "noto green apple", "twemoji rocket"]
    similar = evaluator.texts(captions) @ evaluator.texts(captions).T
    # Order of words matters least, one word more, everything most.
    assert similar[0, 1] > similar[0, 2] > similar[0, 3]
    assert set(evaluator.info["top1"]) == set(SPLITS)
