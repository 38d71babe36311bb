"""TensorRT-RTX and TensorRT: two packages with one Python API, and what differs between them.

library = open_library("tensorrt-rtx")
library.title                       # "TensorRT-RTX 1.7.1.116"
library.targets                     # ("7.5", "8.0", "8.6", "8.9", "12.0", "12.1")
"""

from __future__ import annotations

import importlib
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

from engines.errors import RuntimeUnavailable

log = logging.getLogger("engines.tensorrt")

RTX = "tensorrt-rtx"
PACKAGES = {RTX: "tensorrt_rtx", "tensorrt": "tensorrt"}
"""Runtime → the package that it is."""

KEPT = ("Max Scratch Memory", "Layers:")
"""How the lines of a build log begin that a report is read from; there are thousands of others."""


@dataclass(frozen=True)
class Library:
    """One of the two, by its runtime's name; `trt` is the package."""

    runtime: str
    trt: Any

    @property
    def rtx(self) -> bool:
        """Whether it builds for a named compute capability, and compiles kernels for exact shapes on the device."""
        return self.runtime == RTX

    @property
    def version(self) -> str:
        return str(self.trt.__version__)

    @property
    def title(self) -> str:
        """For messages."""
        return f"{'TensorRT-RTX' if self.rtx else 'TensorRT'} {self.version}"

    @property
    def logger(self) -> Any:
        """The one that every object of the package is made with."""
        return _logger(self.trt)

    @property
    def flags(self) -> tuple[str, ...]:
        """Builder flags to set. RTX: an engine not built so may not be capturable into a CUDA graph."""
        return ("REQUIRE_USER_ALLOCATION",) if self.rtx else ()

    @property
    def targets(self) -> tuple[str, ...]:
        """The compute capabilities that TensorRT-RTX builds for, as "8.9"."""
        names = [name.removeprefix("SM") for name in dir(self.trt.ComputeCapability) if name.startswith("SM")]
        return tuple(f"{name[:-1]}.{name[-1]}" for name in sorted(names, key=int))

    def check_target(self, capability: str) -> None:
        """Refuse a compute capability that TensorRT-RTX has no target for.

        Raises:
            RuntimeUnavailable: says which it has.
        """
        if self.rtx and capability not in self.targets:
            raise RuntimeUnavailable(
                f"compute capability {capability} is no target of {self.title}, which has {', '.join(self.targets)}; "
                "use another runtime there"
            )


def open_library(runtime: str, trt: Any = None) -> Library:
    """The package of `runtime`, or `trt` in its place.

    Raises:
        RuntimeUnavailable: it is not installed, or cannot be loaded.
    """
    package = PACKAGES[runtime]
    try:
        return Library(runtime, trt or importlib.import_module(package))
    except (ImportError, OSError, RuntimeError) as error:  # its libraries are loaded as it is imported
        raise RuntimeUnavailable(
            f"runtime {runtime!r} needs the package {package!r}, which cannot be imported here ({error})"
        ) from error


def first_line(message: str) -> str:
    """Of a log message, to end a sentence with."""
    return (message.strip().splitlines() or ["it says nothing of why"])[0].rstrip(".")


@cache
def _logger(trt: Any) -> Any:
    """One per package and process: TensorRT keeps the first that it is given, and warns of others."""

    class Logger(trt.ILogger):  # type: ignore[misc]
        """Errors are kept for whoever called to tell; warnings go to `logging`."""

        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self._lines: list[str] = []
            self._error = ""

        def log(self, severity: Any, message: str) -> None:
            """Called by TensorRT, on any of its threads."""
            if severity in (trt.ILogger.INTERNAL_ERROR, trt.ILogger.ERROR):
                self._error = message
            if severity != trt.ILogger.VERBOSE and severity != trt.ILogger.INFO:
                log.debug("%s", message)
            if message.startswith(KEPT):
                self._lines.append(message)

        def why(self) -> str:
            """What went wrong last, told once."""
            message, self._error = self._error, ""
            return first_line(message)

        @contextmanager
        def recording(self) -> Iterator[list[str]]:
            """The lines that a report is read from, one recording at a time."""
            self._lines, self._error = [], ""
            yield self._lines

    return Logger()
