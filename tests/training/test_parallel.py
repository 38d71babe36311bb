"""Two processes learn what one does: data parallel and sharded (FSDP2), on gloo."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.training.parallel_worker import Case
from training.errors import TrainingError
from training.parallel import Parallel

ROOT = Path(__file__).resolve().parents[2]


LORA = {"student_rank": 4, "fake_rank": 4, "student_alpha": 8.0, "fake_alpha": 8.0}
ALONE = {"full": Case("full"), "lora": Case("lora", changes=LORA)}
TOGETHER = {
    "ddp": Case("ddp"),
    "ddp in micro-batches": Case("ddp-micro", micro_batch=1),
    "fsdp": Case("fsdp", "fsdp"),
    "fsdp of LoRA": Case("fsdp-lora", "fsdp", changes=LORA),
}


def run(folder: Path, out: Path, processes: int, cases: Iterable[Case]) -> None:
    command = [sys.executable, "-W", "ignore"]
    if processes > 1:
        command += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    placed = [replace(case, out=str(out / case.out)).write() for case in cases]
    done = subprocess.run(
        [*command, str(ROOT / "tests/training/parallel_worker.py"), str(folder), *placed],
        cwd=ROOT, capture_output=True, text=True, check=False, timeout=400,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.fixture(scope="module")
def results(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("parallel")
    run(tiny_model, out, 1, ALONE.values())
    run(tiny_model, out, 2, TOGETHER.values())
    return out


@pytest.mark.slow
@pytest.mark.parametrize("name", TOGETHER)
def test_two_processes_learn_what_one_does(results, name):
    case = TOGETHER[name]
    one, two = results / ("lora" if case.changes else "full"), results / case.out
    alone, both = (json.loads((out / "values.json").read_text()) for out in (one, two))
    assert (alone["world"], both["world"]) == (1, 2)
    for mine, theirs in zip(alone["values"], both["values"], strict=True):
        assert theirs == pytest.approx(mine, rel=2e-3, abs=1e-5)
    wanted, got = (load_file(out / "weights.safetensors") for out in (one, two))
    assert wanted.keys() == got.keys()
    for key, value in wanted.items():
        # Adam's first steps are about lr·sign(g): where a gradient is nearly 0 its sign is rounding.
        assert (got[key] - value).abs().mean() < 1e-5, key
    if case.changes:
        assert all(".lora_" in key for key in got)
        assert any(value.any() for key, value in got.items() if ".lora_B." in key)


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
