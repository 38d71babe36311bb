"""What a distillation takes on each GPU, part by part, at the moment when it takes the most; main memory and disk.

What stays is counted from shapes. What comes and goes is looked at phase by phase of one iteration, from
`training/plan_trace.py`; the phase that takes the most is the one that must fit.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import cached_property
from typing import Any

import torch
from torch import nn

from training.config import CDMConfig
from training.plan_setup import FLOAT32, Bytes, Passes, Role, Setup
from training.plan_trace import Compute, Timeline, Traces, measure

GRID_PROMPTS = 8
"""Pictures of a sample grid that are decoded at once (`training/session.py`)."""
GATHERED_UNITS = 2
"""Blocks that FSDP2 holds whole at a time: the one that computes, and the next, gathered meanwhile."""
KEPT_CHECKPOINTS = 2


class Memory:
    """Bytes of one setup. `cache` keeps traces, which many setups share."""

    def __init__(self, setup: Setup, cache: dict[Any, Any] | None = None) -> None:
        self.setup = setup
        self._cache: dict[Any, Any] = {} if cache is None else cache
        config = setup.config
        self.student = Role(setup, self.traces(config.student_rank))
        self.fake = Role(setup, self.traces(config.fake_rank)) if isinstance(config, CDMConfig) else None
        self.passes = Passes.of(config)

    def traces(self, rank: int) -> Traces:
        """Passes of a network with LoRA of `rank`; 0: of all weights."""
        setup, config = self.setup, self.setup.config
        compute = Compute(
            config.dtype, setup.machine.gradient_checkpointing, rank, config.lora_targets, setup.kernels
        )
        key = setup.model.name, compute
        if key not in self._cache:
            self._cache[key] = Traces(setup.model, compute)
        found: Traces = self._cache[key]
        return found

    @property
    def plain(self) -> Traces:
        """The teacher's passes."""
        return self.traces(0)

    @cached_property
    def persistent(self) -> Bytes:
        """What is there from the first optimizer step to the end."""
        setup = self.setup
        whole = Role(setup, self.plain)
        item = setup.dtype.itemsize
        buffers = sum(buffer.numel() for buffer in self.plain.net.buffers())
        found = {"teacher: weights": (whole.count + buffers) * item} | self.student.persistent("student")
        found["student: average (EMA)"] = self.student.count * FLOAT32
        if self.fake is not None:
            found |= self.fake.persistent("fake teacher")
        if setup.sample_grids:
            net = self._autoencoder
            numbers = sum(tensor.numel() for tensor in [*net.parameters(), *net.buffers()])
            found["autoencoder"] = numbers * FLOAT32
        if setup.fsdp:
            found["gathered blocks (FSDP2)"] = self._gathered()
        return found

    @cached_property
    def batch(self) -> int:
        """Embeddings of this GPU's prompts, and four float32 latents a sample (x, v, x̂0, noise)."""
        latents = 4 * FLOAT32 * math.prod(self.setup.model.latent)
        return self.setup.share * (self.embedding + latents)

    @cached_property
    def embedding(self) -> int:
        """Bytes of one cached prompt."""
        return sum(value.nbytes for value in self.setup.model.embedding(1, self.setup.dtype).values())

    @cached_property
    def phases(self) -> dict[str, Bytes]:
        """What comes and goes, by phase of an iteration, each at its worst moment."""
        setup, student, micro = self.setup, self.student, self.setup.micro
        several = micro < setup.share
        forwards = self.passes.student
        steps = student.traces.steps(forwards)
        earlier = {"gradients": student.gradient_bytes()} if several else {}
        asking = max(
            self._asked(self.plain, self.passes.teacher * micro),
            self._asked(self.fake.traces if self.fake else self.plain, self.passes.fake * micro),
        )
        found: dict[str, Bytes] = {
            "rollout": {"pass without gradient": student.traces.no_gradient.peak(micro)},
            "student step: teachers asked": {
                **earlier, "activations": steps.saved(micro), "pass without gradient": asking
            },
            "student step: backward": student.backward(steps, micro, several),
            "student update": self._update(student),
        }  # fmt: skip
        if self.fake is not None:
            found["fake step: backward"] = self.fake.backward(self.fake.traces.steps(1), micro, several)
            found["fake update"] = self._update(self.fake)
        found = {name: {"batch: embeddings, latents": self.batch, **parts} for name, parts in found.items()}
        if setup.sample_grids:
            kept = student.count * FLOAT32 if setup.config.dtype == "float32" else 0
            drawn = student.traces.no_gradient.peak(GRID_PROMPTS)
            decoded = self._decoding.peak(GRID_PROMPTS)
            found["sample grid"] = {"weights put aside": kept, "pass without gradient": max(drawn, decoded)}
        # A checkpoint's group of tensors is cloned where it lies; an optimizer's is the largest.
        largest = max(role.moments() for role in (student, self.fake) if role is not None)
        found["checkpoint"] = {"copy of a group of tensors": max(largest, student.count * FLOAT32)}
        return found

    @cached_property
    def worst(self) -> str:
        """The phase that takes the most."""
        return max(self.phases, key=lambda name: sum(self.phases[name].values()))

    @cached_property
    def parts(self) -> Bytes:
        """Everything on one GPU at the worst moment; the values add up to `total`."""
        setup, dynamic = self.setup, self.phases[self.worst]
        allowance = setup.overhead + round(setup.fragmentation * sum(dynamic.values()))
        found = {**self.persistent, **dynamic, "allowance: CUDA, allocator": allowance}
        return {name: value for name, value in found.items() if value}

    @property
    def total(self) -> int:
        """Bytes on one GPU."""
        return sum(self.parts.values())

    @cached_property
    def main_memory(self) -> Bytes:
        """Of all processes on this machine: float32 models while loading, and the cached embeddings, each its own."""
        setup = self.setup
        whole = sum(tensor.numel() for tensor in [*self.plain.net.parameters(), *self.plain.net.buffers()])
        loading = setup.model.text_parameters + 2 * whole  # the transformer, and a copy on its way to the GPU
        return {
            "models while loading, float32": setup.gpus * loading * FLOAT32,
            "embeddings of all prompts": setup.gpus * setup.prompts * self.embedding,
        }

    @cached_property
    def disk(self) -> Bytes:
        """Of the run's folder: checkpoints kept and the one being written, teacher and student folders, embeddings."""
        setup, roles = self.setup, [role for role in (self.student, self.fake) if role is not None]
        ranks = setup.gpus if setup.fsdp else 1
        once = sum(role.count * FLOAT32 + role.moments() for role in roles) + self.student.count * FLOAT32
        whole = (
            sum(parameter.numel() for parameter in self.plain.net.parameters()) + setup.model.text_parameters
        )
        return {
            f"checkpoints ({KEPT_CHECKPOINTS} kept, 1 being written)": (KEPT_CHECKPOINTS + 1) * once * ranks,
            "copy of the teacher, student": whole * (2 + FLOAT32),
            "embeddings of all prompts": setup.prompts * self.embedding,
        }

    def _asked(self, traces: Traces, samples: int) -> int:
        """Bytes of no-gradient passes over `samples`, at most `pass_batch` of them at once; all inputs are gathered."""
        if not samples:
            return 0
        at_once = min(samples, self.setup.machine.pass_batch)
        return traces.no_gradient.peak(at_once) + (samples - at_once) * self.embedding

    def _update(self, role: Role) -> Bytes:
        """Float32 gradients beside their masters; averaging them over processes takes as much again."""
        gradients = sum(role.learning) * FLOAT32
        reduced = gradients if self.setup.gpus > 1 and not self.setup.fsdp else 0
        return {"gradients": gradients, "gradients on their way (DDP)": reduced}

    def _gathered(self) -> int:
        """Whole blocks in the compute dtype with float32 gradients, and each network's weights outside blocks."""
        net, units = self.plain.net, self.setup.model.units
        blocks = [_numbers(module) for module in net.modules() if type(module).__name__ in units]
        rest = _numbers(net) - sum(blocks)
        networks = 2 + (self.fake is not None)
        item = self.setup.dtype.itemsize
        return GATHERED_UNITS * max(blocks) * (item + FLOAT32) + networks * rest * item

    @cached_property
    def _autoencoder(self) -> nn.Module:
        return self.setup.model.autoencoder()

    @property
    def _decoding(self) -> Timeline:
        """One pass of the decoder, in float32."""
        key = self.setup.model.name, "decoding", self.setup.kernels
        if key not in self._cache:
            net: Any = self._autoencoder

            def run(meter: Any, inputs: Any) -> int:
                with torch.no_grad():
                    net.decode(inputs["latents"])
                return int(meter.flops)

            def inputs_of(samples: int) -> dict[str, torch.Tensor]:
                return {"latents": self.setup.model.latents(samples)}

            known = [*net.parameters(), *net.buffers()]
            self._cache[key] = measure(run, inputs_of, known, [], self.setup.kernels)
        found: Timeline = self._cache[key]
        return found


def _numbers(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def gigabytes(parts: Mapping[str, int]) -> dict[str, float]:
    """In 10⁹ bytes."""
    return {name: round(value / 1e9, 3) for name, value in parts.items()}
