"""Live bytes and FLOPs of operations on shapes, and a device's kernels as they are for shapes.

meter = Meter([*net.parameters()])
with kernels("gpu", meter), meter:
    net(x).sum().backward()                        # on the meta device
meter.usage, meter.flops
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from training.cpu_kernels import _Attention, _Gelu


class Meter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Bytes of all storages that operations made and that still live, after each operation; and FLOPs."""

    def __init__(self, known: Sequence[Tensor] = ()) -> None:
        """Storages of `known` are not counted."""
        super().__init__()  # type: ignore[no-untyped-call]
        self.live, self.gradients, self.flops = 0, 0, 0
        self.forwards_end = 0
        self.usage: list[int] = []
        self.of_gradients: list[int] = []
        self._known = {id(tensor.untyped_storage()): tensor.untyped_storage() for tensor in known}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if (
            func is torch.ops.aten.lift_fresh.default
        ):  # of constants that are made once, in whichever run is first
            return result
        count = flop_registry.get(func._overloadpacket)
        if count is not None:
            self.flops += int(count(*args, **(kwargs or {}), out_val=result))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self._see(tensor.untyped_storage())
        self.note()
        return result

    def note(self) -> None:
        """Write down what is in use now."""
        self.usage.append(self.live)
        self.of_gradients.append(self.gradients)

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


Inputs = dict[str, Tensor]
Run = Callable[[Meter, Inputs], int]


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

    def rms_norm(
        input: Tensor, normalized_shape: Sequence[int], weight: Tensor | None = None, eps: float | None = None
    ) -> Tensor:
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
