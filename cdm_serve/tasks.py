"""What the policy sees of a picture, and what it answers: plain records."""

from __future__ import annotations

from dataclasses import dataclass, field
from math import inf

from cdm_serve.costs import Bucket, Stage


@dataclass(slots=True)
class Task:
    """One picture, as the policy sees it. Times in seconds; `steps` as asked for.

    `min_steps` below `steps` lets the scheduler finish it in fewer. `encoded`: its text needs no encoding.
    """

    id: int
    bucket: Bucket
    steps: int
    arrival: float
    deadline: float = inf
    priority: int = 0
    min_steps: int | None = None
    encoded: bool = False
    done: int = field(default=0, init=False)
    planned: int = field(default=0, init=False)
    running: bool = field(default=False, init=False)

    @property
    def stage(self) -> Stage:
        """What it needs next."""
        if not self.encoded:
            return "encode"
        return "denoise" if self.left else "decode"

    @property
    def left(self) -> int:
        """Denoising steps still to run under the present plan."""
        return self.planned - self.done

    def capped(self, cap: int) -> int:
        """Total steps under `cap`. One that has begun needs a last step to σ = 0, unless it was that step."""
        floor = self.steps if self.min_steps is None else self.min_steps
        if self.done and self.done == self.planned:
            return self.planned
        return max(min(self.steps, cap), floor, self.done + 1)


@dataclass(frozen=True, slots=True)
class Call:
    """One engine call: a stage, who takes part (first in order first), and the steps each has left before it."""

    stage: Stage
    bucket: Bucket
    ids: tuple[int, ...]
    left: tuple[int, ...]
