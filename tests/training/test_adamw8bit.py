"""8-bit AdamW (bitsandbytes, which steps on CPUs too): a resumed run goes on as one that was not stopped."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.training.tiny_distillation import tiny_config, tiny_distillation
from training import checkpoint
from training.errors import TrainingError
from training.parallel import Parallel
from training.roles import Roles


def test_without_its_package_it_says_what_to_install(monkeypatch):
    monkeypatch.setattr("training.requirements.find_spec", lambda name: None)
    with pytest.raises(TrainingError, match="pip install bitsandbytes"):
        Roles(torch.nn.Linear(2, 2), tiny_config(optimizer="adamw8bit"))


def test_its_blocks_are_not_sharded():
    parallel = Parallel(torch.device("cpu"), 0, 2, fsdp=True)
    with pytest.raises(TrainingError, match="cannot be sharded; give --optimizer adamw, or --parallel ddp"):
        Roles(torch.nn.Linear(2, 2), tiny_config(optimizer="adamw8bit"), parallel)


def test_a_resumed_run_goes_on_exactly(tiny_model: Path, tmp_path: Path):
    pytest.importorskip("bitsandbytes")
    whole, first, second = (tiny_distillation(tiny_model, optimizer="adamw8bit") for _ in range(3))
    wanted = [whole.iterate(step) for step in range(4)]
    for step in range(2):
        first.iterate(step)
    checkpoint.save(tmp_path, 2, first.roles.tensors(), first.roles.counters())
    found = checkpoint.latest(tmp_path)
    assert found is not None
    assert any(value.dtype == torch.uint8 for value in found.tensors("student_adamw").values())
    second.roles.restore(found)
    assert [second.iterate(step) for step in (2, 3)] == wanted[2:]
