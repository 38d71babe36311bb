"""The noun that travels: one picture, from acceptance to pixels."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextvars import Context, copy_context
from dataclasses import dataclass, field
from itertools import count
from math import inf
from typing import TYPE_CHECKING, Literal

import numpy as np
from numpy.typing import NDArray

from cdm_serve.errors import ServeError
from engines.base import Conditioning, Sample, TokenIds

if TYPE_CHECKING:
    from cdm_serve.tracing import Trail

_ids = count(1)

Source = Literal["made", "shared", "kept"]
"""Whether a picture was made for its request, for another that asked for the same, or before (`results.py`)."""


@dataclass(slots=True)
class Spans:
    """Where one picture's time went: seconds of real spans. `denoise` is the sum of its steps', `preview` of its
    previews' decoding, `queue` of its waiting, before its first call and between its calls."""

    others: float = 0.0
    """Of `queue`: while the engine was in calls of others."""
    queue: float = 0.0
    encode: float = 0.0
    denoise: float = 0.0
    preview: float = 0.0
    decode: float = 0.0
    image_encode: float = 0.0


STAGES = tuple(name for name in Spans.__dataclass_fields__ if name != "others")


@dataclass(eq=False, slots=True)
class Picture:
    """One picture on its way. Sizes in pixels, times by `time.perf_counter`; only the runner writes the late fields.

    `remaining` is its schedule from where it stands; the scheduler may shorten it to `min_steps` steps in all.
    `reply` is called at most once, on any thread, with uint8 `(height, width, 3)` or with an error.
    """

    tokens: TokenIds
    seed: int
    remaining: tuple[float, ...]
    width: int
    height: int
    reply: Callable[[Picture, NDArray[np.uint8] | ServeError], None]
    preview: Callable[[Picture, NDArray[np.uint8]], None] | None = None
    """Called like `reply`, with x̂0 decoded, after some of the steps before the last."""
    previews: int = 0
    """How many of them are wanted; fewer come when there are fewer steps."""
    deadline: float = inf
    priority: int = 0
    min_steps: int | None = None
    source: Source = "made"
    id: int = field(default_factory=lambda: next(_ids))
    arrival: float = field(default_factory=time.perf_counter)
    context: Context = field(default_factory=copy_context)
    """Its request's: what other threads do for it is logged under its id. Run copies of it: two may want it at once."""
    spans: Spans = field(default_factory=Spans, init=False)
    trail: Trail | None = field(default=None, init=False)  # Tracing.following: it is traced
    started: bool = field(default=False, init=False)  # Runner._begin: it was in a call
    conditioning: Conditioning = field(default=None, init=False)
    sample: Sample = field(default=None, init=False)
    estimate: Sample = field(default=None, init=False)  # x̂0 after its last step
    path: tuple[float, ...] = field(default=(), init=False)  # the sigma of each
    waiting: float = field(init=False)  # since when it waits for its next call
    mark: float = field(default=0.0, init=False)  # what the engine's calls had taken by then
    compute: float = field(default=0.0, init=False)  # its share of every step's span

    def __post_init__(self) -> None:
        self.waiting = self.arrival

    @property
    def step(self) -> int:
        """Steps really run."""
        return len(self.path)

    @property
    def preview_due(self) -> bool:
        """Whether x̂0 after the step just run is one of the wanted previews: those are spread evenly over the steps."""
        left = len(self.remaining) - 1
        if self.preview is None or not left:
            return False
        steps = self.step + left
        wanted = min(self.previews, steps - 1)
        return self.step * (wanted + 1) // steps > (self.step - 1) * (wanted + 1) // steps

    @property
    def bucket(self) -> tuple[int, int]:
        """What must be equal for two pictures to share an engine call."""
        return (self.width, self.height)
