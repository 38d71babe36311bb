"""The one settings mechanism of every command.

A field of a settings class is its flag (`max_batch` → `--max-batch`), its environment variable (class prefix + name,
`CDM_SERVE_MAX_BATCH`), its help with the default, and its row in the README. A flag wins over its variable. Nothing
unknown is accepted: neither a flag, nor a variable that bears the command's prefix.

    class ServeSettings(CommandSettings, env_prefix="CDM_SERVE_"):
        \"\"\"Serve pictures over HTTP.\"\"\"

        port: int = Field(8000, ge=0, le=65535, description="TCP port; 0 takes a free one")

    def main(argv: Sequence[str] | None = None) -> int:
        return run_command(ServeSettings, serve, argv, prog="cdm-serve", epilog="cdm-serve --port 8080")

Sub-commands are in `engines/commands.py`.

Exit codes: 0 done, 1 the command says so, 2 the user can put it right (`prog: error: …` lines), 130 interrupted.
"""

from __future__ import annotations

import argparse
import difflib
import importlib.metadata
import json
import os
import select
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import PurePath
from typing import Any, Literal, NoReturn, TypeVar, get_args, get_origin

from pydantic import ValidationError, WithJsonSchema
from pydantic.fields import FieldInfo
from pydantic_settings import (
    BaseSettings,
    CliSettingsSource,
    EnvSettingsSource,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    SettingsError,
)

from engines.errors import EngineError

DISTRIBUTION = "cdm-serve"
USAGE_ERROR = 2

Settings = TypeVar("Settings", bound="CommandSettings")


class UsageError(Exception):
    """The command line or the environment asks for something that does not exist. One sentence."""


class _Environment(EnvSettingsSource):
    """Environment variables, where a list may be written as on the command line: `1,2,4` as well as `[1,2,4]`."""

    def decode_complex_value(self, field_name: str, field: FieldInfo, value: Any) -> Any:
        try:
            decoded = super().decode_complex_value(field_name, field, value)
        except ValueError:
            decoded = None
        return (
            decoded if isinstance(decoded, (list, dict)) else [part.strip() for part in str(value).split(",")]
        )


