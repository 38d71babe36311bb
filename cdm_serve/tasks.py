"""What the policy sees of a picture, and what it answers: plain records."""

from __future__ import annotations

from dataclasses import dataclass, field
from math import inf

from cdm_serve.costs import Bucket, Stage


@dataclass(slots=True, eq=False)
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
    level: int = field(default=0, init=False)
    """Its priority and what waiting has added to it, at the last edge."""
    least: float = field(default=0.0, init=False)
    """Seconds it needed at the last edge if it were in every call; known only where it has a deadline."""
    live: bool = field(default=False, init=False)
    """Whether it had a deadline that could still be met, at the last edge."""

    @property
    def stage(self) -> Stage:
        """What it needs next."""
        if not self.encoded:
            return "encode"
        return "denoise" if self.planned > self.done else "decode"

    @property
    def left(self) -> int:
        """Denoising steps still to run under the present plan."""
        return self.planned - self.done

    @property
    def fewest(self) -> int:
        """The least that `left` can still become. One that has begun needs a last step to σ = 0, unless it had that."""
        left = self.planned - self.done
        if self.min_steps is None or self.running or not left:
            return left
        fewest = self.min_steps - self.done
        return fewest if fewest > 1 else 1


@dataclass(frozen=True, slots=True)
class Call:
    """One engine call: a stage, who takes part (first in order first), and the steps each has left before it."""

    stage: Stage
    bucket: Bucket
    ids: tuple[int, ...]
    left: tuple[int, ...]
