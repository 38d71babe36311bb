"""`torch.compile` of a transformer's blocks, one by one: all blocks of a kind share one compiled function."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

VARIANTS = 64
"""Compiled forms of one kind of block: with and without gradient, batch sizes, the adapter in force. Torch would stop
at 8 and go on uncompiled without a word."""


def compile_blocks(transformer: nn.Module, units: Sequence[str], backend: str = "inductor") -> None:
    """Compile every block whose class `units` names (`Family.fsdp_units`), in place; a copy of it is not compiled."""
    config = torch._dynamo.config
    config.recompile_limit = max(config.recompile_limit, VARIANTS)
    for block in transformer.modules():
        if type(block).__name__ in units:
            block.compile(backend=backend)
