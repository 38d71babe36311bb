"""A run that fails keeps the checkpoint from before it began to."""

from __future__ import annotations

import pytest
import torch

from training import checkpoint
from training.distill import distill
from training.errors import Collapsed
from training.run import Run
from training.watchdog import Watchdog, WatchdogConfig

CONFIG = WatchdogConfig(watchdog_reference=3, watchdog_smoothing=0.0, watchdog_patience=6)


class Roles:
    def __init__(self) -> None:
        self.value = torch.zeros(1)

    def tensors(self):
        return {"state": {"value": self.value}}

    def counters(self):
        return {}

    def restore(self, saved: checkpoint.Checkpoint) -> None:
        self.value.copy_(saved.tensors("state")["value"])


class Failing:
    """Its latents' spread is `spread(step)`; `die_at` is a kill."""

    def __init__(self, spread, die_at: int | None = None) -> None:
        self.roles, self.spread, self.die_at = Roles(), spread, die_at

    def iterate(self, step: int) -> dict[str, float]:
        if step == self.die_at:
            raise KeyboardInterrupt
        self.roles.value.fill_(step)
        return {"x0_std": self.spread(step)}


def go(folder, work, steps=40) -> Run:
    run = Run(folder, {}, steps, save_minutes=0, keep=1)
    distill(work, run, Watchdog(CONFIG))
    return run


def steps_of(folder) -> list[int]:
    return sorted(int(path.name.split("-")[1]) for path in (folder / "checkpoints").glob("step-*"))


@pytest.mark.parametrize("killed", [False, True])
def test_the_checkpoint_before_the_first_warning_outlives_all_later_ones(tmp_path, killed):
    def spread(step):
        return 1.0 if step < 10 else 1.6 if step < 20 else 4.0  # well; warned of; beyond the limit

    if killed:
        with pytest.raises(KeyboardInterrupt):
            go(tmp_path, Failing(spread, die_at=15))
        assert steps_of(tmp_path) == [10, 15]
    with pytest.raises(Collapsed, match="checkpoint step-00000010 is kept"):
        go(tmp_path, Failing(spread))
    kept = checkpoint.at(tmp_path / "checkpoints", 10)
    assert kept is not None
    assert float(kept.tensors("state")["value"]) == 9  # of the last iteration without a warning
    assert len(steps_of(tmp_path)) == 2


def test_it_goes_once_the_trouble_is_over(tmp_path):
    run = go(tmp_path, Failing(lambda step: 1.6 if 10 <= step < 20 else 1.0))
    assert steps_of(tmp_path) == [40]
    assert run.healthy() is None
