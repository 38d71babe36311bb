"""A network's passes run on shapes alone: live bytes at every operation, and FLOPs. Nothing is computed or held.

    traces = Traces(describe("sd3-medium"), Compute())
    traces.no_gradient.peak(8)                         # bytes that a pass of 8 samples needs beside its inputs
    traces.steps(2).peak(8), traces.steps(2).backward_flops

Operations and their order do not depend on the batch, so usage after each is a + b·samples: two runs on the meta device
give it for every batch, exactly. What differs between devices is which kernels save what: on a GPU attention and RMS
norm are fused and save inputs and row statistics; on a CPU ours (`training/cpu_kernels.py`) save the probabilities.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import flop_registry

from training.cpu_kernels import _Attention, _Gelu
from training.losses import predict_x0, renoise
from training.plan_model import LORA_TARGETS, Model

BATCHES = (2, 3)
"""Samples of the two runs. Not 1: reductions over an axis of one are left out."""


@dataclass(frozen=True)
class Compute:
    """How one network computes."""

    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    checkpointing: bool = False
    rank: int = 0
    targets: Literal["attention", "attention+ff"] = "attention+ff"
    kernels: Literal["gpu", "cpu"] = "gpu"

    @property
    def torch_dtype(self) -> torch.dtype:
        """Of the compute copies."""
        found: torch.dtype = getattr(torch, self.dtype)
        return found


class Meter(TorchDispatchMode):
    """Bytes of all storages that operations made and that still live, after each operation; and FLOPs."""

    def __init__(self, known: Sequence[Tensor] = ()) -> None:
        """Storages of `known` are not counted."""
        super().__init__()
        self.live, self.gradients, self.flops = 0, 0, 0
        self.usage: list[int] = []
        self.of_gradients: list[int] = []
        self._known = {id(tensor.untyped_storage()): tensor.untyped_storage() for tensor in known}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is torch.ops.aten.lift_fresh.default:  # of constants that are made once, in whichever run is first
            return result
        count = flop_registry.get(func._overloadpacket)
        if count is not None:
            self.flops += int(count(*args, **(kwargs or {}), out_val=result))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self._see(tensor.untyped_storage())
        self.usage.append(self.live)
        self.of_gradients.append(self.gradients)
        return result

    def _see(self, storage: torch.UntypedStorage) -> None:
        key = id(storage)
        if key in self._known:
            return
        size = storage.nbytes()
        self._known[key] = None  # type: ignore[assignment]
        self.live += size
        weakref.finalize(storage, self._forget, key, size)

    def _forget(self, key: int, size: int) -> None:
        del self._known[key]
        self.live -= size

    def count_gradient(self, parameter: Tensor) -> None:
        """Hook of a parameter whose gradient is complete."""
        assert parameter.grad is not None
        self.gradients += parameter.grad.untyped_storage().nbytes()


class _FlashAttention(torch.autograd.Function):
    """What a fused GPU kernel allocates and counts: output, float32 row statistics; backward recomputes scores."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, meter: Meter) -> Tensor:
        batch, heads, length, depth = q.shape
        out = q.new_empty(batch, length, heads, depth).transpose(1, 2)
        statistics = q.new_empty((batch, heads, length), dtype=torch.float32)
        ctx.save_for_backward(q, k, v, out, statistics)
        ctx.meter = meter
        meter.flops += 4 * batch * heads * length * k.shape[2] * depth
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        q, k, v, _, statistics = ctx.saved_tensors
        # Row sums and dq are gathered in float32.
        gathered = (torch.empty_like(statistics), q.new_empty(q.shape, dtype=torch.float32))
        ctx.meter.flops += 10 * q.shape[0] * q.shape[1] * q.shape[2] * k.shape[2] * q.shape[3]
        results = tuple(torch.empty_like(tensor) for tensor in (q, k, v))
        del gathered
        return (*results, None)  # type: ignore[return-value]


