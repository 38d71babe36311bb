"""The whole command on two processes: embeddings, scores, grids, checkpoints, report and student, once."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

from training import checkpoint

ROOT = Path(__file__).resolve().parents[2]
SMALL = (
    "--steps", "4", "--batch", "4", "--n-max", "2", "--warmup", "1", "--lr-student", "1e-4", "--lr-fake", "1e-4",
    "--sample-every", "2",
    "--score-every", "2", "--dtype", "float32", "--device", "cpu", "--watchdog", "warn",
)  # fmt: skip


@pytest.fixture(scope="module")
def runs(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """The same command on one process, and sharded over two."""
    folder = tmp_path_factory.mktemp("processes")
    (folder / "p.txt").write_text("red apple\ngreen apple\nface with tears\nrocket\n")
    for processes in (1, 2):
        launch = (
            ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"] if processes == 2 else []
        )
        done = subprocess.run(
            [
                sys.executable, "-W", "ignore", *launch, "-m", "training.main", "emoji-cdm", "--teacher",
                str(tiny_model), "--prompts", str(folder / "p.txt"), "--out", str(folder / str(processes)),
                "--embeddings", str(folder / f"embeddings-{processes}"), "--parallel", "fsdp", *SMALL,
            ],
            cwd=ROOT, capture_output=True, text=True, check=False, timeout=300,
            env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-3000:]
    return {processes: folder / str(processes) for processes in (1, 2)}


def lines(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_two_processes_write_one_log_with_one_processs_numbers(runs):
    alone, both = ({line["step"]: line for line in lines(runs[n]) if "fake" in line} for n in (1, 2))
    assert alone.keys() == both.keys()
    for step, line in alone.items():
        for name in ("fake", "student", "fake_norm"):
            if name in line:
                assert both[step][name] == pytest.approx(line[name], rel=5e-3, abs=1e-4), (step, name)


@pytest.mark.slow
def test_scores_are_taken_written_and_the_best_is_kept(runs):
    for run in runs.values():
        scores = {line["step"]: line["score"] for line in lines(run) if "score" in line}
        assert list(scores) == [1, 3]
        best = checkpoint.best(run / "checkpoints")
        assert best is not None
        assert best.score is not None
        assert best.score.value == min(scores.values())
    one, two = ([line["score"] for line in lines(run) if "score" in line] for run in runs.values())
    assert two == pytest.approx(one, rel=0.05, abs=0.02)


@pytest.mark.slow
def test_two_processes_write_the_student_grids_and_report_of_one(runs):
    one, two = (
        load_file(run / "student" / "transformer" / "diffusion_pytorch_model.safetensors")
        for run in runs.values()
    )
    assert one.keys() == two.keys()
    for name, value in one.items():
        assert (two[name] - value).abs().mean() < 2e-4, name
    for run in runs.values():
        assert sorted(path.name for path in (run / "samples").glob("*.png")) == [
            "step-00000002.png",
            "step-00000004.png",
        ]
        assert "energy distance, latent units" in (run / "report.html").read_text()
