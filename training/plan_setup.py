"""What is planned, the passes of its loop, and what one trained role takes."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch

from training.config import (
    CDMConfig,
    ConsistencyConfig,
    FinetuneConfig,
    KeepConfig,
    MachineConfig,
    OptimConfig,
)
from training.errors import TrainingError
from training.plan_model import Model
from training.plan_trace import Timeline, Traces
from training.requirements import require_shardable

Bytes = dict[str, int]

FLOAT32 = 4
BLOCK_8BIT, LEAST_8BIT = 256, 4096
"""bitsandbytes: values that share a float32 scale, and the size below which a tensor's moments stay float32."""


@dataclass(frozen=True)
class Setup:
    """What is planned: a model, what it learns, and on what it is computed."""

    model: Model
    config: OptimConfig
    machine: MachineConfig
    gpus: int = 1
    kernels: Literal["gpu", "cpu"] = "gpu"
    sample_grids: bool = True
    prompts: int = 10_000
    """Distinct prompts, whose embeddings are cached; for fine-tuning, captioned pictures."""
    kept_checkpoints: int = 2
    overhead: int = 0
    """Bytes of CUDA's context and of libraries' workspaces, per GPU."""
    fragmentation: float = 0.0
    """What the allocator cannot use, as a share of what comes and goes."""

    def __post_init__(self) -> None:
        if self.config.batch % self.gpus:
            raise TrainingError(
                f"--batch={self.config.batch} cannot be divided among {self.gpus} GPUs; give a multiple of {self.gpus}"
            )
        if self.fsdp:
            require_shardable(self.config)

    @property
    def share(self) -> int:
        """Samples of one GPU."""
        return self.config.batch // self.gpus

    @property
    def micro(self) -> int:
        """Samples of one forward with gradient."""
        return min(self.machine.micro_batch or self.share, self.share)

    @property
    def fsdp(self) -> bool:
        """Whether networks are sharded."""
        return self.machine.parallel == "fsdp" and self.gpus > 1

    @property
    def autoencoder(self) -> bool:
        """Whether the autoencoder is on the GPU: for sample grids, or to encode pictures."""
        return self.sample_grids or isinstance(self.config, FinetuneConfig)

    @property
    def dtype(self) -> torch.dtype:
        """Of compute copies and cached embeddings."""
        found: torch.dtype = getattr(torch, self.config.dtype)
        return found


@dataclass(frozen=True)
class Passes:
    """Network passes of one iteration, in samples per sample of the batch."""

    rollout: float
    """Passes without gradient from noise to the point that is trained: the student's (consistency: the teacher's).

    Averaged over the iterations that share a rollout."""
    student: int
    """Student forwards with gradient in a student step, before its one backward."""
    teacher: int
    fake: int
    """No-gradient passes of a student step."""
    old: int = 0
    """No-gradient passes of the student that is kept (`training/keep.py`)."""
    derivative: bool = False
    """Whether a student step takes the derivative along the trajectory (`training/consistency.py`)."""

    @classmethod
    def of(cls, config: OptimConfig) -> Passes:
        """As the loop runs them: a rollout of N ~ U{1…n_max} steps, cut at an anchor k ~ U{0…N−1}."""
        if isinstance(config, ConsistencyConfig):
            guided = 1 if config.guidance == 1 else 2
            return cls(guided * (config.n_max + 3) / 4, 1, guided, 0, derivative=True)
        if not isinstance(config, CDMConfig):
            return cls(0.0, 1, 0, 0)  # flow matching
        if config.schedule == "fixed":
            full, cut = float(config.fixed_steps), (config.fixed_steps + 1) / 2
        else:
            full, cut = (config.n_max + 1) / 2, (config.n_max + 3) / 4
        anchored = [weight for weight in (config.weight_ca, config.weight_dm) if weight]
        terms = len(anchored) + bool(config.weight_cdm)
        emptied = terms if config.dm_guidance != 1 else int(config.weight_ca > 0)
        old = int(isinstance(config, KeepConfig) and bool(config.keep_weight and config.keep_share))
        at_anchor = (bool(anchored) if config.shared_forward else len(anchored)) or old
        matched = terms - int(config.weight_ca > 0)
        forwards = at_anchor + bool(config.weight_cdm)
        rollout = (cut if config.truncated_rollout else full) / iterations_of_a_rollout(config)
        return cls(rollout, forwards, terms + emptied, matched, old)


def iterations_of_a_rollout(config: OptimConfig) -> int:
    """Iterations that learn from one rollout."""
    return config.student_every if isinstance(config, CDMConfig) and config.shared_rollout else 1


class Role:
    """Weights that are trained: shapes of all, and of those with a gradient."""

    def __init__(self, setup: Setup, traces: Traces) -> None:
        self.setup, self.traces = setup, traces

    @cached_property
    def trained(self) -> list[int]:
        """Numbers per tensor that this GPU trains: all, or its shard along the first axis."""
        return [
            self._part(parameter) for parameter in self.traces.net.parameters() if parameter.requires_grad
        ]

    @property
    def count(self) -> int:
        """Numbers that this GPU trains."""
        return sum(self.trained)

    @cached_property
    def learning(self) -> list[int]:
        """Of `trained`, tensors that get a gradient, and so moments."""
        idle = self.traces.steps(1).idle
        return [numbers for index, numbers in enumerate(self.trained) if index not in idle]

    def _part(self, parameter: torch.Tensor) -> int:
        if not self.setup.fsdp:
            return parameter.numel()
        return math.ceil(parameter.shape[0] / self.setup.gpus) * (parameter.numel() // parameter.shape[0])

    def persistent(self, name: str) -> Bytes:
        """Compute copies, float32 masters, moments. What shares memory is counted once."""
        item = self.setup.dtype.itemsize
        copies = sum(buffer.numel() for buffer in self.traces.net.buffers()) * item
        # Float32 copies are the masters themselves. FSDP2 shards copies and masters alike.
        if item < FLOAT32:
            copies += self.count * item
        if self.traces.compute.rank:  # the base is the teacher's
            copies = self.count * item if item < FLOAT32 else 0
        return {
            f"{name}: compute copies": copies,
            f"{name}: float32 masters": self.count * FLOAT32,
            f"{name}: AdamW moments": self.moments(),
        }

    def moments(self) -> int:
        """Two per weight, in float32 or 8 bits."""
        if self.setup.config.optimizer == "adamw":
            return 2 * FLOAT32 * sum(self.learning)
        return sum(
            2 * (n + math.ceil(n / BLOCK_8BIT) * FLOAT32) if n >= LEAST_8BIT else 2 * FLOAT32 * n
            for n in self.learning
        )

    def gradient_bytes(self) -> int:
        """Of accumulated gradients before the optimizer's turn, in the compute copies' dtype."""
        return sum(self.learning) * self.setup.dtype.itemsize

    def backward(self, timeline: Timeline, samples: int, accumulates: bool) -> Bytes:
        """Activations and gradients at the worst moment of forwards and backward; the sum is the peak."""
        if accumulates:
            # Gradients of earlier micro-batches lie there already; each new one lives until it is added.
            largest = max(p.numel() for p in self.traces.net.parameters() if p.requires_grad)
            return {
                "gradients": self.gradient_bytes(),
                "activations": int(timeline.at(samples).max()) + largest * self.setup.dtype.itemsize,
            }
        scaled = timeline.gradients * (self.gradient_bytes() / timeline.gradients[-1])
        worst = int((timeline.at(samples) + scaled).argmax())
        return {"gradients": int(scaled[worst]), "activations": int(timeline.at(samples)[worst])}
