"""Laws of prompt lists."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as arrow
import pytest
from pyarrow import parquet

from training.errors import TrainingError
from training.prompts import Prompts, read_prompts
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
        ("p.csv", "a", r"ends in \.txt, \.jsonl or \.parquet"),
        (
            "p.jsonl",
            '{"prompt": "a"}\n{"text": "b"}\n',
            r"p.jsonl:2: expected an object with 'prompt' or 'caption'",
        ),
        ("p.jsonl", "red apple\n", r"p.jsonl:1: expected an object"),
        ("p.jsonl", '["a"]\n', r"p.jsonl:1: expected an object"),
        ("p.jsonl", '{"prompt": 3}\n', "p.jsonl:1: the prompt is int, expected text"),
        ("p.jsonl", '{"prompt": ""}\n', "p.jsonl:1: the prompt is empty"),
        ("p.jsonl", '\n{"prompt": "a", "weight": -1}\n', "p.jsonl:2: weight -1 of 'a'"),
        ("p.jsonl", '{"prompt": "a", "weight": NaN}\n', "p.jsonl:1: weight nan of 'a'"),
        ("p.jsonl", '{"prompt": "a", "weight": "1"}\n', "p.jsonl:1: weight '1' of 'a' is no number"),
        ("p.jsonl", '{"prompt": "a", "weight": 0}\n', "every weight is 0"),
        ("p.jsonl", '{"prompt": "a \\ud83d"}\n', r"p.jsonl:1: 'a \\ud83d' is no text \(.* half of a pair"),
    ],
)
def test_a_bad_list_is_refused_by_place_and_reason(tmp_path, name, text, message):
    with pytest.raises(TrainingError, match=message):
        read_prompts(written(tmp_path, name, text))


@pytest.mark.parametrize(
    ("name", "text"), [("p.txt", "a\nb\n"), ("P.JSONL", '{"prompt": "a"}\n{"prompt": "b"}\n')]
)
def test_a_byte_order_mark_is_no_part_of_the_first_prompt(tmp_path, name, text):
    (tmp_path / name).write_bytes(text.encode("utf-8-sig"))
    assert read_prompts(tmp_path / name).texts == read_prompts(tmp_path).texts == ("a", "b")


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


def table(folder: Path, name: str, rows: int = 10**6, **columns: list[object]) -> Path:
    parquet.write_table(arrow.table(columns), folder / name, row_group_size=rows)
    return folder / name


def test_a_parquet_table_has_prompt_or_caption_and_maybe_weight(tmp_path):
    both = table(tmp_path, "a.parquet", rows=2, caption=["a", "b ", "a"], weight=[1, 2, 1], url=["", "", ""])
    assert read_prompts(both).texts == ("a", "b")
    np.testing.assert_allclose(read_prompts(both).cumulative, [0.5, 1])
    assert read_prompts(table(tmp_path, "b.parquet", prompt=["x", "y"])).texts == ("x", "y")


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"text": ["a"], "url": ["b"]}, r"t\.parquet has no column 'prompt' or 'caption', but text, url"),
        ({"prompt": ["a", "b", None]}, r"t\.parquet, row 3: the prompt is NoneType, expected text"),
        ({"prompt": ["a", "b", " "]}, r"t\.parquet, row 3: the prompt is empty"),
        ({"prompt": ["a", "b"], "weight": [1.0, -2.0]}, r"t\.parquet, row 2: weight -2\.0 of 'b'"),
        (
            {"prompt": ["a", "b"], "weight": [1.0, None]},
            r"t\.parquet, row 2: weight None of 'b' is no number",
        ),
        ({"prompt": arrow.array([], arrow.string())}, "holds no prompts"),
    ],
)
def test_a_bad_table_is_refused_by_row_and_reason(tmp_path, columns, message):
    with pytest.raises(TrainingError, match=message):
        read_prompts(table(tmp_path, "t.parquet", rows=2, **columns))


def test_a_file_that_is_no_table_is_refused(tmp_path):
    with pytest.raises(TrainingError, match=r"t\.parquet cannot be read"):
        read_prompts(written(tmp_path, "t.parquet", "red apple"))


def test_several_files_and_folders_are_one_list(tmp_path):
    (tmp_path / "parts").mkdir()
    table(tmp_path / "parts", "2.parquet", prompt=["c", "a"])
    written(tmp_path / "parts", "1.txt", "b\n")
    written(tmp_path / "parts", "readme.md", "no list")
    first = written(tmp_path, "p.jsonl", '{"prompt": "a", "weight": 2}\n')
    prompts = read_prompts([first, tmp_path / "parts"])
    assert prompts.texts == ("a", "b", "c")
    np.testing.assert_allclose(prompts.cumulative, [0.6, 0.8, 1])


def test_a_folder_without_lists_is_refused(tmp_path):
    with pytest.raises(TrainingError, match="has no prompt lists in it"):
        read_prompts(tmp_path)


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
