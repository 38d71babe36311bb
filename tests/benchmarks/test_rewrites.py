"""`cdm-bench rewrites`: a family's rewrites one by one, on real classes; what is kept, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.main import main
from benchmarks.random_longcat import (
    FLOAT32_BYTES,
    HEADS,
    TINY_TEXT,
    blocks,
    build_random_longcat,
    most_heads,
)
from engines.bundle import load_bundle
from engines.families.base import load_family


@pytest.fixture(scope="module")
def longcat(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("longcat") / "narrow"
    return build_random_longcat(folder, 2, heads=1, text=TINY_TEXT, vae_channels=(8, 8, 16, 16))


def line(capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    document: dict[str, Any] = json.loads(capsys.readouterr().out.splitlines()[-1])
    return document


@pytest.mark.slow
def test_rewrites_are_timed_on_and_off_and_kept_for_the_next_run(
    longcat: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["rewrites", "--model", str(longcat), "--size", "64x64", "--rounds", "2", "--threads", "1"]
    arguments += ["--work", str(tmp_path), "--rewrites", "rotate_half,qkv"]
    assert main([*arguments, "--batches", "1,2"]) == 0
    document = line(capsys)
    assert (document["benchmark"], document["bundle"], document["family"]) == ("rewrites", "narrow", "longcat")
    assert document["size"] == {"width": 64, "height": 64}
    rows = document["rows"]
    assert [(row["rewrite"], row["batch"]) for row in rows] == [
        ("rotate_half", 1), ("rotate_half", 2), ("qkv", 1), ("qkv", 2),
    ]  # fmt: skip
    for row in rows:
        assert row["on, ms"] > 0 < row["off, ms"]
        assert row["off / on"] == pytest.approx(row["off, ms"] / row["on, ms"])
        assert row["n"] == 2
        assert 0 < row["difference, rel L2"] < 2e-2  # another graph, the same model
    reached = min(row["off / on"] for row in rows[:2])
    assert document["goals"] == {
        "rotate_half": {"goal": 1.4, "reached": pytest.approx(reached, abs=1e-3), "met": reached >= 1.4}
    }
    (exports,) = tmp_path.glob("exports-*")
    every, without = (load_bundle(exports / name) for name in ("all", "without-rotate_half"))
    graphs = [bundle.path("denoiser").read_bytes() for bundle in (every, without)]
    assert graphs[0] != graphs[1]
    assert b"Sin" not in graphs[0]
    written = (exports / "all" / "bundle.json").stat().st_mtime_ns
    assert main([*arguments, "--precision", "f32"]) == 0
    assert (exports / "all" / "bundle.json").stat().st_mtime_ns == written
    again = line(capsys)
    assert [row["batch"] for row in again["rows"]] == [1, 1]
    assert all(row["difference, rel L2"] < 1e-4 for row in again["rows"])
    assert again["goals"]["rotate_half"]["met"] is None  # it is about bfloat16


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give either --model FOLDER or --longcat LAYERS"),
        (["--model", "x", "--longcat", "2"], "give either --model FOLDER or --longcat LAYERS"),
        (["--model", "x", "--heads", "2"], "--heads=2 means nothing without --longcat"),
        (["--model", "x"], "--model: x is not a diffusers folder"),
        (["--longcat", "1"], "--longcat=1: 1 layers: LongCat has double and single blocks, so take 2 or more"),
        (["--longcat", "2", "--batches", "0"], "--batches=0: 0 is not a batch size"),
        (["--longcat", "2", "--size", "big"], "'big' is not a size"),
    ],
)
def test_wrong_input_is_one_sentence(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["rewrites", *arguments]) == 2
    (sentence,) = [text for text in capsys.readouterr().err.splitlines() if "error:" in text]
    assert message in sentence


def test_a_rewrite_that_the_family_lacks_is_refused(
    longcat: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["rewrites", "--model", str(longcat), "--rewrites", "magic"]) == 2
    assert "--rewrites=magic: longcat has rotary_tables, rotate_half, qkv" in capsys.readouterr().err


def test_random_longcat_has_true_heads_and_as_many_blocks_as_asked(longcat: Path) -> None:
    config = load_family(longcat, only=()).transformer.config
    assert (config.attention_head_dim, config.num_layers, config.num_single_layers) == (128, 1, 1)
    assert (blocks(2), blocks(8), blocks(30)) == ((1, 1), (3, 5), (10, 20))
    assert most_heads(2) == HEADS  # LongCat-Image's own width
    assert 1 < most_heads(8) < HEADS
    with pytest.raises(ValueError, match="take fewer"):
        most_heads(8, FLOAT32_BYTES // 1000)
