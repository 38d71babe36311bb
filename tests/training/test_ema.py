"""Laws of the weight average."""

from __future__ import annotations

import pytest
import torch

from training.ema import EMA
from training.errors import TrainingError
from training.optim import MixedPrecision


def test_the_decay_warms_up_as_the_authors_does():
    source = {"w": torch.zeros(1)}
    ema = EMA(source, 0.999)
    source["w"].fill_(1.0)
    expected = 0.0
    for n in range(1, 40):
        ema.update(source)
        decay = min((1 + n) / (10 + n), 0.999)
        expected = decay * expected + (1 - decay) * 1.0
        torch.testing.assert_close(ema.average["w"], torch.tensor([expected]))


def test_the_decay_never_exceeds_its_limit():
    source = {"w": torch.zeros(1)}
    ema = EMA(source, 0.5)
    ema.updates = 10_000
    source["w"].fill_(1.0)
    ema.update(source)
    assert float(ema.average["w"]) == 0.5


def test_the_average_is_a_float32_copy():
    source = {"w": torch.ones(2, dtype=torch.bfloat16)}
    ema = EMA(source, 0.9)
    source["w"].zero_()
    assert ema.average["w"].dtype == torch.float32
    assert torch.equal(ema.average["w"], torch.ones(2))


def test_a_loaded_average_goes_on_where_it_was():
    source = {"w": torch.zeros(1)}
    first, second = EMA(source, 0.999), EMA(source, 0.999)
    source["w"].fill_(1.0)
    for _ in range(5):
        first.update(source)
    second.load({"w": first.average["w"].clone()}, first.updates)
    first.update(source)
    second.update(source)
    assert torch.equal(first.average["w"], second.average["w"])


@pytest.mark.parametrize("saved", [{"weight": (2, 3)}, {"weight": (2, 3), "bias": (2,), "more": (1,)}])
def test_tensors_of_another_model_are_refused_and_change_nothing(saved):
    model = torch.nn.Linear(3, 2)
    mixed = MixedPrecision.of(model, torch.bfloat16)
    ema = EMA(mixed.masters, 0.9)
    before = mixed.masters["weight"].clone()
    other = {name: torch.full(shape, 7.0) for name, shape in saved.items()}
    with pytest.raises(TrainingError, match="in one of them only"):
        mixed.load(other)
    with pytest.raises(TrainingError, match="in one of them only"):
        ema.load(other, 1)
    with pytest.raises(TrainingError, match=r"weight is \(1, 3\), this model's is \(2, 3\)"):
        mixed.load({"weight": torch.ones(1, 3), "bias": torch.ones(2)})
    assert torch.equal(mixed.masters["weight"], before)
    assert torch.equal(ema.average["weight"], before)
