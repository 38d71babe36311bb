"""Sub-commands: one console script, many settings classes, nothing imported before it is asked for.

COMMANDS = {"emoji-data": Command("training.emoji.build:EmojiDataSettings", "training.emoji.build:build", "…")}

def main(argv: Sequence[str] | None = None) -> int:
    return run_commands(COMMANDS, argv, "cdm-train", "Distil a teacher into a few-step student.")
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from engines.cli import (
    DISTRIBUTION,
    USAGE_ERROR,
    CommandSettings,
    Parser,
    UsageError,
    add_version,
    fail,
    hint,
    run_command,
    until_reader_leaves,
)


@dataclass(frozen=True)
class Command:
    """One sub-command; everything as `"module:name"`, imported only when the command is asked for.

    `user_errors` are exceptions whose message is for the user, subclasses included; `extra` is the package extra that
    installs what the module imports.
    """

    settings: str
    main: str
    help: str
    extra: str = ""
    epilog: str = ""
    user_errors: tuple[str, ...] = field(default=())


def run_commands(
    commands: Mapping[str, Command], argv: Sequence[str] | None, prog: str, about: str = ""
) -> int:
    """Run the sub-command that `argv` begins with; the others are not even imported."""
    return until_reader_leaves(lambda: _run_commands(commands, argv, prog, about))


def _run_commands(commands: Mapping[str, Command], argv: Sequence[str] | None, prog: str, about: str) -> int:
    arguments = list(sys.argv[1:] if argv is None else argv)
    parser = Parser(
        prog=prog,
        description=about,
        epilog=_commands_help(commands, prog),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        usage=f"{prog} COMMAND [--flag value …]",
    )
    add_version(parser, prog)
    if not arguments:
        parser.print_help(sys.stderr)
        return USAGE_ERROR
    name = arguments[0]
    try:
        if name.startswith("-"):
            parser.parse_args(arguments)
        if name not in commands:
            raise UsageError(
                f"there is no command {name!r}{hint(name, commands)}; commands: {', '.join(commands)}"
            )
        command = commands[name]
        settings_class: type[CommandSettings] = _load(command.settings, command, name)
    except UsageError as error:
        return fail(prog, str(error))

    def main(settings: CommandSettings) -> object:
        return _load(command.main, command, name)(settings)

    return run_command(
        settings_class, main, arguments[1:], f"{prog} {name}", command.epilog, command.user_errors
    )


def _load(target: str, command: Command, name: str) -> Any:
    module_name, _, attribute = target.partition(":")
    with importing(name, command.extra):
        return getattr(importlib.import_module(module_name), attribute)


@contextmanager
def importing(command: str, extra: str) -> Iterator[None]:
    """Imports in the body that fail for want of a package end as a `UsageError` naming `extra` (if there is one)."""
    try:
        yield
    except ModuleNotFoundError as error:
        package = (error.name or "").split(".")[0]
        if package in ("engines", "training", "benchmarks", "cdm_serve") or not extra:
            raise
        raise UsageError(
            f"{command} needs the package {package!r}, which is not installed; "
            f"pip install '{DISTRIBUTION}[{extra}]'"
        ) from error


def _commands_help(commands: Mapping[str, Command], prog: str) -> str:
    width = max(map(len, commands))
    lines = [f"  {name:<{width}}  {command.help}" for name, command in commands.items()]
    return "commands:\n" + "\n".join(lines) + f"\n\n{prog} COMMAND --help shows a command's flags"
