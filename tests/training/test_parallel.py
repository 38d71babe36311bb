"""Two processes learn what one does: data parallel and sharded (FSDP2), on gloo."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from training.errors import TrainingError
from training.parallel import Parallel

ROOT = Path(__file__).resolve().parents[2]


def run(
    folder: Path, out: Path, processes: int, mode: str = "ddp", micro_batch: int = 0, **changes: Any
) -> Path:
    command = [sys.executable, "-W", "ignore"]
    if processes > 1:
        command += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    worker = [ROOT / "tests/training/parallel_worker.py", folder, out, mode, micro_batch, json.dumps(changes)]
    done = subprocess.run(
        [*command, *map(str, worker)], cwd=ROOT, capture_output=True, text=True, check=False, timeout=240,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return out


def values(out: Path) -> list[dict[str, float]]:
    read: list[dict[str, float]] = json.loads((out / "values.json").read_text())
    return read


@pytest.fixture(scope="module")
def alone(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run(tiny_model, tmp_path_factory.mktemp("alone") / "out", 1, steps=4)


@pytest.mark.slow
def test_lora_factors_are_sharded_as_well(tiny_model, tmp_path):
    lora = {"steps": 4, "student_rank": 4, "fake_rank": 4, "student_alpha": 8.0, "fake_alpha": 8.0}
    one, two = (run(tiny_model, tmp_path / str(processes), processes, "fsdp", **lora) for processes in (1, 2))
    for alone, both in zip(values(one), values(two), strict=True):
        assert both == pytest.approx(alone, rel=2e-3, abs=1e-5)
    weights = load_file(two / "weights.safetensors")
    assert all(".lora_" in name for name in weights)
    assert any(value.any() for name, value in weights.items() if ".lora_B." in name)


@pytest.mark.slow
@pytest.mark.parametrize(("mode", "micro_batch"), [("ddp", 0), ("ddp", 1), ("fsdp", 0)])
def test_two_processes_learn_what_one_does(tiny_model, alone, tmp_path, mode, micro_batch):
    both = run(tiny_model, tmp_path / "out", 2, mode, micro_batch, steps=4)
    for one, two in zip(values(alone), values(both), strict=True):
        assert two == pytest.approx(one, rel=2e-3, abs=1e-5)
    wanted, got = (load_file(out / "weights.safetensors") for out in (alone, both))
    assert wanted.keys() == got.keys()
    for name, value in wanted.items():
        # Adam's first steps are about lr·sign(g): where a gradient is nearly 0 its sign is rounding.
        assert (got[name] - value).abs().mean() < 1e-5, name


def test_samples_are_divided_without_gap_or_overlap():
    parts = [
        row
        for rank in range(3)
        for part in Parallel(torch.device("cpu"), rank, 3).parts(12, 3)
        for row in part
    ]
    assert parts == list(range(12))
    assert [len(part) for part in Parallel(torch.device("cpu")).parts(7, 3)] == [3, 3, 1]


def test_a_batch_that_cannot_be_divided_is_refused():
    with pytest.raises(
        TrainingError, match="--batch=7 cannot be divided among 2 processes; give a multiple of 2"
    ):
        Parallel(torch.device("cpu"), 0, 2).require_divisible(7)


def test_a_device_that_is_not_there_is_refused():
    with pytest.raises(TrainingError, match="--device=cuda:7 cannot be used"):
        Parallel.start("cuda:7")
    with pytest.raises(TrainingError, match="--device=abacus cannot be used"):
        Parallel.start("abacus")