class _RMSNorm(torch.autograd.Function):
    """torch's fused kernel: saves its input and one float32 a row."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight, x.new_empty(x.shape[:-1], dtype=torch.float32))
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        x, weight, _ = ctx.saved_tensors
        return torch.empty_like(x), torch.empty_like(weight)


@contextmanager
def kernels(kind: str, meter: Meter) -> Iterator[None]:
    """Attention, GELU and RMS norm as they are on a device of `kind`, for shapes."""
    before = F.scaled_dot_product_attention, F.gelu, F.rms_norm

    def flash(query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return _FlashAttention.apply(query, key, value, meter)  # type: ignore[no-untyped-call,no-any-return]

    def stored(query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return _Attention.apply(query, key, value)  # type: ignore[no-untyped-call,no-any-return]

    def gelu(input: Tensor, approximate: str = "none") -> Tensor:
        if approximate == "tanh" and input.dtype == torch.bfloat16:
            return _Gelu.apply(input)  # type: ignore[no-untyped-call,no-any-return]
        return before[1](input, approximate=approximate)

    def rms_norm(input: Tensor, shape: Any, weight: Tensor | None = None, eps: float | None = None) -> Tensor:
        assert weight is not None, "no family here norms without a weight"
        return _RMSNorm.apply(input, weight)  # type: ignore[no-untyped-call,no-any-return]

    if kind == "gpu":
        F.scaled_dot_product_attention, F.rms_norm = flash, rms_norm
    else:
        F.scaled_dot_product_attention, F.gelu = stored, gelu
    try:
        yield
    finally:
        F.scaled_dot_product_attention, F.gelu, F.rms_norm = before


@dataclass(frozen=True)
class Timeline:
    """Bytes in use after every operation, as `base + each·samples`; gradients of parameters apart."""

    base: NDArray[np.int64]
    each: NDArray[np.int64]
    gradients: NDArray[np.int64]
    forward_flops: int
    """Of one sample in one pass."""
    backward_flops: int
    """Of one sample, what belongs to its forwards, recomputation included."""
    forwards_end: int
    """Operations before the backward pass begins."""

    def at(self, samples: int) -> NDArray[np.int64]:
        """Bytes beside gradients, after every operation."""
        found: NDArray[np.int64] = self.base + self.each * samples
        return found

    def peak(self, samples: int) -> int:
        """The most bytes at a time, gradients included."""
        return int((self.at(samples) + self.gradients).max())

    def saved(self, samples: int) -> int:
        """What lies there between forwards and backward."""
        return int(self.at(samples)[self.forwards_end - 1])


class Traces:
    """Passes of one model in one way of computing; each is run when first asked for."""

    def __init__(self, model: Model, compute: Compute) -> None:
        self.model, self.compute = model, compute
        self._steps: dict[int, Timeline] = {}

    @cached_property
    def net(self) -> nn.Module:
        """The transformer on the meta device, with LoRA where `compute` has a rank."""
        net = self.model.transformer(self.compute.torch_dtype)
        if self.compute.rank:
            from peft import LoraConfig, inject_adapter_in_model

            names = adapted(net, self.model.units, self.compute.targets)
            net.requires_grad_(False)
            inject_adapter_in_model(LoraConfig(r=self.compute.rank, target_modules=names), net)
            net = nn.Module.to(net, self.compute.torch_dtype)
        if self.compute.checkpointing:
            # As diffusers does it; on the meta device there is no random state to keep.
            run = partial(checkpoint, use_reentrant=False, preserve_rng_state=False)
            net.enable_gradient_checkpointing(run)  # type: ignore[operator]
        return net

    @cached_property
    def no_gradient(self) -> Timeline:
        """A pass without gradient, the gathering of its inputs included."""

        def run(meter: Meter, samples: int) -> int:
            with torch.no_grad():
                cond = {name: value.clone() for name, value in self._cond(samples).items()}
                x, sigma = self.model.latents(samples).clone(), torch.empty(samples, device="meta")
                predict_x0(x, self._family.velocity(self.net, x, sigma, cond), sigma)
            return meter.flops

        return self._measure(run, [])

    def steps(self, forwards: int) -> Timeline:
        """`forwards` passes with gradient, x̂0 of each re-noised and compared, one backward."""
        if forwards not in self._steps:
            self._steps[forwards] = self._measure(partial(self._step, forwards), self._parameters)
        return self._steps[forwards]

    def _step(self, forwards: int, meter: Meter, samples: int) -> int:
        cond, x, sigma = self._cond(samples), self.model.latents(samples), torch.empty(samples, device="meta")
        terms = []
        for _ in range(forwards):
            x0 = predict_x0(x, self._family.velocity(self.net, x, sigma, cond), sigma)
            terms.append((x0, renoise(x0.detach(), x, sigma)))
        flops = meter.flops
        meter.forwards_end = len(meter.usage)  # type: ignore[attr-defined]
        loss = torch.zeros((), device="meta")
        for x0, renoised in terms:
            loss = loss + (x0 - renoised).square().mean()
        del terms, x0, renoised
        loss.backward()  # type: ignore[no-untyped-call]
        return flops

    def _cond(self, samples: int) -> dict[str, Tensor]:
        return self.model.embedding(samples, self.compute.torch_dtype)

    @cached_property
    def _family(self) -> Any:
        return self.model.family()

    @cached_property
    def _parameters(self) -> list[nn.Parameter]:
        return [parameter for parameter in self.net.parameters() if parameter.requires_grad]

    def _measure(self, run: Callable[[Meter, int], int], trained: Sequence[Tensor]) -> Timeline:
        return measure(run, [*self.net.parameters(), *self.net.buffers()], trained, self.compute.kernels)


def measure(
    run: Callable[[Meter, int], int], known: Sequence[Tensor], trained: Sequence[Tensor], kind: str
) -> Timeline:
    """The timeline of `run(meter, samples)`, which gives its forward's FLOPs; `known` storages are not counted."""
    meters, forward = [], []
    for samples in BATCHES:
        meter = Meter(known)
        hooks = [
            parameter.register_post_accumulate_grad_hook(meter.count_gradient)  # type: ignore[attr-defined]
            for parameter in trained
        ]
        with kernels(kind, meter), meter:
            forward.append(run(meter, samples))
        for parameter, hook in zip(trained, hooks, strict=True):
            hook.remove()
            parameter.grad = None
        meters.append(meter)
    small, large = (np.array(meter.usage, np.int64) - np.array(meter.of_gradients) for meter in meters)
    assert len(small) == len(large), "operations depend on the batch"
    each = (large - small) // (BATCHES[1] - BATCHES[0])
    flops = [(meter.flops - ahead, ahead) for meter, ahead in zip(meters, forward, strict=True)]
    backward, ahead = (int(b) - int(a) for a, b in zip(*flops, strict=True))
    end = getattr(meters[0], "forwards_end", len(small))
    return Timeline(small - each * BATCHES[0], each, np.array(meters[0].of_gradients), ahead, backward, end)


def adapted(net: nn.Module, units: Sequence[str], targets: str) -> list[str]:
    """Names of the linear layers that LoRA adapts: those of `net`'s blocks that `targets` names."""
    endings = LORA_TARGETS["attention"] + (LORA_TARGETS["feed-forward"] if targets == "attention+ff" else ())
    return [
        f"{prefix}.{name}"
        for prefix, block in net.named_modules()
        if type(block).__name__ in units
        for name, layer in block.named_modules()
        if isinstance(layer, nn.Linear) and any(name == end or name.endswith(f".{end}") for end in endings)
    ]
