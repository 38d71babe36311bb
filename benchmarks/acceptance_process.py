"""Each contender in a process of its own, told what to do a line at a time: a crash or a poisoned GPU is its alone.

    with Process(log, environment={"TRITON_CACHE_DIR": "…"}) as process:
        process.call("load", bundle="…", options={"runtime": "torch"})       # → plain data
        process.call("turn", batch=1, size=[512, 512], steps=4)

An operation is a method of `benchmarks.acceptance_worker.Worker`; numbers and strings go through pipes, arrays through
files. What the process prints goes to its log.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self

from benchmarks.acceptance_report import Missed, Skipped

SILENT_S = 3600.0
"""A call that has not ended by then is given up, and its process ended: a hang must not end the acceptance."""


class Operator(Protocol):
    """What runs operations: a process, or a `Worker` at hand."""

    def call(self, operation: str, **arguments: Any) -> Any: ...

    def close(self) -> None: ...


class Process:
    """A `python -m benchmarks.acceptance_worker`. Its answers are raised as `Skipped` and `Missed` too."""

    def __init__(
        self, log: Path, environment: Mapping[str, str] | None = None, silent_s: float = SILENT_S
    ) -> None:
        log.parent.mkdir(parents=True, exist_ok=True)
        self._log = log
        self._silent_s = silent_s
        with log.open("ab") as file:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "benchmarks.acceptance_worker"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=file,
                env={**os.environ, **(environment or {})},
            )

    def call(self, operation: str, **arguments: Any) -> Any:
        """Run one operation.

        Raises:
            Skipped: it wants something that is not installed.
            Missed: it failed, its process died, or it was silent for too long.
        """
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin is not None
        assert stdout is not None
        try:
            stdin.write(json.dumps([operation, arguments]).encode() + b"\n")
            stdin.flush()
        except BrokenPipeError:
            raise Missed(self._ended(operation)) from None
        answer = self._line(stdout.fileno(), operation)
        if not answer:
            raise Missed(self._ended(operation))
        kind, value = json.loads(answer)
        if kind == "skipped":
            raise Skipped(value)
        if kind == "failed":
            raise Missed(value)
        return value

    def _line(self, descriptor: int, operation: str) -> bytes:
        """The answer, or nothing if the process has ended."""
        answer, until = b"", time.monotonic() + self._silent_s
        while not answer.endswith(b"\n"):
            ready, _, _ = select.select([descriptor], [], [], max(0.0, until - time.monotonic()))
            if not ready:
                self._process.kill()
                raise Missed(f"{operation} had not ended after {self._silent_s:g} s; {self._log} may say why")
            read = os.read(descriptor, 1 << 16)
            if not read:
                return b""
            answer += read
        return answer

    def _ended(self, operation: str) -> str:
        code = self._process.wait()
        how = f"signal {-code}" if code < 0 else f"exit code {code}"
        tail = self._log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        return f"the process of {operation} ended with {how}: {tail[-1] if tail else 'it said nothing'}"

    def close(self) -> None:
        """Let it end, or end it."""
        if self._process.stdin is not None:
            with contextlib.suppress(
                BrokenPipeError
            ):  # it is dead, and what it was last told is still unsent
                self._process.stdin.close()
        try:
            self._process.wait(60)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        if self._process.stdout is not None:
            self._process.stdout.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