class CommandSettings(BaseSettings):
    """Base of every command's settings: frozen, nothing extra, the docstring is the command's help.

    Subclasses name their `env_prefix` as a class keyword; without one the environment is not read.
    """

    model_config = SettingsConfigDict(
        frozen=True,
        extra="forbid",
        cli_kebab_case=True,
        cli_implicit_flags=True,
        cli_hide_none_type=True,
        cli_avoid_json=True,
    )

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Arguments, then the environment; no files."""
        if not cls.model_config.get("env_prefix"):
            return (init_settings,)
        return init_settings, _Environment(settings_cls)


def run_command(
    settings_class: type[Settings],
    main: Callable[[Settings], object],
    argv: Sequence[str] | None = None,
    prog: str = DISTRIBUTION,
    epilog: str = "",
    user_errors: Sequence[str | type[Exception]] = (),
) -> int:
    """Parse flags and environment, run `main(settings)` and return the exit code: what it returns, if that is an int.

    `epilog` holds example commands. `EngineError`, `UsageError` and `user_errors` (classes, or `"module:Class"`) end
    as `prog: error: …`, exit 2.
    """
    return until_reader_leaves(lambda: _run_command(settings_class, main, argv, prog, epilog, user_errors))


def until_reader_leaves(run: Callable[[], int]) -> int:
    """What `run` returns; 0 when whoever read its output has closed the pipe, as `| head` does."""
    try:
        try:
            return run()
        finally:
            sys.stdout.flush()  # here, not when the interpreter ends, where nobody can catch it
    except BrokenPipeError:
        output = select.poll()
        output.register(sys.stdout.fileno(), 0)
        if not output.poll(0):  # another pipe broke, which is no reader's choice
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for the interpreter's own last flush
        return 0


def _run_command(
    settings_class: type[Settings],
    main: Callable[[Settings], object],
    argv: Sequence[str] | None,
    prog: str,
    epilog: str,
    user_errors: Sequence[str | type[Exception]],
) -> int:
    try:
        settings, dry_run = parse_settings(settings_class, argv, prog, epilog)
        if dry_run:
            print(json.dumps(settings.model_dump(mode="json"), indent=2, ensure_ascii=False))
            return 0
        result = main(settings)
        return result if isinstance(result, int) else 0
    except KeyboardInterrupt:
        return 130
    except Exception as error:
        if isinstance(error, (EngineError, UsageError)) or _is_one_of(error, user_errors):
            return fail(prog, str(error))
        raise


def parse_settings(
    settings_class: type[Settings], argv: Sequence[str] | None, prog: str, epilog: str = ""
) -> tuple[Settings, bool]:
    """The settings that `argv` (default: the process's) and the environment make, and whether `--dry-run` was given.

    Raises:
        UsageError: an unknown flag or variable, or values that are not allowed (one line per field).
        SystemExit: after `--help` and `--version`.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    parser = Parser(
        prog=prog,
        description=settings_class.__doc__,
        epilog=_examples(epilog),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        add_help=False,
    )
    parser.add_argument("-h", "--help", action="help", help="show this help and exit")
    add_version(parser, prog)
    parser.add_argument(
        "-n", "--dry-run", action="store_true", help="print the resolved settings as JSON and exit"
    )
    dry_run = False

    def parse(parser: Parser, arguments: Sequence[str]) -> argparse.Namespace:
        nonlocal dry_run
        parser.take_from_environment(settings_class)
        found, unknown = parser.parse_known_args(arguments)
        if unknown:
            flag = unknown[0].split("=")[0]
            what = f"there is no {flag}" if flag.startswith("-") else f"unexpected argument {flag!r}"
            raise UsageError(f"{what}{hint(flag, parser.flags())}; {prog} --help lists every flag")
        dry_run = vars(found).pop("dry_run")
        return found

    source: CliSettingsSource[Any] = CliSettingsSource(
        settings_class,
        root_parser=parser,
        parse_args_method=parse,
        cli_show_env_vars=bool(settings_class.model_config.get("env_prefix")),
    )
    try:
        source(args=arguments)
        _refuse_unknown_variables(settings_class)
        return settings_class(_cli_settings_source=source), dry_run
    except ValidationError as error:
        raise UsageError("\n".join(_field_errors(settings_class, error, arguments))) from error
    except SettingsError as error:
        raise UsageError(str(error)) from error


def settings_table(settings_class: type[CommandSettings]) -> str:
    """The README's table of a command: flag, variable, default, meaning, one row per field."""
    rows = ["| flag | variable | default | meaning |", "|---|---|---|---|"]
    for name, info in settings_class.model_fields.items():
        default = (
            "required" if info.is_required() else f"`{_shown(info.get_default(call_default_factory=True))}`"
        )
        meaning = " ".join(part for part in ((info.description or "").rstrip("."), _allowed(info)) if part)
        cells = [f"`{_flag(settings_class, name)}`", f"`{_variable(settings_class, name)}`", default, meaning]
        rows.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(rows) + "\n"


class Parser(argparse.ArgumentParser):
    """argparse, except that a mistake is an exception like any other."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(message)

    def take_from_environment(self, settings_class: type[CommandSettings]) -> None:
        """A positional argument may be left out where its variable is set."""
        for action in self._actions:
            if not action.option_strings and _variable(settings_class, action.dest) in os.environ:
                action.nargs = "?"

    def flags(self) -> list[str]:
        """Every flag, for hints."""
        return [flag for action in self._actions for flag in action.option_strings]


def add_version(parser: argparse.ArgumentParser, prog: str) -> None:
    """`--version` shows the installed version."""
    try:
        version = importlib.metadata.version(DISTRIBUTION)
    except importlib.metadata.PackageNotFoundError:
        version = "(run from source, not installed)"
    parser.add_argument(
        "--version", action="version", version=f"{prog.split()[0]} {version}", help="show the version"
    )


def _flag(settings_class: type[CommandSettings], name: str) -> str:
    positional = any(
        getattr(item, "__name__", "") == "_CliPositionalArg" for item in _metadata(settings_class, name)
    )
    return name.upper() if positional else "--" + name.replace("_", "-")


def _metadata(settings_class: type[CommandSettings], name: str) -> list[Any]:
    return settings_class.model_fields[name].metadata


def _variable(settings_class: type[CommandSettings], name: str) -> str:
    return (settings_class.model_config.get("env_prefix", "") + name).upper()


def _refuse_unknown_variables(settings_class: type[CommandSettings]) -> None:
    prefix = settings_class.model_config.get("env_prefix", "").upper()
    if not prefix:
        return
    known = [_variable(settings_class, name) for name in settings_class.model_fields]
    for name in os.environ:
        if name.upper().startswith(prefix) and name.upper() not in known:
            raise UsageError(f"the environment sets {name}, which is no setting{hint(name, known)}; unset it")


def _field_errors(
    settings_class: type[CommandSettings], error: ValidationError, arguments: Sequence[str]
) -> Iterable[str]:
    for problem in error.errors(include_url=False):
        name = str(problem["loc"][0]) if problem["loc"] else ""
        if name not in settings_class.model_fields:
            yield problem["msg"].removeprefix("Value error, ")
            continue
        flag, variable = _flag(settings_class, name), _variable(settings_class, name)
        typed = any(argument.split("=")[0] == flag for argument in arguments)
        if problem["type"] == "missing":
            either = f" (or {variable})" if settings_class.model_config.get("env_prefix") else ""
            yield f"{flag}{either} is required: {settings_class.model_fields[name].description}"
        else:
            where = variable if variable in os.environ and not typed else flag
            message = problem["msg"].removeprefix("Value error, ")
            yield f"{where}={_shown(problem['input'])}: {message[:1].lower()}{message[1:]}"


def _allowed(info: FieldInfo) -> str:
    """What a field takes, from its type and bounds: `(one of png, jpeg)`, `(≥ 1, ≤ 8)`."""
    if get_origin(info.annotation) is Literal:
        return f"(one of {', '.join(map(str, get_args(info.annotation)))})"
    for item in info.metadata:
        if isinstance(item, WithJsonSchema) and (choices := (item.json_schema or {}).get("enum")):
            return f"(one of {', '.join(choices)})"
    signs = {"ge": "≥", "gt": ">", "le": "≤", "lt": "<", "multiple_of": "multiple of"}
    bounds = [
        f"{sign} {getattr(item, key)}"
        for item in info.metadata
        for key, sign in signs.items()
        if hasattr(item, key)
    ]
    return f"({', '.join(bounds)})" if bounds else ""


def _shown(value: Any) -> str:
    if value is None:
        return "none"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, PurePath):
        return value.as_posix()
    if isinstance(value, (list, tuple)):
        return ",".join(_shown(item) for item in value)
    return str(value)


def hint(name: str, known: Iterable[str]) -> str:
    """` (did you mean …?)`, or nothing when no known name is near."""
    near = difflib.get_close_matches(name, list(known), n=1)
    return f" (did you mean {near[0]}?)" if near else ""


def _is_one_of(error: Exception, classes: Sequence[str | type[Exception]]) -> bool:
    """Names are compared with those of the error's own classes: nothing is imported to ask."""
    ancestors = type(error).__mro__
    return any(
        name in ancestors or name in {f"{c.__module__}:{c.__qualname__}" for c in ancestors}
        for name in classes
    )


def _examples(epilog: str) -> str:
    return (
        "examples:\n" + "\n".join(f"  {line.strip()}" for line in epilog.strip().splitlines())
        if epilog
        else ""
    )


def fail(prog: str, message: str) -> int:
    """Print `prog: error: …` for every line of `message`; the exit code."""
    for line in message.splitlines():
        print(f"{prog}: error: {line}", file=sys.stderr)
    return USAGE_ERROR
