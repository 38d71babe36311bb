"""How long an iteration takes: FLOPs counted from the loop and the model, bytes of updates and of communication.

A GPU runs matrix products at some share of its peak, `efficiency`, which is an assumption that can be set; the ratios
between settings depend on it little.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from training.config import CDMConfig, ConsistencyConfig, KeepConfig, OptimConfig
from training.plan_memory import Memory
from training.plan_setup import FLOAT32, Role, iterations_of_a_rollout


@dataclass(frozen=True)
class Gpu:
    """Data sheet figures: dense TFLOP/s without sparsity in bfloat16 and in float32 (no TF32), GB/s, GB."""

    bfloat16: float
    float32: float
    bandwidth: float
    memory: float
    link: float
    """GB/s to other GPUs, one way: NVLink or PCI Express."""


GPUS: Mapping[str, Gpu] = {
    "b200": Gpu(2250, 75, 8000, 180, 900),
    "h200": Gpu(989, 67, 4800, 141, 450),
    "h100": Gpu(989, 67, 3350, 80, 450),
    "a100": Gpu(312, 19.5, 2039, 80, 300),
    "a100-40": Gpu(312, 19.5, 1555, 40, 300),
    "l40s": Gpu(362, 91.6, 864, 48, 32),
    "a6000": Gpu(155, 38.7, 768, 48, 32),
    "l4": Gpu(121, 30.3, 300, 24, 32),
    "5090": Gpu(209, 104.8, 1792, 32, 64),
    "4090": Gpu(165, 82.6, 1008, 24, 32),
    "3090": Gpu(71, 35.6, 936, 24, 32),
}
"""`--gpu` → figures."""


@dataclass(frozen=True)
class Speed:
    """Of one GPU."""

    tflops: float
    """Peak of its matrix products."""
    bandwidth: float
    """GB/s of its memory."""
    efficiency: float
    """Share of the peak that a training step reaches."""
    link: float = 100.0
    """GB/s to other GPUs."""


@dataclass(frozen=True)
class Work:
    """One part of an iteration, averaged over iterations, on one GPU."""

    name: str
    flops: float
    moved: float = 0.0
    """Bytes of GPU memory, by optimizer, averages and copies."""
    sent: float = 0.0
    """Bytes between GPUs."""

    def seconds(self, speed: Speed) -> float:
        """None of the three overlaps another."""
        computing = self.flops / (speed.tflops * 1e12 * speed.efficiency)
        return computing + self.moved / (speed.bandwidth * 1e9) + self.sent / (speed.link * 1e9)


def iteration(memory: Memory) -> list[Work]:
    """Rollout, fake step and student step: an average iteration."""
    setup, config, passes = memory.setup, memory.setup.config, memory.passes
    share, traces, fake = setup.share, memory.student.traces, memory.fake
    steps, parts = traces.steps(passes.student), -(-share // setup.micro)
    work = []
    if passes.rollout:
        walker = memory.plain if fake is None else traces
        # Every step of a rollout is a pass of its own: all samples are through after the last one's.
        walked = parts * longest(memory) / iterations_of_a_rollout(config)
        flops = share * passes.rollout * walker.no_gradient.forward_flops
        work.append(Work("rollout", flops, sent=_gathers(memory, walked)))
    asked = (passes.teacher + passes.old) * memory.plain.no_gradient.forward_flops
    if fake is not None:
        learnt = fake.traces.steps(1)
        flops = share * (learnt.forward_flops + learnt.backward_flops)
        merge = 18 * fake.count if config.fake_merge < 1 else 0  # type: ignore[attr-defined]
        moved, sent = _update(fake, memory, parts)
        work.append(Work("fake step", flops, moved + merge, sent + _gathers(memory, 2 * parts)))
        asked += passes.fake * fake.traces.no_gradient.forward_flops
    if isinstance(config, ConsistencyConfig):
        asked += traces.derivative(config.tangent_step).forward_flops
    flops = share * (steps.forward_flops + steps.backward_flops + asked)
    moved, sent = _update(memory.student, memory, parts)
    moved += 3 * FLOAT32 * memory.student.count  # the average: two read, one written
    through = 2 * passes.student + bool(passes.teacher) + bool(passes.fake) + passes.old
    sent += _gathers(memory, through * parts)
    turns = student_turns(config)
    work.append(Work("student step", flops * turns, moved * turns, sent * turns))
    return work


def student_turns(config: OptimConfig) -> float:
    """Share of iterations in which the student takes a step."""
    if not isinstance(config, CDMConfig):
        return 1.0
    turns = 1 / config.student_every
    return turns * (1 - config.fake_warmup / config.steps) if isinstance(config, KeepConfig) else turns


def longest(memory: Memory) -> float:
    """Passes of one rollout of a micro-batch: up to its last anchor, the mean over N of E[max k] + 1.

    With FSDP all N: processes that share weights run as many.
    """
    config = memory.setup.config
    assert isinstance(config, CDMConfig | ConsistencyConfig)
    samples, cut = memory.setup.micro, not memory.setup.fsdp

    def last(n: int) -> float:
        return n - sum((i / n) ** samples for i in range(1, n))

    fixed = isinstance(config, CDMConfig) and config.schedule == "fixed"
    lengths = [config.fixed_steps] if fixed else range(1, config.n_max + 1)  # type: ignore[union-attr]
    cut = cut and (not isinstance(config, CDMConfig) or config.truncated_rollout)
    return sum(last(n) if cut else n for n in lengths) / len(lengths)


def seconds(memory: Memory, speed: Speed) -> float:
    """Of an average iteration."""
    return sum(part.seconds(speed) for part in iteration(memory))


def _update(role: Role, memory: Memory, parts: int) -> tuple[float, float]:
    """(bytes moved, bytes sent) of one update after `parts` micro-batches."""
    item, setup = memory.setup.dtype.itemsize, memory.setup
    converted = 0 if item == FLOAT32 else item + FLOAT32  # the gradient
    refreshed = 0 if item == FLOAT32 else FLOAT32 + item  # the compute copies
    moments = 2 * role.moments()  # read and written
    moved = role.count * (converted + FLOAT32 + 3 * FLOAT32 + refreshed) + moments
    # FSDP2 reduces and scatters every micro-batch's gradients, whole; else they are averaged once, there and back.
    ring = (setup.gpus - 1) / setup.gpus * (setup.gpus * parts if setup.fsdp else 2)
    sent = ring * FLOAT32 * role.count
    return float(moved), sent


def _gathers(memory: Memory, passes: float) -> float:
    """Bytes that FSDP2 gathers for so many passes over a network."""
    setup = memory.setup
    if not setup.fsdp:
        return 0.0
    whole = sum(parameter.numel() for parameter in memory.plain.net.parameters())
    return passes * whole * setup.dtype.itemsize * (setup.gpus - 1) / setup.gpus
