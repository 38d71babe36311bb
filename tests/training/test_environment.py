"""What is recorded of where and how a run was started."""

from __future__ import annotations

import json
import subprocess

import pytest
import torch

from training.environment import describe, git_commit, package_versions, read_starts, record_start
from training.errors import TrainingError


def test_every_start_is_one_entry_so_that_resumes_are_seen(tmp_path):
    record_start(tmp_path, 0, recipe="emoji_cdm", argv=["/usr/bin/cdm-train", "emoji-cdm", "--out", "a b"])
    record_start(tmp_path, 40, torch.device("cpu"))
    first, second = read_starts(tmp_path)
    assert (first["step"], second["step"]) == (0, 40)
    assert first["time"] <= second["time"]
    assert first["command"] == "cdm-train emoji-cdm --out 'a b'"
    assert (first["recipe"], second["device"]) == ("emoji_cdm", "cpu")


def test_the_description_names_machine_and_packages_as_json():
    told = json.loads(json.dumps(describe()))
    assert told["packages"]["torch"] == torch.__version__
    assert {"diffusers", "accelerate", "peft", "cdm-serve"} <= package_versions().keys()
    assert told["cpu"]
    assert told["cores"] >= 1
    assert told["memory_gib"] > 0.5
    assert told["threads"] == torch.get_num_threads()
    assert len(told["gpus"]) == (torch.cuda.device_count() if torch.cuda.is_available() else 0)


def test_a_file_that_is_no_list_of_starts_says_what_to_do(tmp_path):
    for text in ("{", '{"step": 1}', '[{"step": "1"}]'):
        (tmp_path / "environment.json").write_text(text)
        with pytest.raises(TrainingError, match=r"environment\.json is not a list of starts.*delete it"):
            record_start(tmp_path, 0)
        assert (tmp_path / "environment.json").read_text() == text


def test_the_commit_is_that_of_tracked_code_only(tmp_path):
    def git(*words: str) -> str:
        identity = ["-c", "user.name=a", "-c", "user.email=a@b.c"]
        done = subprocess.run(
            ["git", "-C", tmp_path, *identity, *words], capture_output=True, text=True, check=True
        )
        return done.stdout.strip()

    file = tmp_path / "code.py"
    file.write_text("1\n")
    assert git_commit(file) == ""  # no repository at all, or not of it
    git("init", "-q")
    assert git_commit(file) == ""
    git("add", "code.py")
    git("commit", "-qm", "first")
    assert git_commit(file) == git("rev-parse", "HEAD")
    file.write_text("2\n")
    assert git_commit(file) == git("rev-parse", "HEAD") + "+changes"
