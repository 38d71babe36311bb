"""What runs inside a process of the acceptance: `python -m benchmarks.acceptance_worker`, one JSON line per operation.

    ["load", {"bundle": "…", "options": {"runtime": "torch"}}]      →  ["ok", {"load s": 3.1, …}]

Nothing is imported before an operation needs it: what is missing is that operation's answer, `["skipped", "…"]`.
"""

from __future__ import annotations

import importlib
import json
import logging
import os
import sys
import traceback
from typing import Any

from benchmarks.acceptance_engine import EngineOperations
from benchmarks.acceptance_report import Missed, Skipped, is_missing, sentence

FUNCTIONS = {
    "student": "benchmarks.acceptance_model:build_student",
    "export": "benchmarks.acceptance_model:export",
    "references": "benchmarks.acceptance_model:write_references",
    "kernel": "benchmarks.acceptance_kernels:examine",
}
"""Operations that need no engine; all others are methods of `EngineOperations`."""


class Worker:
    """Runs operations in this process; `call` raises what a `Process` raises."""

    def __init__(self, engine: EngineOperations | None = None) -> None:
        self._engine = engine or EngineOperations()

    def call(self, operation: str, **arguments: Any) -> Any:
        """Run one operation.

        Raises:
            Skipped: it wants something that is not installed.
            Missed: it failed, whatever of.
        """
        try:
            if operation in FUNCTIONS:
                module, _, name = FUNCTIONS[operation].partition(":")
                return getattr(importlib.import_module(module), name)(**arguments)
            return getattr(self._engine, operation)(**arguments)
        except (Skipped, Missed):
            raise
        except Exception as error:  # any library's
            traceback.print_exc()
            if is_missing(error):
                raise Skipped(sentence(error)) from error
            raise Missed(sentence(error)) from error

    def close(self) -> None:
        """Free the engine."""
        self._engine.close()


def main() -> int:
    """Answer until nobody asks any more. Whatever libraries print goes to the log, not into the answers."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    logging.basicConfig(level=logging.INFO)
    worker = Worker()
    for line in sys.stdin:
        operation, arguments = json.loads(line)
        try:
            answer: list[Any] = ["ok", worker.call(operation, **arguments)]
        except Skipped as error:
            answer = ["skipped", str(error)]
        except Missed as error:
            answer = ["failed", str(error)]
        answers.write(json.dumps(answer) + "\n")
        answers.flush()
    worker.close()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
