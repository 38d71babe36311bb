"""An optimizer's state as named tensors, which a checkpoint holds: sharded as the parameters are, or whole.

groups["adamw"] = optimizer_tensors(optimizer, parameters)
load_optimizer(optimizer, found.tensors("adamw"), parameters)     # in another world size, if need be
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from training.checkpoint import place
from training.errors import TrainingError
from training.parallel import like, local


def optimizer_tensors(
    optimizer: torch.optim.Optimizer, parameters: Mapping[str, Tensor] | None = None
) -> dict[str, Tensor]:
    """An optimizer's state as flat tensors: `<parameter name>.<state name>`.

    `parameters`: the model's, by name, in the optimizer's order; where they are sharded, so is the state that has
    their (local) shape. None: they are named by their position. Whole numbers become int64 scalars.
    """
    named = _by_position(optimizer) if parameters is None else parameters
    flat: dict[str, Tensor] = {}
    for (name, parameter), trained in zip(named.items(), _by_position(optimizer).values(), strict=True):
        # Not `state_dict()`: bitsandbytes nests its 8-bit state there.
        for key, value in optimizer.state.get(trained, {}).items():
            tensor = value if isinstance(value, Tensor) else torch.tensor(value)
            of_its_shape = tensor.ndim > 0 and tensor.shape == local(parameter).shape
            # All parameters' 8-bit moments share one table of values, which safetensors refuses.
            flat[f"{name}.{key}"] = like(tensor, parameter) if of_its_shape else tensor.clone()
    return flat


def load_optimizer(
    optimizer: torch.optim.Optimizer,
    tensors: Mapping[str, Tensor],
    parameters: Mapping[str, Tensor] | None = None,
) -> None:
    """Put back what `optimizer_tensors` took; the parameter groups (learning rates …) stay as configured now.

    Raises:
        TrainingError: the tensors belong to another set of parameters.
    """
    named = _by_position(optimizer) if parameters is None else parameters
    index_of = {name: index for index, name in enumerate(named)}
    saved = {key.rpartition(".")[0] for key in tensors}
    if unknown := sorted(saved - index_of.keys()):
        raise TrainingError(
            f"checkpoint has optimizer state for {len(saved)} parameters, this model has {len(index_of)} and not "
            f"{', '.join(unknown[:3])}; use the settings it was written with, or another --out"
        )
    state: dict[int, dict[str, Any]] = {}
    for key, value in tensors.items():
        name, _, kind = key.rpartition(".")
        parameter = named[name]
        part = place(value, parameter) if value.ndim > 0 and value.shape == parameter.shape else value
        whole_number = part.ndim == 0 and part.dtype == torch.int64
        state.setdefault(index_of[name], {})[kind] = int(part) if whole_number else part
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def _by_position(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    return {str(index): parameter for index, parameter in enumerate(parameters)}
