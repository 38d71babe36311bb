"""`cdm-bench`: measure what is claimed. Every command prints a table, then one JSON line."""

from __future__ import annotations

from collections.abc import Sequence

from engines.commands import Command, run_commands

COMMANDS = {
    "engine": Command(
        "benchmarks.engine:EngineBenchSettings",
        "benchmarks.engine:run",
        "one request through the bundle, beside diffusers and the teacher",
        extra="bench",
    ),
    "http": Command(
        "benchmarks.http:HttpBenchSettings",
        "benchmarks.http:run",
        "what HTTP, scheduling and image encoding add to the engine's own time",
        extra="bench",
        epilog="cdm-bench http --requests 200\ncdm-bench http --url http://127.0.0.1:8000 --steps 1",
        user_errors=("benchmarks.server:ServerError",),
    ),
    "coldstart": Command(
        "benchmarks.coldstart:ColdStartSettings",
        "benchmarks.coldstart:run",
        "from the start of cdm-serve to the first picture; install time and size",
        extra="bench",
        epilog="cdm-bench coldstart --runs 5\ncdm-bench coldstart --install",
        user_errors=("benchmarks.server:ServerError",),
    ),
}
"""Nothing is imported before its command is asked for."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the sub-command that `argv` (default: the process's arguments) begins with."""
    return run_commands(COMMANDS, argv, "cdm-bench", "Measure engines and servers.")


if __name__ == "__main__":
    raise SystemExit(main())
