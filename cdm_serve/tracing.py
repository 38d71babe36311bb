"""What tracing needs to know of a picture on its way: which engine calls it was in, and when.

The part that works without OpenTelemetry: `open_tracing` imports `otel.py` only when spans are to be sent somewhere.
The engine's threads write times down; spans are made of them when the picture leaves, on a thread that keeps no engine
waiting.

    tracing = open_tracing("http://localhost:4318")          # None: off
    app = FastAPI(telemetry=telemetry(tracing))              # a span for every request
    with tracing.following(pictures, "emoji"):               # one for each picture, inside the request's
        runner.submit(pictures)
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import count
from typing import TYPE_CHECKING

from fastapi.telemetry import TelemetryConfig

from cdm_serve.front import PROBES
from engines.cli import UsageError

if TYPE_CHECKING:
    from cdm_serve.costs import Stage
    from cdm_serve.otel import Tracing
    from cdm_serve.picture import Picture

_ids = count(1)


@dataclass(frozen=True, slots=True, eq=False)
class EngineCall:
    """One call of the engine, shared by the pictures of `trails` and by those that are not traced.

    `batch`: what the engine was given (texts or samples). Times by `time.perf_counter`. `error`: what it raised.
    """

    stage: Stage
    batch: int
    started: float
    ended: float
    trails: tuple[Trail, ...]
    preview: bool
    error: Exception | None
    id: int = field(default_factory=lambda: next(_ids))


class Trail(ABC):
    """One traced picture. Every method may be called by any thread."""

    @abstractmethod
    def called(self, call: EngineCall) -> None:
        """It was in `call`."""

    @abstractmethod
    def encoded(self, started: float, preview: bool = False) -> None:
        """Making a file of it took from `started` (`time.perf_counter`) till now."""

    @abstractmethod
    def end(self, error: Exception | None = None) -> None:
        """It is finished, or it failed by `error`. Only the first of several ends counts."""


def remember(
    pictures: Sequence[Picture],
    stage: Stage,
    batch: int,
    started: float,
    preview: bool = False,
    error: Exception | None = None,
) -> float:
    """The seconds that an engine call took which ends now; those of `pictures` that are traced hear of it."""
    ended = time.perf_counter()
    if trails := tuple(picture.trail for picture in pictures if picture.trail is not None):
        call = EngineCall(stage, batch, started, ended, trails, preview, error)
        for trail in trails:
            trail.called(call)
    return ended - started


def open_tracing(endpoint: str | None) -> Tracing | None:
    """Tracing whose spans go to the OTLP/HTTP collector at `endpoint`; None: none, and nothing is imported.

    Raises `UsageError` if the packages are missing.
    """
    if endpoint is None:
        return None
    try:
        from cdm_serve.otel import Tracing
    except ImportError as error:
        raise UsageError(
            f"--otlp-endpoint={endpoint} needs the package {error.name!r}, which is not installed; "
            "pip install 'cdm-serve[otel]', or leave the flag out"
        ) from error
    return Tracing.to(endpoint)


def telemetry(tracing: Tracing | None) -> TelemetryConfig:
    """What FastAPI's own instrumentation shall do: server spans if tracing is on, and nothing that nobody asked for.

    By itself it obeys OpenTelemetry's global providers, and would log exceptions' messages, which may quote a prompt.
    """
    return {
        "tracing": tracing is not None,
        "tracer_provider": None if tracing is None else tracing.provider,
        "exclude": lambda scope: scope.get("path") in PROBES,
        "operation_spans": False,
        "metrics": False,
        "logs": False,
        "auto_configure": False,
    }
