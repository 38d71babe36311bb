"""Gradient checkpointing: blocks keep their inputs alone, and are computed again in the backward pass.

recompute_blocks(transformer, adapters)          # adapters: None without LoRA
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

from torch import nn
from torch.utils.checkpoint import checkpoint

from training.lora import Adapters


def recompute_blocks(transformer: nn.Module, adapters: Adapters | None = None) -> None:
    """Let every block of a diffusers transformer be recomputed in each backward pass, where it computes a gradient.

    A block is recomputed with the adapter that was in force in its forward, whichever is when the gradient is taken.
    """

    def run(block: nn.Module, *args: Any) -> Any:
        adapter = adapters.current if adapters is not None else None

        def contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
            return nullcontext(), adapters.active(adapter) if adapters is not None else nullcontext()

        # No random number is drawn in a block: networks are in evaluation mode.
        return checkpoint(block, *args, use_reentrant=False, preserve_rng_state=False, context_fn=contexts)

    enable: Any = transformer.enable_gradient_checkpointing
    enable(run)
