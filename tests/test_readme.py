"""The README is run: its snippets against a real server, its commands with `--dry-run`, its names against the tree."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from PIL import Image

from benchmarks.main import main as cdm_bench
from benchmarks.server import Server
from cdm_serve.main import main as cdm_serve
from cdm_serve.settings import default_bundle
from engines.export.main import main as cdm_export
from engines.families.base import load_family
from scripts.readme import OBSERVABILITY, SETTINGS, observability_page, rendered, settings_page
from training.main import main as cdm_train
from training.student_folder import StudentProvenance, write_student

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
ADDRESS = "127.0.0.1:8000"
COMMANDS = {"cdm-serve": cdm_serve, "cdm-train": cdm_train, "cdm-export": cdm_export, "cdm-bench": cdm_bench}


class Snippet(NamedTuple):
    language: str
    code: str
    answer: str


def snippets() -> list[Snippet]:
    """The blocks marked `run`, each with the `answer` block that follows it."""
    block = re.compile(r"```(sh|python) run\n(.*?)```\n```text answer\n(.*?)```", re.DOTALL)
    return [Snippet(*found.groups()) for found in block.finditer(README)]


def command_lines() -> list[str]:
    """Every line of every shell block that calls one of our commands."""
    blocks = re.findall(r"```sh\n(.*?)```", README, re.DOTALL)
    lines = [line.split(" #")[0].strip() for block in blocks for line in block.splitlines()]
    return [line for line in lines if line.split(" ")[0] in COMMANDS]


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    """The bundled model, or the fake engine in a tree without one."""
    with Server([] if default_bundle().is_dir() else ["--engine", "fake"]) as server:
        yield server


def matches(pattern: str, line: str) -> bool:
    """Whether `line` is `pattern`, in which `…` stands for anything."""
    return re.fullmatch(".*".join(map(re.escape, pattern.split("…"))), line) is not None


@pytest.mark.parametrize("snippet", snippets(), ids=lambda snippet: snippet.code.splitlines()[-1][:40])
def test_a_snippet_answers_what_the_readme_says(snippet: Snippet, server: Server, tmp_path: Path) -> None:
    assert ADDRESS in snippet.code
    code = snippet.code.replace(ADDRESS, f"127.0.0.1:{server.port}")
    run = [sys.executable, "-c", code] if snippet.language == "python" else ["bash", "-euc", code]
    done = subprocess.run(run, cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    printed = iter(done.stdout.splitlines())
    for expected in snippet.answer.splitlines():  # in this order; lines between them may be left out
        assert any(matches(expected, line) for line in printed), f"no {expected!r} in {done.stdout}"
    for name in re.findall(r"-o (\S+)", snippet.code):
        with Image.open(tmp_path / name) as image:
            assert image.format == Path(name).suffix[1:].upper()


@pytest.mark.slow
def test_a_student_of_the_bundled_teacher_paints_in_the_pipeline_as_shown(tmp_path: Path) -> None:
    """Its transformer is float32, what it has of its teacher half precision."""
    teacher = ROOT / "training" / "assets" / "teacher"
    weights = {name: value.detach() for name, value in load_family(teacher).transformer.named_parameters()}
    write_student(
        teacher, tmp_path / "runs/emoji-cdm/student", weights, StudentProvenance("teacher", "test", "ab", 0)
    )
    (code,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    code += "assert picture.size == (128, 128) and len(set(picture.getdata())) > 100"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr


def test_snippets_are_found() -> None:
    assert {snippet.language for snippet in snippets()} == {"sh", "python"}
    assert README.count(" run\n") == len(snippets())


@pytest.mark.parametrize("line", command_lines())
def test_a_command_takes_the_flags_it_is_shown_with(line: str, capsys: pytest.CaptureFixture[str]) -> None:
    name, *argv = shlex.split(line)
    assert COMMANDS[name]([*argv, "--dry-run"]) == 0, capsys.readouterr().err


def test_every_make_target_exists() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    named = set(
        re.findall(r"`?\bmake ([a-z-]+)", "".join(re.findall(r"`[^`]*`|```.*?```", README, re.DOTALL)))
    )
    assert named
    assert named <= targets


def test_every_file_named_exists() -> None:
    links = re.findall(r"\]\((?!https?:)([^)#]+)\)", README)
    paths = re.findall(r"`((?:cdm_serve|engines|training|benchmarks|docs|tests)/[\w./]*)`", README)
    assert links
    assert paths
    assert [name for name in links + paths if not (ROOT / name).exists()] == []


def test_the_settings_tables_are_what_the_code_says() -> None:
    assert rendered(README) == README, "run `make readme`"
    assert SETTINGS.read_text(encoding="utf-8") == settings_page(), "run `make readme`"
    assert OBSERVABILITY.read_text(encoding="utf-8") == observability_page(), "run `make readme`"


def test_every_snippet_address_is_the_default() -> None:
    assert set(re.findall(r"127\.0\.0\.1:\d+|localhost:\d+", README)) == {ADDRESS}
