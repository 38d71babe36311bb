"""`engines.cli` and `engines.commands`: a field is a flag, a variable, help and a table row; nothing unknown passes."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Literal

import pytest
from pydantic import Field, model_validator
from pydantic_settings import CliPositionalArg

from benchmarks.main import COMMANDS as BENCHMARKS
from engines.cli import USAGE_ERROR, CommandSettings, UsageError, run_command, settings_table
from engines.commands import Command, run_commands
from engines.errors import BundleError
from training.main import COMMANDS as TRAINING


class PaintSettings(CommandSettings, env_prefix="CDM_PAINT_"):
    """Paint a wall."""

    wall: CliPositionalArg[Path] = Field(description="what to paint")
    coats: int = Field(2, ge=1, le=9, description="layers of paint")
    dry_time_s: float = Field(1.5, gt=0, description="pause between layers")
    colour: Literal["red", "blue"] = Field("red", description="which paint")
    gloss: bool = Field(False, description="shiny")
    order: tuple[int, ...] = Field((1, 2), description="corners, in order")
    note: str | None = Field(None, description="written under the paint")

    @model_validator(mode="after")
    def _blue_is_thin(self) -> PaintSettings:
        if self.colour == "blue" and self.coats < 2:
            raise ValueError(f"--coats={self.coats} is too few for blue; use at least 2")
        return self


PAINT = Command(
    f"{__name__}:PaintSettings",
    f"{__name__}:paint",
    "paint a wall",
    user_errors=(f"{__name__}:TornWallpaper",),
)


class TornWallpaper(Exception):
    """Something a painter can be told."""


class TornTwice(TornWallpaper):
    """Something more exact."""


painted: list[PaintSettings] = []


def paint(settings: PaintSettings) -> None:
    if settings.note == "tear":
        raise TornTwice("the paper tore")
    painted.append(settings)


def resolved(*argv: str) -> PaintSettings:
    painted.clear()
    assert run_command(PaintSettings, paint, argv, "paint") == 0
    return painted[0]


def refused(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    painted.clear()
    assert run_command(PaintSettings, paint, argv, "paint") == USAGE_ERROR
    assert not painted
    output = capsys.readouterr()
    assert output.out == ""
    assert "Traceback" not in output.err
    return output.err


def test_every_field_is_a_kebab_case_flag() -> None:
    line = "north --coats 3 --dry-time-s 2 --colour blue --gloss --order 3,4 --order 5 --note hi"
    settings = resolved(*line.split())
    assert settings.model_dump(mode="json") == {
        "wall": "north",
        "coats": 3,
        "dry_time_s": 2.0,
        "colour": "blue",
        "gloss": True,
        "order": [3, 4, 5],
        "note": "hi",
    }


def test_a_field_is_its_environment_variable_and_the_flag_wins(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CDM_PAINT_WALL", "south")
    monkeypatch.setenv("CDM_PAINT_COATS", "4")
    monkeypatch.setenv("CDM_PAINT_GLOSS", "true")
    assert (resolved().wall, resolved().coats, resolved().gloss) == (Path("south"), 4, True)
    assert (resolved("north", "--coats=5", "--no-gloss").coats, resolved("--no-gloss").gloss) == (5, False)


@pytest.mark.parametrize(("text", "order"), [("3,4", (3, 4)), ("[3, 4]", (3, 4)), ("3", (3,))])
def test_a_list_is_written_alike_in_flag_and_variable(
    monkeypatch: pytest.MonkeyPatch, text: str, order: tuple[int, ...]
) -> None:
    assert resolved("north", "--order", text).order == order
    monkeypatch.setenv("CDM_PAINT_ORDER", text)
    assert resolved("north").order == order


def test_an_unknown_flag_is_refused_with_the_nearest_name(capsys: pytest.CaptureFixture[str]) -> None:
    assert refused(capsys, "north", "--coast", "3") == (
        "paint: error: there is no --coast (did you mean --coats?); paint --help lists every flag\n"
    )


def test_an_abbreviated_flag_is_unknown(capsys: pytest.CaptureFixture[str]) -> None:
    assert "there is no --coat (did you mean --coats?)" in refused(capsys, "north", "--coat", "3")


def test_an_unknown_variable_with_the_prefix_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("CDM_PAINT_COAST", "3")
    assert refused(capsys, "north") == (
        "paint: error: the environment sets CDM_PAINT_COAST, which is no setting "
        "(did you mean CDM_PAINT_COATS?); unset it\n"
    )


def test_other_variables_are_nobodys_business(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COATS", "7")
    monkeypatch.setenv("CDM_OTHER_COATS", "7")
    assert resolved("north").coats == 2


def test_each_bad_value_is_one_line_with_field_value_and_limit(capsys: pytest.CaptureFixture[str]) -> None:
    assert refused(capsys, "north", "--coats", "12", "--colour", "green").splitlines() == [
        "paint: error: --coats=12: input should be less than or equal to 9",
        "paint: error: --colour=green: input should be 'red' or 'blue'",
    ]


def test_a_bad_variable_is_named_as_the_variable(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("CDM_PAINT_COATS", "many")
    assert refused(capsys, "north").startswith(
        "paint: error: CDM_PAINT_COATS=many: input should be a valid integer"
    )


def test_a_rule_across_fields_speaks_for_itself(capsys: pytest.CaptureFixture[str]) -> None:
    message = refused(capsys, "north", "--colour", "blue", "--coats", "1")
    assert message == "paint: error: --coats=1 is too few for blue; use at least 2\n"


def test_a_missing_argument_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert "WALL" in refused(capsys)


@pytest.mark.parametrize("flag", ["-n", "--dry-run"])
def test_dry_run_prints_the_settings_and_does_nothing(flag: str, capsys: pytest.CaptureFixture[str]) -> None:
    painted.clear()
    assert run_command(PaintSettings, paint, ["north", "--coats", "3", flag], "paint") == 0
    assert not painted
    assert PaintSettings(**json.loads(capsys.readouterr().out)) == PaintSettings(wall=Path("north"), coats=3)


def test_help_shows_every_flag_default_variable_and_example(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        run_command(PaintSettings, paint, ["--help"], "paint", epilog="paint north --coats 3")
    text = capsys.readouterr().out
    flat = " ".join(text.split())
    assert stop.value.code == 0
    assert "Paint a wall." in text
    assert text.rstrip().endswith("examples:\n  paint north --coats 3")
    for part in (
        "--dry-time-s",
        "(default: 1.5)",
        "[env: CDM_PAINT_DRY_TIME_S]",
        "layers of paint",
        "--no-gloss",
    ):
        assert part in flat


def test_the_table_has_a_row_per_field() -> None:
    assert settings_table(PaintSettings).splitlines() == [
        "| flag | variable | default | meaning |",
        "|---|---|---|---|",
        "| `WALL` | `CDM_PAINT_WALL` | required | what to paint |",
        "| `--coats` | `CDM_PAINT_COATS` | `2` | layers of paint (≥ 1, ≤ 9) |",
        "| `--dry-time-s` | `CDM_PAINT_DRY_TIME_S` | `1.5` | pause between layers (> 0) |",
        "| `--colour` | `CDM_PAINT_COLOUR` | `red` | which paint (one of red, blue) |",
        "| `--gloss` | `CDM_PAINT_GLOSS` | `false` | shiny |",
        "| `--order` | `CDM_PAINT_ORDER` | `1,2` | corners, in order |",
        "| `--note` | `CDM_PAINT_NOTE` | `none` | written under the paint |",
    ]


@pytest.mark.parametrize("error", [BundleError("no such bundle"), UsageError("no such bundle")])
def test_a_users_error_is_a_sentence(error: Exception, capsys: pytest.CaptureFixture[str]) -> None:
    def fail(settings: PaintSettings) -> None:
        raise error

    assert run_command(PaintSettings, fail, ["north"], "paint") == USAGE_ERROR
    assert capsys.readouterr().err == "paint: error: no such bundle\n"


def test_our_own_errors_keep_their_traceback() -> None:
    def fail(settings: PaintSettings) -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        run_command(PaintSettings, fail, ["north"], "paint")
    assert (
        run_command(PaintSettings, fail, ["north"], "paint", user_errors=(ZeroDivisionError,)) == USAGE_ERROR
    )


def test_the_commands_exit_code_is_the_exit_code() -> None:
    assert (
        run_command(PaintSettings, lambda settings: settings.coats, ["north", "--coats", "3"], "paint") == 3
    )


def test_settings_cannot_be_changed_or_extended() -> None:
    settings = resolved("north")
    with pytest.raises(ValueError, match="frozen"):
        settings.coats = 3  # type: ignore[misc]
    with pytest.raises(ValueError, match="Extra inputs"):
        PaintSettings(wall=Path("north"), coast=3)  # type: ignore[call-arg]


def test_a_sub_command_is_run_with_the_rest_of_the_line() -> None:
    painted.clear()
    assert run_commands({"paint": PAINT}, ["paint", "north", "--coats", "4"], "house") == 0
    assert painted[0].coats == 4


def test_a_users_error_is_known_by_name_and_ancestor(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_commands({"paint": PAINT}, ["paint", "north", "--note", "tear"], "house") == USAGE_ERROR
    assert capsys.readouterr().err == "house paint: error: the paper tore\n"


@pytest.mark.parametrize(
    "command", [*TRAINING.values(), *BENCHMARKS.values()], ids=lambda command: command.main
)
def test_every_command_is_there(command: Command) -> None:
    for target in (command.settings, command.main, *command.user_errors):
        module, name = target.split(":")
        assert callable(getattr(importlib.import_module(module), name))


def test_an_unknown_sub_command_is_refused_with_the_nearest_name(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_commands({"paint": PAINT}, ["pain"], "house") == USAGE_ERROR
    assert capsys.readouterr().err == (
        "house: error: there is no command 'pain' (did you mean paint?); commands: paint\n"
    )


def test_no_sub_command_lists_them(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_commands({"paint": PAINT}, [], "house") == USAGE_ERROR
    assert "paint  paint a wall" in capsys.readouterr().err


def test_a_missing_package_names_its_extra(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "needs_much.py").write_text("import a_package_that_is_not_there\n")
    monkeypatch.syspath_prepend(tmp_path)
    commands = {"paint": Command("needs_much:Settings", "needs_much:run", "", extra="train")}
    assert run_commands(commands, ["paint"], "house") == USAGE_ERROR
    assert capsys.readouterr().err == (
        "house: error: paint needs the package 'a_package_that_is_not_there', which is not installed; "
        "pip install 'cdm-serve[train]'\n"
    )


@pytest.mark.parametrize("module", ["training.main", "benchmarks.main"])
def test_listing_commands_imports_none_of_them(module: str) -> None:
    code = (
        f"import sys; from {module} import main\n"
        "try: main(['--help'])\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'diffusers', 'transformers', 'onnx', 'scipy', 'rich', 'httpx'} & set(sys.modules)\n"
        "sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
