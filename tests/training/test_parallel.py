"""Two processes learn what one does: data parallel and sharded (FSDP2), on gloo."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.folders import FOLDERS
from tests.training.parallel_worker import Case
from training.errors import TrainingError
from training.parallel import Parallel

ROOT = Path(__file__).resolve().parents[2]


LORA = {"student_rank": 4, "fake_rank": 4, "student_alpha": 8.0, "fake_alpha": 8.0}
HALF_PRECISION = {"dtype": "bfloat16"}
FAST = {"lr_student": 0.02, "lr_fake": 0.02, "student_every": 3, "steps": 6}
"""The raw student and its average differ by much, and rollouts come between a student step and the next answer."""
OTHERS = ("keep", "finetune", "consistency")
ALONE = {
    "full": Case("full"),
    "lora": Case("lora", changes=LORA),
    "half": Case("half-precision", changes=HALF_PRECISION, checkpointing=True),
    "half lora": Case("half-precision-lora", changes=LORA | HALF_PRECISION, checkpointing=True),
    "asked": Case("asked", steps=6, changes=FAST, ask=(2, 3)),
    **{method: Case(method, method=method, steps=3) for method in OTHERS},
}
TOGETHER = {
    "ddp": Case("ddp"),
    "ddp in micro-batches": Case("ddp-micro", micro_batch=1),
    "fsdp": Case("fsdp", "fsdp"),
    "fsdp of LoRA": Case("fsdp-lora", "fsdp", changes=LORA),
    "fsdp in half precision, checkpointing": Case(
        "fsdp-half-precision", "fsdp", changes=HALF_PRECISION, checkpointing=True
    ),
    "fsdp of LoRA in half precision, checkpointing": Case(
        "fsdp-half-precision-lora", "fsdp", changes=LORA | HALF_PRECISION, checkpointing=True
    ),
    **{f"ddp of {method}": Case(f"ddp-{method}", method=method, steps=3) for method in OTHERS},
    **{f"fsdp of {method}": Case(f"fsdp-{method}", "fsdp", method, steps=3) for method in OTHERS[:2]},
}
ASKED = {
    "fsdp": Case("fsdp-asked", "fsdp", steps=6, changes=FAST, ask=(2, 3)),
    "fsdp, not asked": Case("fsdp-not-asked", "fsdp", steps=6, changes=FAST),
}
LONGCAT = {
    "alone": Case("longcat", checkpointing=True),
    "fsdp": Case("fsdp-longcat", "fsdp", checkpointing=True),
}
HALF = 2
BEGUN_ALONE = {
    "full": Case("half", steps=HALF, save="half-saved"),
    "lora": Case("half-lora", steps=HALF, save="half-lora-saved", changes=LORA),
}
BEGUN_TOGETHER = {
    "fsdp": Case("fsdp-half", "fsdp", steps=HALF, save="fsdp-half-saved"),
    "fsdp of LoRA": Case("fsdp-half-lora", "fsdp", steps=HALF, save="fsdp-half-lora-saved", changes=LORA),
}
GONE_ON_TOGETHER = {
    "alone → fsdp": Case("1-2", "fsdp", resume="half-saved"),
    "alone → fsdp of LoRA": Case("1-2-lora", "fsdp", resume="half-lora-saved", changes=LORA),
    "alone → ddp": Case("1-ddp", resume="half-saved"),
    "fsdp → fsdp": Case("2-2", "fsdp", resume="fsdp-half-saved"),
    "fsdp of LoRA → fsdp of LoRA": Case("2-2-lora", "fsdp", resume="fsdp-half-lora-saved", changes=LORA),
}
GONE_ON_ALONE = {
    "fsdp → alone": Case("2-1", resume="fsdp-half-saved"),
    "fsdp of LoRA → alone": Case("2-1-lora", resume="fsdp-half-lora-saved", changes=LORA),
    "alone → alone": Case("1-1", resume="half-saved"),
}


def run(folder: Path, out: Path, processes: int, cases: Iterable[Case]) -> None:
    command = [sys.executable, "-W", "ignore"]
    if processes > 1:
        command += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    placed = [
        replace(
            case, out=str(out / case.out), save=case.save and str(out / case.save),
            resume=case.resume and str(out / case.resume),
        ).write()
        for case in cases
    ]  # fmt: skip
    done = subprocess.run(
        [*command, str(ROOT / "tests/training/parallel_worker.py"), str(folder), *placed],
        cwd=ROOT, capture_output=True, text=True, check=False, timeout=400,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.fixture(scope="module")
def results(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("parallel")
    run(tiny_model, out, 1, [*ALONE.values(), *BEGUN_ALONE.values()])
    together = [*TOGETHER.values(), *ASKED.values(), *BEGUN_TOGETHER.values(), *GONE_ON_TOGETHER.values()]
    run(tiny_model, out, 2, together)
    run(tiny_model, out, 1, GONE_ON_ALONE.values())
    return out


def told(out: Path) -> dict[str, Any]:
    read: dict[str, Any] = json.loads((out / "values.json").read_text())
    return read


def near(wanted: Path, got: Path, apart: float = 1e-5) -> None:
    a, b = (load_file(out / "weights.safetensors") for out in (wanted, got))
    assert a.keys() == b.keys()
    for key, value in a.items():
        # Adam's first steps are about lr·sign(g): where a gradient is nearly 0 its sign is rounding.
        assert (b[key] - value).abs().mean() < apart, key


@pytest.mark.slow
@pytest.mark.parametrize("name", TOGETHER)
def test_two_processes_learn_what_one_does(results, name):
    case = TOGETHER[name]
    half, lora = "dtype" in case.changes, "student_rank" in case.changes
    like = "half " * half + (
        case.method if case.method in OTHERS else "lora" if lora else "full" * (not half)
    )
    rel, least, apart = (2e-2, 2e-2, 1e-3) if half else (2e-3, 1e-5, 1e-5)
    one, two = results / ALONE[like.strip()].out, results / case.out
    alone, both = told(one), told(two)
    assert (alone["world"], both["world"]) == (1, 2)
    for mine, theirs in zip(alone["values"], both["values"], strict=True):
        assert theirs == pytest.approx(mine, rel=rel, abs=least)
    near(one, two, apart)
    if lora:
        got = load_file(two / "weights.safetensors")
        assert all(".lora_" in key for key in got)
        assert any(value.any() for key, value in got.items() if ".lora_B." in key)


@pytest.mark.slow
@pytest.mark.parametrize("name", [*GONE_ON_TOGETHER, *GONE_ON_ALONE])
def test_a_checkpoint_goes_on_in_another_world_size_as_if_it_had_not_been_saved(results, name):
    case = {**GONE_ON_TOGETHER, **GONE_ON_ALONE}[name]
    whole, after = results / ("lora" if case.changes else "full"), results / case.out
    assert told(after)["same"]  # weights, average and moments come back to the bit, however they are laid out
    for mine, theirs in zip(told(whole)["values"][HALF:], told(after)["values"], strict=True):
        assert theirs == pytest.approx(mine, rel=2e-3, abs=1e-5)
    near(whole, after)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("whole", "after"),
    [
        (TOGETHER["fsdp"], GONE_ON_TOGETHER["fsdp → fsdp"]),
        (TOGETHER["fsdp of LoRA"], GONE_ON_TOGETHER["fsdp of LoRA → fsdp of LoRA"]),
        (ALONE["full"], GONE_ON_ALONE["alone → alone"]),
    ],
)
def test_in_the_same_world_size_it_goes_on_to_the_bit(results, whole, after):
    assert told(results / whole.out)["values"][HALF:] == told(results / after.out)["values"]
    a, b = (load_file(results / case.out / "weights.safetensors") for case in (whole, after))
    assert all(torch.equal(a[key], b[key]) for key in a.keys() | b.keys())


@pytest.mark.slow
def test_asking_the_averaged_student_changes_nothing_and_hears_the_average(results):
    """FSDP keeps gathered weights: what is put into the shards must be what computes, and the student's own after."""
    asked, quiet = (results / ASKED[name].out for name in ("fsdp", "fsdp, not asked"))
    assert told(asked)["values"] == told(quiet)["values"]
    a, b = (load_file(out / "weights.safetensors") for out in (asked, quiet))
    assert all(torch.equal(a[key], b[key]) for key in a.keys() | b.keys())
    alone = told(results / ALONE["asked"].out)["answers"]
    assert told(asked)["answers"] == pytest.approx(alone, rel=2e-3)
    assert alone[0] == alone[1]  # the fake teacher's iteration leaves the average alone


@pytest.mark.slow
def test_longcat_is_sharded_with_checkpointing(tmp_path):
    folder = FOLDERS["longcat"](tmp_path / "base")
    run(folder, tmp_path, 1, [LONGCAT["alone"]])
    run(folder, tmp_path, 2, [LONGCAT["fsdp"]])
    one, two = (tmp_path / case.out for case in LONGCAT.values())
    for mine, theirs in zip(told(one)["values"], told(two)["values"], strict=True):
        assert theirs == pytest.approx(mine, rel=2e-3, abs=1e-5)
    near(one, two)


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


def test_several_processes_are_not_all_put_on_one_gpu(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(
        TrainingError, match="--device=cuda:1 names one device, and 2 processes take one each"
    ):
        Parallel.start("cuda:1")
