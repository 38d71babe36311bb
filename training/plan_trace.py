"""A network's passes run on shapes alone: live bytes at every operation, and FLOPs. Nothing is computed or held.

    traces = Traces(describe("sd3-medium"), Compute())
    traces.no_gradient.peak(8)                         # bytes that a pass of 8 samples needs beside its inputs
    traces.steps(2).peak(8), traces.steps(2).backward_flops

Operations and their order do not depend on the batch, so usage after each is a + b·samples: two runs on the meta device
give it for every batch, exactly. What differs between devices is which kernels save what: on a GPU attention and RMS
norm are fused and save inputs and row statistics; on a CPU ours (`training/cpu_kernels.py`) save the probabilities.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from training.consistency import total_derivative
from training.lora import require_rank
from training.losses import predict_x0, renoise
from training.plan_meter import Inputs, Meter, Run, kernels
from training.plan_model import Model

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
    idle: frozenset[int]
    """Which of the trained tensors got no gradient: nothing is learnt there, such as queries that nobody asks."""

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
        self._derivatives: dict[float, Timeline] = {}

    @cached_property
    def net(self) -> nn.Module:
        """The transformer on the meta device, with LoRA where `compute` has a rank."""
        net = self.model.transformer(self.compute.torch_dtype)
        if self.compute.rank:
            from peft import LoraConfig, inject_adapter_in_model

            targets = self._family.lora_targets[self.compute.targets]
            require_rank(net, targets, "student", self.compute.rank)
            net.requires_grad_(False)
            config = LoraConfig(r=self.compute.rank, target_modules=targets)
            inject_adapter_in_model(config, net, low_cpu_mem_usage=True)
            net = nn.Module.to(net, self.compute.torch_dtype)
        if self.compute.checkpointing:
            # As diffusers does it; on the meta device there is no random state to keep.
            run = partial(checkpoint, use_reentrant=False, preserve_rng_state=False)
            net.enable_gradient_checkpointing(run)  # type: ignore[operator]
        return net

    @cached_property
    def no_gradient(self) -> Timeline:
        """A pass without gradient, the gathering of its inputs included."""

        def run(meter: Meter, inputs: Inputs) -> int:
            with torch.no_grad():
                gathered = {name: value.clone() for name, value in inputs.items()}
                self._x0(gathered)
            return meter.flops

        return self._measure(run, [])

    def steps(self, forwards: int) -> Timeline:
        """`forwards` passes with gradient, x̂0 of each re-noised and compared, one backward."""
        if forwards not in self._steps:
            self._steps[forwards] = self._measure(partial(self._step, forwards), self._parameters)
        return self._steps[forwards]

    def derivative(self, step: float) -> Timeline:
        """The student's derivative along the trajectory (`training.consistency`), by forward-mode or differences."""
        if step not in self._derivatives:
            self._derivatives[step] = self._measure(partial(self._derive, step), [])
        return self._derivatives[step]

    def _derive(self, step: float, meter: Meter, inputs: Inputs) -> int:
        cond = {name: value for name, value in inputs.items() if name not in ("x", "sigma")}

        def velocity(x: Tensor, sigma: Tensor) -> Tensor:
            found: Tensor = self._family.velocity(self.net, x, sigma, cond)
            return found

        total_derivative(velocity, inputs["x"], inputs["sigma"], torch.empty_like(inputs["x"]), step)
        return meter.flops

    def _step(self, forwards: int, meter: Meter, inputs: Inputs) -> int:
        terms = []
        for _ in range(forwards):
            x0 = self._x0(inputs)
            terms.append((x0, renoise(x0.detach(), inputs["x"], inputs["sigma"])))
        flops = meter.flops
        meter.forwards_end = len(meter.usage)
        loss = torch.zeros((), device="meta")
        for x0, renoised in terms:
            loss = loss + (x0 - renoised).square().mean()
        del terms, x0, renoised
        loss.backward()  # type: ignore[no-untyped-call]
        return flops

    def _x0(self, inputs: Inputs) -> Tensor:
        cond = {name: value for name, value in inputs.items() if name not in ("x", "sigma")}
        x, sigma = inputs["x"], inputs["sigma"]
        return predict_x0(x, self._family.velocity(self.net, x, sigma, cond), sigma)

    def _inputs(self, samples: int) -> Inputs:
        cond = self.model.embedding(samples, self.compute.torch_dtype)
        return {"x": self.model.latents(samples), "sigma": torch.empty(samples, device="meta"), **cond}

    @cached_property
    def _family(self) -> Any:
        return self.model.family()

    @cached_property
    def _parameters(self) -> list[nn.Parameter]:
        return [parameter for parameter in self.net.parameters() if parameter.requires_grad]

    def _measure(self, run: Run, trained: Sequence[Tensor]) -> Timeline:
        known = [*self.net.parameters(), *self.net.buffers()]
        return measure(run, self._inputs, known, trained, self.compute.kernels)


def measure(
    run: Run,
    inputs_of: Callable[[int], Inputs],
    known: Sequence[Tensor],
    trained: Sequence[Tensor],
    kind: str,
) -> Timeline:
    """The timeline of `run(meter, inputs)`, which gives its forward's FLOPs; neither inputs nor `known` are counted."""
    meters, forward = [], []
    for samples in BATCHES:
        inputs = inputs_of(samples)
        meter = Meter([*known, *inputs.values()])
        hooks = [
            parameter.register_post_accumulate_grad_hook(meter.count_gradient)  # type: ignore[no-untyped-call]
            for parameter in trained
        ]
        with kernels(kind, meter), meter:
            forward.append(run(meter, inputs))
        meter.note()  # the last gradients are there after the last operation
        idle = frozenset(number for number, parameter in enumerate(trained) if parameter.grad is None)
        for parameter, hook in zip(trained, hooks, strict=True):
            hook.remove()
            parameter.grad = None
        meters.append(meter)
    small, large = (np.array(meter.usage, np.int64) - np.array(meter.of_gradients) for meter in meters)
    assert len(small) == len(large), "operations depend on the batch"
    each = (large - small) // (BATCHES[1] - BATCHES[0])
    flops = [(meter.flops - ahead, ahead) for meter, ahead in zip(meters, forward, strict=True)]
    backward, ahead = (int(b) - int(a) for a, b in zip(*flops, strict=True))
    end = meters[0].forwards_end or len(small)
    gradients = np.array(meters[0].of_gradients)
    return Timeline(small - each * BATCHES[0], each, gradients, ahead, backward, end, idle)
