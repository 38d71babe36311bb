"""`cdm-serve` around an engine that costs nothing: every picture was painted before anybody asked.

    python -m benchmarks.prepared --engine fake --port 8000

The fake engine takes no time only on paper: it paints, which costs it more processor time than HTTP does. Here its
calls answer at once, so that what is left is the surface: HTTP, validation, admission, scheduling, threads, image
encoding.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cdm_serve.main import main
from engines.base import Conditioning, Sample, TokenIds
from engines.fake import FakeEngine

_paint = FakeEngine.decode


def _encode(self: FakeEngine, tokens: Sequence[TokenIds]) -> list[Conditioning]:
    del self
    return [_code()] * len(tokens)


def _denoise(
    self: FakeEngine, samples: Sequence[Sample], sigma: Any, sigma_next: Any, conditioning: Any
) -> tuple[list[Sample], list[Sample]]:
    del self, sigma, sigma_next, conditioning
    return list(samples), list(samples)


def _decode(self: FakeEngine, samples: Sequence[Sample]) -> NDArray[np.uint8]:
    shape = samples[0].shape
    if shape not in _painted:
        _painted[shape] = _paint(self, samples[:1])
    return np.broadcast_to(_painted[shape], (len(samples), *_painted[shape].shape[1:]))


_painted: dict[tuple[int, ...], NDArray[np.uint8]] = {}


@cache
def _code() -> NDArray[np.float32]:
    return np.zeros((3, 4), np.float32)


def serve(argv: Sequence[str] | None = None) -> int:
    """`cdm-serve`, with the fake engine's three calls replaced."""
    for name, call in (("encode", _encode), ("denoise", _denoise), ("decode", _decode)):
        setattr(FakeEngine, name, call)
    return main(argv)


if __name__ == "__main__":
    raise SystemExit(serve())
