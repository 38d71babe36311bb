"""Laws of a run's folder: exact resume, no torn logs, one set of settings."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from training import checkpoint
from training.draws import generator
from training.errors import Diverged, TrainingError
from training.run import Run, config_sha256, numpy_generator


class Counter:
    """A state whose value is the sum of what it was given."""

    def __init__(self) -> None:
        self.value = torch.zeros(1)

    def tensors(self):
        return {"state": {"value": self.value}}

    def counters(self):
        return {}

    def restore(self, saved: checkpoint.Checkpoint) -> None:
        self.value.copy_(saved.tensors("state")["value"])


def log_lines(folder: Path) -> list[dict[str, float]]:
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "time"} for line in lines]


def go(
    folder: Path,
    total: int = 6,
    die_at: int | None = None,
    stop_at: int | None = None,
    by: int = signal.SIGTERM,
) -> float:
    run, state = Run(folder, {"lr": 1}, total, save_minutes=0), Counter()
    for step in run.steps(run.resume(state), state):
        if step == die_at:
            raise KeyboardInterrupt
        state.value += torch.rand(1, generator=generator(0, step, 0))
        run.log(step, every=1, value=float(state.value))
        if step == stop_at:
            os.kill(os.getpid(), by)
    return float(state.value)


def test_a_killed_and_resumed_run_equals_an_uninterrupted_one(tmp_path):
    whole = go(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        go(tmp_path / "killed", die_at=4)
    assert go(tmp_path / "killed") == whole
    assert log_lines(tmp_path / "killed") == log_lines(tmp_path / "whole")


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_stopping_signal_saves_and_stops_after_the_step_and_is_told_by_the_exit_code(
    tmp_path, number, code
):
    with pytest.raises(SystemExit) as stopped:
        go(tmp_path, stop_at=2, by=number)
    assert stopped.value.code == code
    assert checkpoint.latest(tmp_path / "checkpoints").step == 3
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    go(tmp_path)
    assert [line["step"] for line in log_lines(tmp_path)] == list(range(6))


def test_a_run_killed_before_its_first_checkpoint_logs_no_step_twice(tmp_path):
    run = Run(tmp_path, {}, 5)
    for step in range(3):
        run.log(step, every=1, loss=1.0)
    log = tmp_path / "log.jsonl"
    log.write_text(log.read_text() + '{"step": 3, "lo')
    again = Run(tmp_path, {}, 5)
    assert again.resume(Counter()) == 0
    assert log.read_text() == ""


def test_a_finished_run_does_nothing_more_and_a_longer_one_goes_on(tmp_path):
    assert go(tmp_path) == go(tmp_path)
    go(tmp_path, total=8)
    assert [line["step"] for line in log_lines(tmp_path)] == list(range(8))


def test_another_runs_folder_is_refused_by_name_and_value(tmp_path):
    Run(tmp_path, {"lr": 1e-4, "steps": 5}, 5).save(1, Counter())
    with pytest.raises(TrainingError, match=r"lr=0.1 \(there: 0.0001\)"):
        Run(tmp_path, {"lr": 0.1, "steps": 5}, 5)


def test_a_start_that_came_to_no_checkpoint_binds_nothing(tmp_path):
    Run(tmp_path, {"lr": 100.0}, 5)
    assert not Run(tmp_path, {"lr": 0.1}, 5).started
    assert json.loads((tmp_path / "config.json").read_text()) == {"lr": 0.1}


def test_a_hash_that_was_not_recorded_binds_from_now_on(tmp_path):
    Run(tmp_path, {"lr": 1}, 5).save(1, Counter())
    with pytest.raises(TrainingError, match="seed=3"):
        Run(tmp_path, {"lr": 1, "seed": 3}, 5)
    Run(tmp_path, {"lr": 1, "data_sha256": "a"}, 5)
    with pytest.raises(TrainingError, match="data_sha256='b'"):
        Run(tmp_path, {"lr": 1, "data_sha256": "b"}, 5)


def test_free_settings_may_change(tmp_path):
    Run(tmp_path, {"lr": 1e-4, "steps": 5}, 5).save(1, Counter())
    Run(tmp_path, {"lr": 1e-4, "steps": 9}, 9, free=("steps",))
    assert json.loads((tmp_path / "config.json").read_text())["steps"] == 9


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_stops_the_run_before_a_checkpoint(tmp_path, bad):
    run, state = Run(tmp_path, {}, 5, save_minutes=0), Counter()

    def train() -> None:
        for step in run.steps(run.resume(state), state):
            run.log(step, loss=bad if step == 2 else 1.0)

    with pytest.raises(Diverged, match=r"loss=.* at step 2"):
        train()
    assert checkpoint.latest(tmp_path / "checkpoints").step == 2


def test_a_folder_belongs_to_one_process(tmp_path):
    go(tmp_path)
    before = (tmp_path / "log.jsonl").read_bytes()
    other = "import sys; from pathlib import Path; from training.run import Run; Run(Path(sys.argv[1]), {'lr': 1}, 9)"
    command = [sys.executable, "-c", other, str(tmp_path)]
    root = Path(__file__).parents[2]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    assert f"is being written by another process (process {os.getpid()} on " in done.stderr
    assert (tmp_path / "log.jsonl").read_bytes() == before
    assert go(tmp_path, 7) > 0  # to whom it belongs

    held = f"{other}; print('held', flush=True); sys.stdin.read()"
    command = [sys.executable, "-c", held, str(tmp_path / "killed")]
    with subprocess.Popen(command, cwd=root, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"held\n"
        with pytest.raises(TrainingError, match=f"another process .process {process.pid} "):
            Run(tmp_path / "killed", {"lr": 1}, 9)
        process.kill()
        process.wait()
        Run(tmp_path / "killed", {"lr": 1}, 9)  # a killed process holds nothing


def test_random_numbers_depend_on_seed_step_and_stream_only():
    draw = lambda *key: torch.rand(4, generator=generator(*key)).tolist()  # noqa: E731
    assert draw(1, 2, 3) == draw(1, 2, 3)
    assert len({tuple(draw(*key)) for key in ((1, 2, 3), (2, 2, 3), (1, 3, 3), (1, 2, 4), (2, 1, 3))}) == 5
    assert np.array_equal(numpy_generator(1, 2).random(3), numpy_generator(1, 2).random(3))


def test_the_config_hash_ignores_key_order_and_sees_every_value():
    assert config_sha256({"a": 1, "b": 2}) == config_sha256({"b": 2, "a": 1})
    assert config_sha256({"a": 1}) != config_sha256({"a": 2})
