"""Laws of prompt lists and of their embeddings."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from engines.families.base import load_family
from training.errors import TrainingError
from training.prompts import Prompts, embed_prompts, read_prompts
from training.recipes import emoji_prompts


def written(folder: Path, name: str, text: str) -> Path:
    (folder / name).write_text(text, encoding="utf-8")
    return folder / name


def test_a_text_file_holds_one_prompt_a_line_and_repeats_count(tmp_path):
    prompts = read_prompts(written(tmp_path, "p.txt", "red apple\n\n  flag of japan \nred apple\n"))
    assert prompts.texts == ("red apple", "flag of japan")
    np.testing.assert_allclose(prompts.cumulative, [2 / 3, 1])


def test_json_lines_take_prompt_or_caption_and_a_weight(tmp_path):
    lines = '{"prompt": "a", "weight": 3, "other": 1}\n{"caption": "b"}\n'
    prompts = read_prompts(written(tmp_path, "p.jsonl", lines))
    assert prompts.texts == ("a", "b")
    np.testing.assert_allclose(prompts.cumulative, [0.75, 1])


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("p.txt", "\n\n", "holds no prompts"),
        ("p.csv", "a", r"ends in .txt or .jsonl"),
        (
            "p.jsonl",
            '{"prompt": "a"}\n{"text": "b"}\n',
            r"p.jsonl:2: expected an object with 'prompt' or 'caption'",
        ),
        ("p.jsonl", "red apple\n", r"p.jsonl:1: expected an object"),
        ("p.jsonl", '["a"]\n', r"p.jsonl:1: expected an object"),
        ("p.jsonl", '{"prompt": 3}\n', "the prompt is int, expected text"),
        ("p.jsonl", '{"prompt": "a", "weight": -1}\n', "weight -1.0 of 'a'"),
        ("p.jsonl", '{"prompt": "a", "weight": 0}\n', "every weight is 0"),
    ],
)
def test_a_bad_list_is_refused_by_place_and_reason(tmp_path, name, text, message):
    with pytest.raises(TrainingError, match=message):
        read_prompts(written(tmp_path, name, text))


def test_a_missing_list_is_named(tmp_path):
    with pytest.raises(TrainingError, match=r"none\.txt cannot be read"):
        read_prompts(tmp_path / "none.txt")


def test_prompts_are_drawn_by_weight():
    prompts = Prompts.of([("a", 1.0), ("never", 0.0), ("b", 3.0)], "test")
    drawn = np.bincount(prompts.draw(np.random.default_rng(0), 8000), minlength=3) / 8000
    np.testing.assert_allclose(drawn, [0.25, 0, 0.75], atol=0.02)


def test_another_list_or_weighting_has_another_hash():
    lists = [[("a", 1.0), ("b", 1.0)], [("a", 1.0), ("b", 2.0)], [("a", 1.0), ("c", 1.0)]]
    assert len({Prompts.of(pairs, "test").sha256() for pairs in lists}) == 3
    assert Prompts.of(lists[0], "x").sha256() == Prompts.of(lists[0], "y").sha256()


def test_the_table_holds_what_the_family_encodes(tiny_model):
    family = load_family(tiny_model)
    texts = [f"apple {number}" for number in range(5)]
    table = embed_prompts(family, texts, torch.float32, batch=2)
    expected, empty = family.encode(texts[3:]), family.encode([""])
    for name, value in table.rows(np.array([3, 4])).items():
        torch.testing.assert_close(value, expected[name])
    for name, value in table.unconditional(3).items():
        assert len(value) == 3
        torch.testing.assert_close(value[2:], empty[name])


def test_embeddings_that_do_not_fit_are_refused_before_they_are_computed(tiny_model):
    with pytest.raises(TrainingError, match=r"take .* GB, the limit is 1e-06 GB; raise --max-embedding-gb"):
        embed_prompts(load_family(tiny_model), ["a", "b"], torch.float32, limit_gb=1e-6)


def test_emoji_prompts_are_captions_of_the_training_split_with_even_concepts(tiny_data):
    from training.emoji.dataset import EmojiDataset, caption

    data = EmojiDataset.load(tiny_data)
    prompts = emoji_prompts(tiny_data)
    train, held = (
        {caption(record) for record in data.records if (record.split == "train") == wanted}
        for wanted in (True, False)
    )
    assert train & set(prompts.texts)
    assert not (held - train) & set(prompts.texts)
    assert emoji_prompts(tiny_data).sha256() == prompts.sha256()


def test_a_folder_without_a_dataset_is_refused(tmp_path):
    with pytest.raises(TrainingError, match=r"dataset\.json"):
        emoji_prompts(tmp_path)
