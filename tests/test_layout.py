"""What the layout promises, checked from the source itself: where imports may point, what never appears, how long a
file may be. Run by `make check` and by `make test`."""

from __future__ import annotations

import ast
import re
import subprocess
import tomllib
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("cdm_serve", "engines", "training", "benchmarks")

MAY_IMPORT = {
    "cdm_serve": {"cdm_serve", "engines"},
    "engines": {"engines"},
    "training": {"training", "engines"},
    "benchmarks": {"benchmarks", "cdm_serve", "engines", "training"},
}
"""Imports point one way. Only benchmarks import `cdm_serve`: its scheduler, on a virtual clock."""

HEAVY = {"torch", "diffusers", "transformers", "accelerate", "peft", "torchvision"}
MODULES_WITH_TORCH = (
    "engines.export",
    "engines.families",
    "engines.kernels",
    "engines.torch",
    "engines.aotinductor",
)
MAY_IMPORT_HEAVY = (
    "engines/export/", "engines/families/", "engines/kernels/", "engines/torch", "engines/aotinductor", "training/",
    "benchmarks/",
)  # fmt: skip
TORCH_RUNTIMES = ("engines.torch_engine", "engines.aotinductor")
"""Registered by name, imported only where their runtime is asked for."""

TOP_LEVEL = {
    *PACKAGES, "tests", "scripts", "docs", "deploy", ".ci",
    "Dockerfile", ".dockerignore", ".gitignore", "LICENSE", "NOTICE", "Makefile", "README.md", "CHANGELOG.md",
    "CONTRIBUTING.md", "pyproject.toml", "constraints.txt",
}  # fmt: skip

MAX_LINES = 400
LONGER: dict[str, str] = {}
"""File → why it may be longer than `MAX_LINES`."""

MACHINE_PATH = re.compile(r"""(?<![\w.~$}/])/(?:root|work|tmp|home/(?!cdm\b)\w+)(?:/|\b)""")


@cache
def tracked() -> tuple[Path, ...]:
    """Files that are, or would be, in the repository."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    return tuple(ROOT / name for name in sorted(listed.split("\0")) if name and (ROOT / name).is_file())


def sources(*folders: str) -> list[Path]:
    return [path for path in tracked() if path.suffix == ".py" and path.relative_to(ROOT).parts[0] in folders]


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def imports(path: Path) -> Iterator[str]:
    """Every module that the file imports, wherever the import stands, `"module:Class"` registrations included."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield node.module or ""
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield from re.findall(r"^([\w.]+):\w+$", node.value)


def test_there_is_something_to_check() -> None:
    assert {path.relative_to(ROOT).parts[0] for path in sources(*PACKAGES)} == set(PACKAGES)


@pytest.mark.parametrize("package", PACKAGES)
def test_imports_point_one_way(package: str) -> None:
    wrong = [
        f"{name_of(path)} imports {module}"
        for path in sources(package)
        for module in imports(path)
        if module.split(".")[0] in PACKAGES and module.split(".")[0] not in MAY_IMPORT[package]
    ]
    assert not wrong


def test_serving_never_imports_torch() -> None:
    serving = [
        path for path in sources("cdm_serve", "engines") if not name_of(path).startswith(MAY_IMPORT_HEAVY)
    ]
    assert any(name_of(path) == "engines/base.py" for path in serving)
    wrong = [
        f"{name_of(path)} imports {module}"
        for path in serving
        for module in imports(path)
        if module.split(".")[0] in HEAVY
        or (module.startswith(MODULES_WITH_TORCH) and module not in TORCH_RUNTIMES)
    ]
    assert not wrong


def test_models_are_loaded_from_safetensors_only() -> None:
    calls = [
        (name_of(path), node.lineno, {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords})
        for path in sources(*PACKAGES)
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and node.func.attr == "from_pretrained"
    ]
    assert calls
    unsafe = [f"{name}:{line}" for name, line, given in calls if given.get("use_safetensors") != "True"]
    # peft's loader has no such argument: there the adapter's folder is searched for pickles before.
    assert [call for call in unsafe if not call.startswith("engines/export/adapter.py:")] == []


def test_top_level_names_are_fixed() -> None:
    assert {path.relative_to(ROOT).parts[0] for path in tracked()} <= TOP_LEVEL


def test_files_hold_one_idea() -> None:
    lengths = {
        name_of(path): len(path.read_text(encoding="utf-8").splitlines())
        for path in sources(*PACKAGES, "tests")
    }
    too_long = {name: lines for name, lines in lengths.items() if lines > MAX_LINES and name not in LONGER}
    assert not too_long, f"longer than {MAX_LINES} lines: split them, or list them in LONGER with the reason"
    assert all(lengths.get(name, 0) > MAX_LINES for name in LONGER), "LONGER lists files that need it no more"


def test_nothing_is_pickled() -> None:
    wrong = []
    for path in sources(*PACKAGES):
        for module in imports(path):
            if module.split(".")[0] in {"pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}:
                wrong.append(f"{name_of(path)} imports {module}")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and ast.unparse(node.func) in {"torch.load", "torch.save"}:
                wrong.append(f"{name_of(path)}:{node.lineno} calls {ast.unparse(node.func)}")
            if (
                isinstance(node, ast.keyword)
                and node.arg == "allow_pickle"
                and ast.unparse(node.value) != "False"
            ):
                wrong.append(f"{name_of(path)}:{node.value.lineno} allows pickles")
    assert not wrong


def test_no_machine_paths() -> None:
    wrong = []
    for path in tracked():
        if path == Path(__file__) or path.suffix in {
            ".png",
            ".onnx",
            ".bin",
            ".npy",
            ".safetensors",
            ".ico",
            ".webp",
        }:
            continue
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            if MACHINE_PATH.search(line):
                wrong.append(f"{name_of(path)}:{number}: {line.strip()[:100]}")
    assert not wrong


@pytest.mark.parametrize(
    ("line", "is_one"),
    [
        ('Path("/tmp/x")', True), ("cd /work/main", True), ("see /root", True), ("/home/alice/x", True),
        ("WORKDIR /home/cdm", False), ("tmp_path / 'x'", False), ("https://a.org/work/x", False), ("runs/tmp/x", False),
    ],
)  # fmt: skip
def test_a_machine_path_is_told_from_others(line: str, is_one: bool) -> None:
    assert bool(MACHINE_PATH.search(line)) == is_one


def test_every_console_script_leads_somewhere() -> None:
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["scripts"]
    assert set(scripts) == {"cdm-serve", "cdm-train", "cdm-export", "cdm-bench"}
    for name, target in scripts.items():
        module, function = target.split(":")
        tree = ast.parse((ROOT / (module.replace(".", "/") + ".py")).read_text(encoding="utf-8"))
        assert function in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}, name
