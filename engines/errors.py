"""What can go wrong between a folder of weights and a running engine.

EngineError
├── BundleError        the folder is not a bundle this version can serve (hash, version, schedule, file)
├── RuntimeUnavailable the runtime is unknown, or its packages or device are missing here
├── CostTableError     a file is no table of what engine calls take
├── ExportError        a model cannot be exported, or its export does not match torch
└── ExecutionError     one call failed while running; the engine itself may still be usable
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


class EngineError(Exception):
    """Base of every error that `engines` raises for a user's mistake or a failing device."""


class BundleError(EngineError):
    """The folder is not a bundle that this version can serve."""


class RuntimeUnavailable(EngineError):
    """The asked-for runtime is unknown, or cannot run on this machine."""


class CostTableError(EngineError):
    """The file is no table of what engine calls take."""


class ExportError(EngineError):
    """A model cannot be exported, or its exported form is not the same model."""


class ExecutionError(EngineError):
    """One engine call failed; the requests in that call fail, the process does not."""


@contextmanager
def loading(runtime: str, component: str) -> Iterator[None]:
    """What the runtime's package raises becomes `RuntimeUnavailable`: the packages' errors share no base."""
    try:
        yield
    except EngineError:
        raise
    except Exception as error:
        # The last line: OpenVINO begins with the places in its source that an error went through.
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        reason = lines[-1][:300] if lines else type(error).__name__
        raise RuntimeUnavailable(
            f"{runtime} cannot load the {component} here ({type(error).__name__}: {reason}); "
            "choose another --engine or --precision"
        ) from error
