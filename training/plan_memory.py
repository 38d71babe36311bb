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

from training.config import CDMConfig, ConsistencyConfig, FinetuneConfig
from training.plan_setup import FLOAT32, Bytes, Passes, Role, Setup
from training.plan_trace import Compute, Timeline, Traces, measure

GRID_PROMPTS = 8
"""Pictures of a sample grid that are drawn at once; they are decoded one by one (`training/session.py`)."""
GATHERED_UNITS = 2
"""Blocks that FSDP2 holds whole at a time: the one that computes, and the next, gathered meanwhile."""
EMBEDDING = "prompts embedded"
"""The phase before the networks are there."""


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
        key = setup.model.name, setup.model.size, compute
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
        if self.passes.old:
            found["old student: weights"] = (whole.count + buffers) * item
        if setup.autoencoder:
            found["autoencoder"] = self._numbers_of_autoencoder * FLOAT32
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
        several, passes, config = micro < setup.share, self.passes, setup.config
        steps = student.traces.steps(passes.student)
        earlier = {"gradients": student.gradient_bytes()} if several else {}
        saved = {**earlier, "activations": steps.saved(micro)}
        found: dict[str, Bytes] = {}
        if isinstance(config, ConsistencyConfig):
            # The teacher's guided pass, of the rollout and at the point, comes before the student's forward.
            doubled = 1 if config.guidance == 1 else 2
            found["rollout"] = {**earlier, "pass without gradient": self._asked(self.plain, doubled * micro)}
            derivative = student.traces.derivative(config.tangent_step).peak(micro)
            found["student step: derivative"] = {**saved, "pass with tangents": derivative}
        elif passes.rollout:
            found["rollout"] = {"pass without gradient": student.traces.no_gradient.peak(micro)}
        if self.fake is not None:
            asked = (
                self._asked(self.plain, passes.teacher * micro),
                self._asked(self.fake.traces, passes.fake * micro),
                self._asked(self.plain, passes.old * micro),
            )
            found["student step: teachers asked"] = {**saved, "pass without gradient": max(asked)}
        found["student step: backward"] = student.backward(steps, micro, several)
        found["student update"] = self._update(student)
        if self.fake is not None:
            found["fake step: backward"] = self.fake.backward(self.fake.traces.steps(1), micro, several)
            found["fake update"] = self._update(self.fake)
        found = {name: {"batch: embeddings, latents": self.batch, **parts} for name, parts in found.items()}
        if setup.sample_grids:
            kept = student.count * FLOAT32 if setup.config.dtype == "float32" else 0
            at_once = GRID_PROMPTS * (
                2 if isinstance(config, FinetuneConfig) else 1
            )  # with and without guidance
            drawn = student.traces.no_gradient.peak(at_once)
            decoded = self._decoding.peak(1)
            found["sample grid"] = {"weights put aside": kept, "pass without gradient": max(drawn, decoded)}
        # Tensor by tensor: whole, and whether each of its numbers is finite.
        largest = max(tensor.numel() for tensor in self.plain.net.parameters())
        found["checkpoint"] = {"a tensor, whole and checked": largest * (FLOAT32 * (1 + setup.fsdp) + 1)}
        if setup.model.text_parameters:
            found[EMBEDDING] = {"text encoders, float32": setup.model.text_parameters * FLOAT32}
        return found

    def stays(self, phase: str) -> Bytes:
        """What is there all through a phase: everything persistent, but while prompts are embedded."""
        if phase != EMBEDDING:
            return self.persistent
        return {name: value for name, value in self.persistent.items() if name == "autoencoder"}

    def at(self, phase: str) -> int:
        """Bytes at a phase's worst moment, without allowances."""
        return sum(self.stays(phase).values()) + sum(self.phases[phase].values())

    @cached_property
    def worst(self) -> str:
        """The phase that takes the most."""
        return max(self.phases, key=self.at)

    @cached_property
    def parts(self) -> Bytes:
        """Everything on one GPU at the worst moment; the values add up to `total`."""
        setup, dynamic = self.setup, self.phases[self.worst]
        allowance = setup.overhead + round(setup.fragmentation * sum(dynamic.values()))
        found = {**self.stays(self.worst), **dynamic, "allowance: CUDA, allocator": allowance}
        return {name: value for name, value in found.items() if value}

    @property
    def total(self) -> int:
        """Bytes on one GPU."""
        return sum(self.parts.values())

    @cached_property
    def main_memory(self) -> Bytes:
        """Of all processes on this machine: float32 models while loading, and pictures' latents, each its own; and what
        the first gathers to write a checkpoint, one file at a time.

        Embeddings are read from disk as needed: memory that is free caches them, and none has to be.
        """
        setup = self.setup
        whole = sum(tensor.numel() for tensor in [*self.plain.net.parameters(), *self.plain.net.buffers()])
        loading = setup.model.text_parameters + 2 * whole  # the transformer, and a copy on its way to the GPU
        group = max(sum(role.learning) for role in (self.student, self.fake) if role is not None)
        written = group * 2 * FLOAT32 * (setup.gpus if setup.fsdp else 1)
        found = {
            "models while loading, float32": setup.gpus * loading * FLOAT32,
            "a checkpoint's largest file": 0 if setup.kernels == "cpu" else written,
        }
        if isinstance(setup.config, FinetuneConfig):
            latent = math.prod(setup.model.latent) * setup.dtype.itemsize
            found["latents of all pictures"] = setup.gpus * setup.prompts * latent
        return found

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
            f"checkpoints ({setup.kept_checkpoints} kept, 1 being written)": (setup.kept_checkpoints + 1)
            * once
            * ranks,
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
        """Float32 gradients beside their masters; they are averaged over processes in place."""
        return {"gradients": sum(role.learning) * FLOAT32}

    def _gathered(self) -> int:
        """Whole blocks in the compute dtype with float32 gradients, and each network's weights outside blocks."""
        net, units = self.plain.net, self.setup.model.units
        blocks = [_numbers(module) for module in net.modules() if type(module).__name__ in units]
        rest = _numbers(net) - sum(blocks)
        own = [
            role for role in (self.student, self.fake) if role is not None and not role.traces.compute.rank
        ]
        networks = 1 + len(own) + bool(self.passes.old)
        item = self.setup.dtype.itemsize
        return GATHERED_UNITS * max(blocks) * (item + FLOAT32) + networks * rest * item

    @property
    def _numbers_of_autoencoder(self) -> int:
        return sum(
            tensor.numel() for tensor in [*self._autoencoder.parameters(), *self._autoencoder.buffers()]
        )

    @cached_property
    def _autoencoder(self) -> nn.Module:
        return self.setup.model.autoencoder()

    @property
    def _decoding(self) -> Timeline:
        """One pass of the decoder, in float32."""
        key = self.setup.model.name, self.setup.model.size, "decoding", self.setup.kernels
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
