"""Laws of embeddings on disk: each computed once, whatever dies, and equal to what the family encodes."""

from __future__ import annotations

import errno
import json
import logging
import os
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from engines.families.base import Family, load_family
from tests.tiny_longcat import build_tiny_longcat
from tests.tiny_sd3 import build_tiny_sd3
from training import embeddings
from training.embedding_cache import LAYOUT, EmbeddingCache
from training.embeddings import EmbeddingTable, embed_in_memory, embed_prompts
from training.encoder_key import encoder_key
from training.errors import TrainingError

TEXTS = [f"red apple {number}" for number in range(10)]
ROOT = Path(__file__).parents[2]


@pytest.fixture
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embeddings, "SHARD_ROWS", 4)


@pytest.fixture
def family(tiny_model: Path, small_shards: None) -> Family:
    return load_family(tiny_model)


@pytest.fixture
def encoded(family: Family, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Every text that the encoders read, beside the empty one (which also tells the shapes)."""
    read: list[str] = []
    encode = family.encode

    def counted(prompts: Sequence[str]):
        read.extend(prompt for prompt in prompts if prompt)
        return encode(prompts)

    monkeypatch.setattr(family, "encode", counted)
    return read


def embed(family: Family, folder: Path, texts: Sequence[str] = TEXTS, **more) -> EmbeddingTable:
    return embed_prompts(
        family, texts, EmbeddingCache.of(family.root, torch.float32, folder), batch=2, **more
    )


def require_equal(table: EmbeddingTable, family: Family, texts: Sequence[str] = TEXTS) -> None:
    expected = embed_in_memory(family, texts, torch.float32, batch=2)
    order = np.random.default_rng(0).integers(len(texts), size=16)
    for name, value in table.rows(order).items():
        torch.testing.assert_close(value, expected.rows(order)[name])
        torch.testing.assert_close(table.unconditional(3)[name], expected.unconditional(3)[name])
        assert len(table.unconditional(3)[name]) == 3


def shards(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*.safetensors"))


def litter(folder: Path) -> list[Path]:
    return [path for path in folder.rglob(".*") if path.name != ".claiming"]


def test_rows_are_what_the_family_encodes(family, tmp_path):
    require_equal(embed(family, tmp_path), family)
    assert len(shards(tmp_path)) == 3  # ten and the empty one, by four
    assert not litter(tmp_path)


def test_longcat_rows_are_what_the_family_encodes(tmp_path):
    family = load_family(build_tiny_longcat(tmp_path / "tiny"))
    require_equal(embed(family, tmp_path / "cache", TEXTS[:3]), family, TEXTS[:3])


def test_a_row_is_itself_in_the_dtype_asked_for(family, tmp_path):
    cache = EmbeddingCache.of(family.root, torch.bfloat16, tmp_path)
    rows = embed_prompts(family, TEXTS[:1], cache).rows(np.array([0, 0]))
    for name, value in family.encode(TEXTS[:1]).items():
        torch.testing.assert_close(rows[name], value.to(torch.bfloat16).expand_as(rows[name]))


def test_a_second_run_encodes_nothing_and_needs_no_encoders(family, encoded, tiny_model, tmp_path):
    embed(family, tmp_path)
    assert Counter(encoded) == Counter(TEXTS)
    embed(family, tmp_path)
    assert len(encoded) == len(TEXTS)
    without = load_family(tiny_model, only=("transformer", "vae"))
    cache = EmbeddingCache.of(tiny_model, torch.float32, tmp_path)
    assert cache.missing(TEXTS) == []
    require_equal(embed_prompts(without, TEXTS, cache), family)


def test_lists_that_overlap_share_rows(family, encoded, tmp_path):
    embed(family, tmp_path, TEXTS[:6])
    mixed = [*reversed(TEXTS[3:]), "woman"]
    require_equal(embed(family, tmp_path, mixed), load_family(family.root), mixed)
    assert Counter(encoded) == Counter([*TEXTS, "woman"])


def test_what_is_missing_is_told_and_cannot_be_had_without_encoders(tiny_model, tmp_path):
    cache = EmbeddingCache.of(tiny_model, torch.float32, tmp_path)
    assert cache.missing(["a", "b", "a"]) == ["", "a", "b"]
    family = load_family(tiny_model, only=("transformer", "vae"))
    with pytest.raises(TrainingError, match=r"2 prompts are not embedded .* encoders are not loaded"):
        embed_prompts(family, ["a"], cache)


def test_another_encoder_tokenizer_width_or_dtype_has_another_key(tiny_model, tmp_path):
    keys = [encoder_key(tiny_model, torch.float32), encoder_key(tiny_model, torch.bfloat16)]
    for part in ("text_encoder_2/model.safetensors", "tokenizer/tokenizer.json", "text_encoder/config.json"):
        folder = shutil.copytree(tiny_model, tmp_path / part)
        (folder / part).write_bytes((folder / part).read_bytes() + b" ")
        keys.append(encoder_key(folder, torch.float32))
    keys.append(encoder_key(build_tiny_sd3(tmp_path / "wide", joint_dim=80), torch.float32))
    assert len(set(keys)) == len(keys)


def test_another_transformer_or_place_has_the_same_key(tiny_model, tmp_path):
    folder = shutil.copytree(tiny_model, tmp_path / "copy")
    weights = next((folder / "transformer").glob("*.safetensors"))
    save_file({name: value + 1 for name, value in load_file(weights).items()}, weights)
    assert encoder_key(folder, torch.float32) == encoder_key(tiny_model, torch.float32)


def test_a_folder_that_is_no_teacher_is_refused(tmp_path):
    with pytest.raises(TrainingError, match="no diffusers folder of a known family"):
        encoder_key(tmp_path, torch.float32)


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-10])


def _reshape(path: Path) -> None:
    tensors = load_file(path)
    tensors["pooled_projections"] = tensors["pooled_projections"][:, :5].contiguous()
    save_file(tensors, path)


def _poison(path: Path) -> None:
    tensors = load_file(path)
    tensors["encoder_hidden_states"][1, 2, 3] = -torch.inf
    save_file(tensors, path)


def _forget_texts(path: Path) -> None:
    tensors = load_file(path)
    del tensors["texts_sha256"]
    save_file(tensors, path)


@pytest.mark.parametrize("harm", [_truncate, _reshape, _poison, _forget_texts])
def test_a_damaged_shard_is_told_and_rebuilt(family, encoded, tmp_path, caplog, harm):
    embed(family, tmp_path)
    del encoded[:]
    harm(shards(tmp_path)[1])
    with caplog.at_level(logging.WARNING):
        require_equal(embed(family, tmp_path), load_family(family.root))
    assert 3 <= len(encoded) <= 4
    assert "are embedded again" in caplog.text
    assert embed(family, tmp_path)
    assert len(encoded) <= 4


def test_a_damaged_note_of_the_layout_costs_nothing(family, encoded, tmp_path):
    embed(family, tmp_path)
    next(tmp_path.rglob(LAYOUT)).write_text('{"encoder_hidden_states": [1]}')
    require_equal(embed(family, tmp_path), load_family(family.root))
    assert len(encoded) == len(TEXTS)


def test_encoders_that_give_no_numbers_are_refused(family, tmp_path, monkeypatch):
    encode = family.encode

    def spoilt(texts: Sequence[str]):
        scale = torch.tensor([torch.nan if text == "red apple 5" else 1.0 for text in texts])
        return {
            name: value * scale.view(-1, *[1] * (value.ndim - 1)) for name, value in encode(texts).items()
        }

    monkeypatch.setattr(family, "encode", spoilt)
    with pytest.raises(TrainingError, match="NaN or infinity for 'red apple 5'"):
        embed(family, tmp_path)
    assert len(shards(tmp_path)) == 1
    assert not litter(tmp_path)


def test_a_full_disk_is_told_and_leaves_nothing_half_written(family, tmp_path, monkeypatch):
    fsync, calls = os.fsync, []

    def full(descriptor: int) -> None:
        calls.append(descriptor)
        if len(calls) == 3:  # the layout, the first shard, the second
            raise OSError(errno.ENOSPC, "No space left on device")
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(TrainingError, match=r"cannot be written .*No space left.* make room"):
        embed(family, tmp_path)
    assert len(shards(tmp_path)) == 1
    assert not litter(tmp_path)
    require_equal(embed(family, tmp_path), family)


def test_room_is_asked_for_before_anything_is_computed(family, encoded, tmp_path, monkeypatch):
    with pytest.raises(
        TrainingError, match=r"take .* GB of disk, the limit is 1e-06 GB; raise --max-embedding-gb"
    ):
        embed(family, tmp_path, limit_gb=1e-6)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    with pytest.raises(TrainingError, match=r"11 prompts take .* has 0\.0 GB free; make room"):
        embed(family, tmp_path)
    assert not encoded


def test_a_folder_that_cannot_be_made_is_told(tiny_model, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(TrainingError, match="no embeddings can be kept in"):
        EmbeddingCache.of(tiny_model, torch.float32, tmp_path / "file")


# processes


def start(
    teacher: Path, folder: Path, texts: Sequence[str], told: Path, pause: float
) -> subprocess.Popen[bytes]:
    listed = told.with_suffix(".json")
    listed.write_text(json.dumps(texts))
    command = [
        sys.executable,
        "-m",
        "tests.training.embed_worker",
        teacher,
        folder,
        listed,
        told,
        "4",
        str(pause),
    ]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(list(map(str, command)), cwd=ROOT, env=environment, stdout=subprocess.DEVNULL)


def read_by(told: Path) -> list[str]:
    return [text for text in map(json.loads, told.read_text().splitlines()) if text] if told.exists() else []


@pytest.mark.slow
def test_a_killed_run_is_taken_up_where_it_was(family, encoded, tmp_path):
    told, folder = tmp_path / "told", tmp_path / "cache"
    process = start(family.root, folder, TEXTS, told, pause=0.3)
    while len(read_by(told)) < 6 and process.poll() is None:  # in the middle of the second shard
        time.sleep(0.02)
    assert process.poll() is None
    process.kill()
    process.wait()
    kept = {
        text
        for text in TEXTS
        if text not in EmbeddingCache.of(family.root, torch.float32, folder).missing(TEXTS)
    }
    assert len(kept) == 3
    require_equal(embed(family, folder), load_family(family.root))
    assert Counter(encoded) == Counter(set(TEXTS) - kept)
    assert not litter(folder)


@pytest.mark.slow
def test_two_processes_with_overlapping_lists_build_nothing_twice(family, tmp_path):
    texts = [f"green apple {number}" for number in range(24)]
    lists = texts[:18], list(reversed(texts[6:]))
    told = [tmp_path / "first", tmp_path / "second"]
    folder = tmp_path / "cache"
    processes = [
        start(family.root, folder, some, to, pause=0.1) for some, to in zip(lists, told, strict=True)
    ]
    assert [process.wait(timeout=120) for process in processes] == [0, 0]
    assert Counter(read_by(told[0]) + read_by(told[1])) == Counter(texts)
    assert read_by(told[0])
    assert read_by(told[1])
    require_equal(embed(family, folder, texts), family, texts)


def test_a_living_claim_is_respected_and_a_dead_ones_texts_are_free(family, tmp_path):
    first, second = (EmbeddingCache.of(family.root, torch.float32, tmp_path) for _ in range(2))
    with first.claim(TEXTS, 4) as mine, second.claim(TEXTS, 20) as others:
        assert mine == TEXTS[:4]
        assert others == TEXTS[4:]
        with first.claim(TEXTS, 1) as none:
            assert none == []
    left = second.folder / ".dead.claim"
    left.write_bytes(b"0" * 32)
    with second.claim(TEXTS, 20) as free:
        assert free == TEXTS
    assert not left.exists()


def test_rows_come_in_the_order_asked_for_across_shards():
    parts = [{"a": torch.arange(3.0)[:, None] + 10 * number} for number in range(3)]
    table = EmbeddingTable(parts, [(2, 0), (0, 1), (1, 2), (0, 0)], {"a": torch.zeros(1, 1)})
    assert table.rows(np.array([3, 0, 0, 2, 1])).popitem()[1].flatten().tolist() == [0, 20, 20, 12, 1]
    assert table.rows(np.array([1, 3])).popitem()[1].flatten().tolist() == [1, 0]


def test_processes_of_one_run_all_load_or_wait(family, tmp_path):
    """Each process reads its share of the shards for damage: together they read all."""
    embed(family, tmp_path)
    _poison(shards(tmp_path)[1])
    told = [
        EmbeddingCache.of(family.root, torch.float32, tmp_path).missing(TEXTS, rank, 3) for rank in range(3)
    ]
    assert sorted(map(len, told))[:2] == [0, 0]
    assert any(told)
