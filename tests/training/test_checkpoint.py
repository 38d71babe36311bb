"""Laws of checkpoints: whole or absent, the newest wins, nothing broken gets in."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError

from training import checkpoint
from training.errors import Diverged, TrainingError
from training.optimizer_state import load_optimizer, optimizer_tensors


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


def test_a_full_disk_is_told_and_leaves_the_previous_one(tmp_path):
    """On a real file system of 256 KiB, where mounting is allowed."""
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=256k", "none", tmp_path], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("mounting a small file system needs root")
    try:
        checkpoint.save(tmp_path, 5, weights(5), {})
        with pytest.raises(TrainingError, match="no space for the checkpoint of step 6"):
            checkpoint.save(tmp_path, 6, {"model": {"a": torch.zeros(1 << 17)}}, {})
        assert [path.name for path in tmp_path.iterdir()] == ["step-00000005"]
        assert checkpoint.latest(tmp_path).step == 5
    finally:
        subprocess.run(["umount", tmp_path], check=True)


@pytest.mark.parametrize(
    "error",
    [
        OSError(28, "No space left on device"),
        SafetensorError("I/O error: No space left on device (os error 28)"),
    ],
)
def test_a_full_disk_in_either_of_its_guises_removes_the_partial(tmp_path, monkeypatch, error):
    checkpoint.save(tmp_path, 5, weights(5), {})

    def full_disk(*args: object) -> None:
        raise error

    monkeypatch.setattr(checkpoint, "save_file", full_disk)
    with pytest.raises(TrainingError, match="no space for the checkpoint of step 6"):
        checkpoint.save(tmp_path, 6, weights(6), {})
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000005"]


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-3])


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda path: truncate(path / "model.safetensors"), "bytes of"),
        (lambda path: (path / "model.safetensors").unlink(), "model.safetensors is missing"),
        (lambda path: truncate(path / "meta.json"), "meta.json is unreadable"),
        (lambda path: (path / "meta.json").write_text("[]"), "meta.json is unreadable"),
    ],
)
def test_a_damaged_checkpoint_is_told_once_and_the_next_older_is_used(tmp_path, damage, said):
    for step in (5, 6):
        checkpoint.save(tmp_path, step, weights(step), {})
    damage(tmp_path / "step-00000006")
    told: list[str] = []
    assert checkpoint.latest(tmp_path, told.append).step == 5
    assert len(told) == 1
    assert said in told[0]
    checkpoint.save(tmp_path, 7, weights(7), {})
    assert checkpoint.latest(tmp_path).step == 7
    assert (tmp_path / "step-00000005").is_dir()  # the damaged one went in its stead


@pytest.mark.parametrize(("lower", "step"), [(True, 2), (False, 3)])
def test_the_best_is_never_rotated_away_until_a_better_one_exists(tmp_path, lower, step):
    for at, value in enumerate((5.0, 3.0, 9.0, 4.0, 4.0, 4.0), start=1):
        checkpoint.save(tmp_path, at, weights(at), {}, 1, checkpoint.Score(value, lower))
    assert checkpoint.best(tmp_path).step == step
    assert [path.name for path in sorted(tmp_path.iterdir())] == [f"step-{step:08d}", "step-00000006"]
    better = checkpoint.Score(1.0 if lower else 10.0, lower)
    checkpoint.save(tmp_path, 7, weights(7), {}, 1, better)
    assert checkpoint.best(tmp_path).score == better
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000007"]


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
    checkpoint.save(tmp_path, 1, {"net": net.state_dict(), "adamw": optimizer_tensors(optimizer)}, {})
    other, resumed = trained(1)
    found = checkpoint.latest(tmp_path)
    other.load_state_dict(found.tensors("net"))
    load_optimizer(resumed, found.tensors("adamw"))
    for model, steps in ((net, optimizer), (other, resumed)):
        model(torch.ones(1, 3)).square().sum().backward()
        steps.step()
    assert torch.equal(net.weight, other.weight)


def test_an_optimizer_of_other_parameters_is_refused():
    _, optimizer = trained(0)
    small = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))])
    with pytest.raises(TrainingError, match="optimizer state for 2 parameters, this model has 1"):
        load_optimizer(small, optimizer_tensors(optimizer))


def test_optimizer_state_is_named_and_finds_its_parameter_in_another_order():
    net, optimizer = trained(0)
    tensors = optimizer_tensors(optimizer, dict(net.named_parameters()))
    assert {"weight.exp_avg", "bias.exp_avg_sq", "bias.step"} <= tensors.keys()
    turned = dict(reversed(list(net.named_parameters())))
    other = torch.optim.AdamW(turned.values(), lr=0.1)
    load_optimizer(other, tensors, turned)
    for key in ("exp_avg", "exp_avg_sq"):
        assert torch.equal(other.state[net.weight][key], optimizer.state[net.weight][key])


def test_a_process_that_is_not_the_first_writes_nothing(tmp_path):
    checkpoint.save(tmp_path, 5, weights(5), {}, main=False)
    assert list(tmp_path.iterdir()) == []
