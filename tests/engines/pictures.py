"""One way for the engine tests to make pictures, alone or many at once."""

from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from engines.base import Engine
from engines.noise import noise


class Job(NamedTuple):
    """One picture: `size` is (height, width) in latent pixels."""

    prompt: str
    seed: int
    steps: int
    size: tuple[int, int] = (8, 8)


def starting_noise(engine: Engine, job: Job) -> NDArray[np.float32]:
    return noise(job.seed, (engine.manifest.latent.channels, *job.size))


def draw(engine: Engine, jobs: list[Job]) -> NDArray[np.uint8]:
    """All `jobs` (of one size) in one batch; each leaves it when its own schedule ends."""
    conditioning = engine.encode([engine.tokenize(job.prompt) for job in jobs])
    samples = [engine.put(starting_noise(engine, job)) for job in jobs]
    schedules = [list(pairwise(engine.manifest.sigmas(job.steps))) for job in jobs]
    for step in range(max(len(schedule) for schedule in schedules)):
        rows = [row for row, schedule in enumerate(schedules) if step < len(schedule)]
        moved, _ = engine.denoise(
            [samples[row] for row in rows],
            [schedules[row][step][0] for row in rows],
            [schedules[row][step][1] for row in rows],
            [conditioning[row] for row in rows],
        )
        for row, sample in zip(rows, moved, strict=True):
            samples[row] = sample
    return engine.decode(samples)


def worst(a: NDArray[np.uint8], b: NDArray[np.uint8]) -> int:
    """The largest difference of any value, of 255."""
    return int(np.abs(a.astype(np.int16) - b.astype(np.int16)).max())
