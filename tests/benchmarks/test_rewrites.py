"""`cdm-bench rewrites`: a family's rewrites one by one, on real classes; what is kept, and what is refused."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch

from benchmarks import rewrites, rewrites_exports
from benchmarks.main import main
from benchmarks.random_longcat import (
    FLOAT32_BYTES,
    HEADS,
    TINY_TEXT,
    blocks,
    build_random_longcat,
    most_heads,
)
from benchmarks.rewrites import RewritesBenchSettings, _goal, _rows
from engines.base import Engine, EngineOptions, load_engine
from engines.bundle import Bundle, Size, load_bundle
from engines.export.export import ExportOptions
from engines.families.base import load_family


def line(capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    document: dict[str, Any] = json.loads(capsys.readouterr().out.splitlines()[-1])
    return document


@pytest.mark.slow
def test_a_rewrite_is_timed_on_and_off_and_the_exports_are_kept(
    tiny_bundle: Bundle,
    tiny_student: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The bundle with all rewrites is the one that every test shares; the one without is exported here."""
    asked: list[ExportOptions] = []

    def export_bundle(student: Path, out: Path, options: ExportOptions) -> None:
        assert student == tiny_student
        asked.append(options)
        shutil.copytree(tiny_bundle.root, out)

    monkeypatch.setattr(rewrites_exports, "export_bundle", export_bundle)
    arguments = ["rewrites", "--model", str(tiny_student), "--rounds", "2", "--threads", "1"]
    arguments += ["--work", str(tmp_path), "--size", "64x64"]
    assert main([*arguments, "--precision", "f32", "--batches", "1,2"]) == 0
    (options,) = asked
    assert (options.sizes, options.runtimes) == ((Size(width=64, height=64),), ("openvino:f32",))
    assert (options.skip, options.tolerance.unfused) == ((), True)
    document = line(capsys)
    assert (document["benchmark"], document["bundle"], document["family"]) == (
        "rewrites", tiny_bundle.manifest.name, "sd3",
    )  # fmt: skip
    rows = document["rows"]
    assert [(row["rewrite"], row["batch"]) for row in rows] == [("qkv", 1), ("qkv", 2)]
    for row in rows:
        assert row["on, ms"] > 0 < row["off, ms"]
        assert row["off / on"] == pytest.approx(row["off, ms"] / row["on, ms"])
        assert (row["n"], document["goals"]) == (2, {})
        assert row["difference, rel L2"] < 1e-5  # another graph, the same model
    (exports,) = tmp_path.glob("exports-*")
    every, without = (load_bundle(exports / name) for name in ("all", "without-qkv"))
    products = [
        Counter(node.op_type for node in onnx.load(bundle.path("denoiser")).graph.node)["MatMul"]
        for bundle in (every, without)
    ]
    assert products[0] < products[1]
    shared = [(bundle.root / "decoder.onnx").read_bytes() for bundle in (every, without)]
    assert shared[0] == shared[1]
    assert main(arguments) == 0
    assert len(asked) == 1
    assert line(capsys)["precision"] == "bf16"
    assert main([*arguments, "--rewrites", "magic"]) == 2
    assert "--rewrites=magic: sd3 has qkv" in capsys.readouterr().err


def test_a_goal_is_met_by_the_worst_batch_and_is_about_bfloat16() -> None:
    rows = [{"rewrite": "rotate_half", "off / on": ratio} for ratio in (1.61, 1.39)]
    rows.append({"rewrite": "qkv", "off / on": 1.0})
    assert _goal(rows, "rotate_half", "bf16") == {"goal": 1.4, "reached": 1.39, "met": False}
    assert _goal(rows[:1], "rotate_half", "bf16")["met"] is True
    assert _goal(rows, "rotate_half", "f32")["met"] is None
    failed = [{"rewrite": "rotate_half", "failed without it": "no such operation"}]
    assert _goal(failed, "rotate_half", "bf16") == {"goal": 1.4, "reached": None, "met": None}


def test_a_runtime_that_fails_without_a_rewrite_is_a_row_that_says_so(
    tiny_bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = replace(tiny_bundle)

    def load(bundle: Bundle, options: EngineOptions) -> Engine:
        if bundle is other:
            raise RuntimeError("there is no sine\nin the plugin")
        return load_engine(bundle, options)

    monkeypatch.setattr(rewrites, "load_engine", load)
    settings = RewritesBenchSettings(longcat=2, precision="f32", threads=1)
    assert list(_rows(settings, tiny_bundle, ("qkv", other))) == [
        {"rewrite": "qkv", "failed without it": "there is no sine"}
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give either --model FOLDER or --longcat LAYERS"),
        (["--model", "x", "--longcat", "2"], "give either --model FOLDER or --longcat LAYERS"),
        (["--model", "x", "--heads", "2"], "--heads=2 means nothing without --longcat"),
        (["--model", "x"], "--model: x is not a diffusers folder"),
        (
            ["--longcat", "1"],
            "--longcat=1: 1 layers: LongCat has double and single blocks, so take 2 or more",
        ),
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


def test_random_longcat_has_true_heads_and_as_many_blocks_as_asked(tmp_path: Path) -> None:
    folder = build_random_longcat(
        tmp_path / "narrow", 2, heads=1, text=TINY_TEXT, vae_channels=(8, 8, 16, 16)
    )
    family = load_family(folder)
    config: Any = family.transformer.config
    assert (config.attention_head_dim, config.num_layers, config.num_single_layers) == (128, 1, 1)
    x = torch.randn(1, 16, 4, 4, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        velocity = family.velocity(family.transformer, x, torch.tensor([0.7]), family.encode(["red apple"]))
    assert 0.1 < float(velocity.std()) < 10
    assert (blocks(2), blocks(8), blocks(30)) == ((1, 1), (3, 5), (10, 20))
    assert most_heads(2) == HEADS  # LongCat-Image's own width
    assert 1 < most_heads(8) < HEADS
    with pytest.raises(ValueError, match="take fewer"):
        most_heads(8, FLOAT32_BYTES // 1000)
