"""A distillation killed with SIGKILL, again and again, ends as one that was left alone, bit for bit.

Processes are forked off one that has imported everything (`multiprocessing`'s fork server): seconds a start otherwise.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import time
from pathlib import Path

import pytest

from tests.training.kill_worker import PRELOAD, Moment, command

STEPS = 8

MOMENTS = {
    "copying the teacher": Moment("training.student_folder", "replace_folder"),
    "before an embeddings shard is in place": Moment("training.embedding_cache", "write_atomically", 2),
    "in the first iteration, before any checkpoint": Moment("training.distill:Distillation", "student_step"),
    "writing the first checkpoint": Moment("training.checkpoint", "save_file", 3, torn=True),
    "in the middle of an iteration": Moment("training.distill:Distillation", "student_step", 2),
    "between an iteration and its log line": Moment("training.run:Run", "record", 1),
    "writing a checkpoint": Moment("training.checkpoint", "save_file", 8, torn=True),
    "before the older checkpoints are deleted": Moment("training.checkpoint", "_rotate", 2),
    "writing the student": Moment("training.student_folder", "replace_folder"),
}
"""In this order, each of the process that goes on after the one before it was killed."""


class Command:
    """One `cdm-train emoji-cdm` of a tiny teacher into one folder."""

    def __init__(self, folder: Path, teacher: Path) -> None:
        self.out = folder / "out"
        folder.mkdir()
        prompts = folder / "prompts.txt"
        prompts.write_text("red apple\ngreen apple\nface with tears\n")
        self.arguments = ["emoji-cdm"]
        for name, value in {
            "teacher": teacher, "prompts": prompts, "out": self.out, "embeddings": folder / "embeddings",
            "steps": STEPS, "batch": 2, "n-max": 2, "warmup": 1, "lr-student": 0.003, "dtype": "float32",
            "tracker": "none", "sample-every": 0, "save-minutes": 1e-6, "watchdog-reference": 2,
        }.items():  # fmt: skip
            self.arguments += [f"--{name}", str(value)]

    def start(self, moment: Moment | None = None) -> multiprocessing.process.BaseProcess:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(PRELOAD)
        process = context.Process(target=command, args=(self.arguments, moment))
        process.start()
        return process

    def run(self, moment: Moment | None = None) -> int | None:
        process = self.start(moment)
        process.join(120)
        return process.exitcode

    def kill_at_line(self, line: int) -> int | None:
        """Killed from outside as soon as the log has so many lines; wherever it is then."""
        process, log = self.start(), self.out / "log.jsonl"
        while process.is_alive() and (not log.is_file() or log.read_bytes().count(b"\n") < line):
            time.sleep(0.001)
        assert process.pid is not None
        os.kill(process.pid, signal.SIGKILL)
        process.join(120)
        return process.exitcode

    def log(self) -> list[dict[str, float]]:
        lines = [json.loads(line) for line in (self.out / "log.jsonl").read_text().splitlines()]
        return [{key: value for key, value in line.items() if key != "time"} for line in lines]

    def result(self) -> dict[str, bytes]:
        """Every weight of student and last checkpoint, and the latter's counters."""
        folders = self.out / "student" / "transformer", self.out / "checkpoints" / f"step-{STEPS:08d}"
        return {
            str(file.relative_to(self.out)): file.read_bytes()
            for folder in folders
            for file in sorted(folder.iterdir())
            if file.name != "config.json"  # it names the folder that it was loaded from
        }


@pytest.fixture(scope="module")
def whole(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Command:
    """A run that was left alone."""
    whole = Command(tmp_path_factory.mktemp("whole") / "run", tiny_model)
    assert whole.run() == 0
    iterations = [line["step"] for line in whole.log() if "event" not in line]  # the watchdog may have warned
    assert iterations == list(range(STEPS))
    return whole


def same(killed: Command, whole: Command) -> None:
    assert killed.log() == whole.log()
    assert killed.result() == whole.result()
    assert not list(killed.out.glob(".*partial*"))
    assert not list((killed.out / "checkpoints").glob(".*"))


@pytest.mark.slow
def test_a_run_killed_at_every_kind_of_moment_ends_as_one_left_alone(whole, tiny_model, tmp_path):
    killed = Command(tmp_path / "run", tiny_model)
    for name, moment in MOMENTS.items():
        assert killed.run(moment) == -signal.SIGKILL, name
        if moment.torn:
            assert list((killed.out / "checkpoints").glob(".partial-*")), name
    assert killed.run() == 0
    same(killed, whole)


@pytest.mark.slow
def test_a_run_killed_from_outside_at_whatever_moment_ends_as_one_left_alone(whole, tiny_model, tmp_path):
    killed = Command(tmp_path / "run", tiny_model)
    assert killed.kill_at_line(3) == -signal.SIGKILL
    assert killed.run() == 0
    same(killed, whole)
