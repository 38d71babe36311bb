"""`cdm-bench roofline`: FLOPs are counted, every ratio is of what was measured in the run, the profile is whole."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import benchmarks.roofline
from benchmarks.main import main
from benchmarks.roofline import Product, flops
from engines.bundle import Bundle
from engines.families.base import load_family


def test_shares_are_of_the_best_product_of_the_run(
    tiny_bundle: Bundle,
    tiny_student: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(benchmarks.roofline, "SIZES", ((64, 64, 64), (256, 256, 256)))
    arguments = ["--bundle", str(tiny_bundle.root), "--student", str(tiny_student), "--batches", "1,3"]
    assert main(["roofline", *arguments, "--rounds", "2", "--threads", "1", "--precision", "f32"]) == 0
    document = json.loads(capsys.readouterr().out.splitlines()[-1])
    best = max(document["products"].values())
    assert set(document["products"]) == {"64x64x64", "256x256x256"}
    one, three = document["rows"]
    assert three["GFLOP"] == pytest.approx(3 * one["GFLOP"], rel=0.01)
    for row in (one, three):
        assert row["best product GFLOP/s"] == pytest.approx(best, rel=0.01, abs=0.1)
        assert row["GFLOP/s"] == pytest.approx(row["GFLOP"] / row["step ms"] * 1000)
        assert row["% of it"] == pytest.approx(100 * row["GFLOP/s"] / row["best product GFLOP/s"])
    for shares in document["nodes_percent"].values():
        assert 50 < sum(shares.values()) <= 100.5


def test_flops_are_those_of_the_layers(tiny_bundle: Bundle, tiny_student: Path) -> None:
    """At least those of the feed-forwards (two products of 4·width² each, image rows), and twice for two pictures."""
    family = load_family(tiny_student, torch.float32, only=())
    config = family.transformer.config
    width = config.num_attention_heads * config.attention_head_dim
    size, downscale = tiny_bundle.manifest.default_size, tiny_bundle.manifest.latent.downscale
    tokens = size.height * size.width // (downscale * config.patch_size) ** 2
    one = flops(family, tiny_bundle.manifest, 1)
    assert one > config.num_layers * tokens * 2 * (2 * 4 * width**2)
    assert flops(family, tiny_bundle.manifest, 2) == 2 * one


def test_a_product_takes_its_nodes_time_and_not_the_first_calls() -> None:
    product = Product((32, 16, 8), "f32", 1)
    for _ in range(3):
        product()
    assert len(product._seconds) == 3
    product._seconds = [9.0, 1.0, 2.0]
    assert product.seconds() == 1.5
