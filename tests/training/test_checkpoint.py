"""Laws of checkpoints: whole or absent, the newest wins, nothing broken gets in."""

from __future__ import annotations

import pytest
import torch

from training import checkpoint
from training.errors import Diverged, TrainingError


def weights(value: float) -> dict[str, dict[str, torch.Tensor]]:
    return {"model": {"a": torch.full((2, 2), value), "step": torch.tensor(value)}}


def test_what_was_saved_comes_back(tmp_path):
    checkpoint.save(tmp_path, 7, weights(1.5), {"samples": 70})
    found = checkpoint.latest(tmp_path)
    assert (found.step, found.meta["samples"]) == (7, 70)
    assert torch.equal(found.tensors("model")["a"], torch.full((2, 2), 1.5))


def test_the_newest_is_found_and_the_oldest_are_deleted(tmp_path):
    for step in (5, 10, 100):
        checkpoint.save(tmp_path, step, weights(step), {}, keep=2)
    assert checkpoint.latest(tmp_path).step == 100
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000010", "step-00000100"]


def test_a_half_written_checkpoint_is_never_resumed_and_is_swept_away(tmp_path):
    checkpoint.save(tmp_path, 5, weights(5), {})
    (tmp_path / ".partial-00000009").mkdir()
    (tmp_path / "step-00000009").mkdir()  # no meta.json: its deletion was cut short
    assert checkpoint.latest(tmp_path).step == 5
    checkpoint.save(tmp_path, 12, weights(12), {})
    assert not list(tmp_path.glob(".partial-*"))


def test_a_save_that_fails_leaves_the_previous_one(tmp_path, monkeypatch):
    checkpoint.save(tmp_path, 5, weights(5), {})

    def full_disk(*args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "save_file", full_disk)
    with pytest.raises(OSError, match="No space"):
        checkpoint.save(tmp_path, 6, weights(6), {})
    assert checkpoint.latest(tmp_path).step == 5


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nothing_that_is_not_finite_reaches_a_checkpoint(tmp_path, bad):
    with pytest.raises(Diverged, match="model/a is not finite at step 3"):
        checkpoint.save(tmp_path, 3, weights(bad), {})
    assert checkpoint.latest(tmp_path) is None


def test_an_empty_folder_has_no_checkpoint(tmp_path):
    assert checkpoint.latest(tmp_path / "none") is None


def trained(seed: int) -> tuple[torch.nn.Linear, torch.optim.AdamW]:
    torch.manual_seed(seed)
    net = torch.nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.1, fused=True)
    for _ in range(3):
        net(torch.ones(1, 3)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    return net, optimizer


def test_an_optimizer_goes_on_exactly_as_if_it_had_not_been_saved(tmp_path):
    net, optimizer = trained(0)
    checkpoint.save(
        tmp_path, 1, {"net": net.state_dict(), "adamw": checkpoint.optimizer_tensors(optimizer)}, {}
    )
    other, resumed = trained(1)
    found = checkpoint.latest(tmp_path)
    other.load_state_dict(found.tensors("net"))
    checkpoint.load_optimizer(resumed, found.tensors("adamw"))
    for model, steps in ((net, optimizer), (other, resumed)):
        model(torch.ones(1, 3)).square().sum().backward()
        steps.step()
    assert torch.equal(net.weight, other.weight)


def test_an_optimizer_of_other_parameters_is_refused():
    _, optimizer = trained(0)
    small = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))])
    with pytest.raises(TrainingError, match="optimizer state for 2 parameters, this model has 1"):
        checkpoint.load_optimizer(small, checkpoint.optimizer_tensors(optimizer))
