"""A student may be a model of the hub: downloaded without its pickles, or found in the cache; else one sentence."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from huggingface_hub import constants

from engines.bundle import PROVENANCE
from engines.errors import ExportError
from engines.export.export import describe
from engines.export.source import find_student
from engines.export.student import check_dtypes
from tests.engines.adapters import ADAPTER, WEIGHTS, save_peft
from tests.engines.hub import COMMIT, files_of, fill_cache, serve

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of a machine that is offline."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    return tmp_path / "cache"


@pytest.mark.parametrize(
    ("name", "revision"), [("someone/tiny", "main"), ("someone/tiny@v1.0", "v1.0"), (f"someone/tiny@{COMMIT}", "x")]
)  # fmt: skip
def test_a_model_in_the_cache_is_found_offline(student: Path, cache: Path, name: str, revision: str) -> None:
    snapshot = fill_cache(cache, "someone/tiny", files_of(student), revision)
    said: list[str] = []
    source = find_student(name, said.append)
    assert (source.folder, source.name, source.origin) == (snapshot, "tiny", f"someone/tiny@{COMMIT}")
    assert said == [f"{name}: from the hub"]
    check_dtypes(source.folder)


def test_a_local_folder_is_never_looked_for_on_the_hub(student: Path, cache: Path) -> None:
    fill_cache(cache, "someone/tiny", files_of(student))
    local = Path("someone/tiny")
    local.parent.mkdir()
    local.symlink_to(student)
    source = find_student("someone/tiny")
    assert (source.folder, source.name, source.origin) == (local, student.name, "")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("someone/else", r"^there is no folder someone/else, and the hub's model 'someone/else' cannot be had \(.*;"),
        ("someone/tiny@v2", r"no folder someone/tiny@v2, and the hub's model 'someone/tiny@v2' cannot be had \("),
        ("./someone/tiny", r"\./someone/tiny is not a diffusers folder \(nothing is there\) and not a hub id"),
        ("/someone/tiny", r"^/someone/tiny is not a diffusers folder \(nothing is there\)"),
        ("a/path/to/tiny", r"a/path/to/tiny is not a diffusers folder \(nothing is there\)"),
        ("tiny", r"tiny is not a diffusers folder \(nothing is there\)"),
        ("someone/tiny@", r"someone/tiny@ is not a diffusers folder \(nothing is there\)"),
    ],
)  # fmt: skip
def test_what_is_nowhere_is_one_sentence_with_all_that_was_tried(
    student: Path, cache: Path, name: str, message: str
) -> None:
    fill_cache(cache, "someone/tiny", files_of(student))
    with pytest.raises(ExportError, match=message) as refused:
        find_student(name)
    assert "\n" not in str(refused.value)


def test_a_download_that_was_cut_off_is_told(student: Path, cache: Path) -> None:
    files = {name: data for name, data in files_of(student).items() if not name.startswith("vae/")}
    fill_cache(cache, "someone/tiny", files)
    with pytest.raises(ExportError, match=rf"{COMMIT} lacks vae, which its model_index\.json names"):
        check_dtypes(find_student("someone/tiny").folder)


def test_the_bundle_tells_which_commit_and_which_adapter(student: Path, cache: Path) -> None:
    files = files_of(student)
    del files[PROVENANCE]
    fill_cache(cache, "someone/tiny", files)
    source = find_student("someone/tiny")
    found = describe(source, None)
    assert (found.teacher, found.recipe) == ("unknown", f"someone/tiny@{COMMIT}")
    merged = describe(source, save_peft(student, cache.parent / "lora") / "adapter_model.safetensors")
    pattern = rf"someone/tiny@{COMMIT} \+ LoRA adapter_model\.safetensors \(sha256 [0-9a-f]{{64}}\)"
    assert re.fullmatch(pattern, merged.recipe)


def test_only_what_the_pipeline_is_loaded_from_is_downloaded(student: Path, tmp_path: Path) -> None:
    """The real client against a hub on loopback, as the command runs."""
    wanted = files_of(student)
    unwanted = (
        "README.md", "tiny.safetensors", "text_encoders/t5xxl.safetensors", "vae/diffusion_pytorch_model.bin",
        "transformer/custom.py", "text_encoder/model.fp16.safetensors", "unet/config.json", "text_encoder/flax.msgpack",
        "transformer/diffusion_pytorch_model.fp16-00001-of-00002.safetensors", ADAPTER,
    )  # fmt: skip
    code = "import sys; from engines.export.source import find_student; print(find_student(sys.argv[1]))"
    with serve("someone/tiny", wanted | dict.fromkeys(unwanted, b"unwanted")) as (address, asked):
        environment = {**os.environ, "HF_ENDPOINT": address, "HF_HOME": str(tmp_path / "hf"), "NO_PROXY": "*"}
        done = subprocess.run(
            [sys.executable, "-c", code, "someone/tiny"],
            cwd=ROOT, env=environment, capture_output=True, text=True, check=False,
        )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert f"origin='someone/tiny@{COMMIT}'" in done.stdout
    assert set(asked) == set(wanted)
    (snapshot,) = tmp_path.glob("hf/hub/models--someone--tiny/snapshots/*")
    assert files_of(snapshot) == wanted
    assert (snapshot / "transformer" / WEIGHTS).is_file()
