"""What a forward with gradient really leaves in memory at full model width, beside what a plan says: `rows()`.

Blocks of SD3-Medium, SD3.5-Medium and LongCat-Image run on the CPU with random weights and few tokens. Counted are the
bytes that torch's allocator has given out and not got back by the end of the forward, and beside them those of distinct
storages that pass `torch.autograd.graph.saved_tensors_hooks`, which do not see what checkpointing keeps. "cpu" is with
the kernels that training uses there, which keep attention probabilities. "gpu" is with torch's own attention, which
keeps what a GPU's does (q, k, v, output, row statistics), and a stand-in for LongCat's RMS norm, fused on GPUs only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile

from training.cpu_kernels import cpu_kernels
from training.plan_meter import _RMSNorm
from training.plan_model import BUILT_IN
from training.plan_trace import Compute, Traces

FEW: dict[str, dict[str, Any]] = {
    "sd3-medium": {"num_layers": 2},
    "sd3.5-medium": {"num_layers": 2, "dual_attention_layers": [0]},
    "longcat-image": {"num_layers": 1, "num_single_layers": 1},
}
SIZE, SAMPLES = 24, 2

Kind = Literal["gpu", "cpu"]
KINDS: tuple[Kind, ...] = ("gpu", "cpu")


def rows() -> list[dict[str, Any]]:
    """One row a model, kernels, and with or without gradient checkpointing."""
    found = []
    for name, few in FEW.items():
        config = {**BUILT_IN[name].config, **few}
        if "pos_embed_max_size" in config:
            config["pos_embed_max_size"] = SIZE
        model = replace(BUILT_IN[name], name=f"{name}, 2 blocks", config=config, size=SIZE)
        net: Any = model.transformer(torch.bfloat16, "cpu")
        cond = model.embedding(SAMPLES, torch.bfloat16, "cpu")
        x, sigma = torch.zeros(SAMPLES, *model.latent), torch.full((SAMPLES,), 0.5)
        known = [*net.parameters(), *net.buffers(), x, sigma, *cond.values()]
        for checkpointing in (False, True):
            if checkpointing:
                net.enable_gradient_checkpointing()
            for kind in KINDS:

                def forward() -> Tensor:
                    return model.family().velocity(net, x, sigma, cond)  # noqa: B023

                with _kernels(kind):
                    live = live_bytes(forward)
                    saved = None if checkpointing else round(saved_bytes(forward, known) / 1e6, 2)
                compute = Compute("bfloat16", checkpointing, kernels=kind)
                planned = Traces(model, compute).steps(1).saved(SAMPLES)
                found.append({
                    "model": model.name, "kernels": kind, "checkpointing": "yes" if checkpointing else "no",
                    "saved by autograd, MB": saved, "live, MB": round(live / 1e6, 2),
                    "planned, MB": round(planned / 1e6, 2), "ratio": round(planned / live, 3),
                })  # fmt: skip
    return found


def live_bytes(run: Callable[[], Tensor]) -> int:
    """Bytes that `run` allocated and that its result keeps alive."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        out = run()
    results: Any = profiler.profiler
    found = sum(event.nbytes() for event in results.kineto_results.events() if event.name() == "[memory]")
    del out
    return int(found)


def saved_bytes(run: Callable[[], Tensor], known: list[Tensor]) -> int:
    """Bytes of all distinct storages that autograd keeps of `run`, those of `known` left out."""
    ignored = {tensor.untyped_storage().data_ptr() for tensor in known}
    kept: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in ignored:
            kept[storage.data_ptr()] = storage
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        out = run()
    found = sum(storage.nbytes() for storage in kept.values())
    del out
    return found


@contextmanager
def _kernels(kind: Kind) -> Iterator[None]:
    if kind == "cpu":
        with cpu_kernels():
            yield
        return
    before = F.rms_norm
    F.rms_norm = lambda x, shape, weight=None, eps=None: _RMSNorm.apply(x, weight)  # type: ignore[assignment,no-untyped-call]
    try:
        yield
    finally:
        F.rms_norm = before
