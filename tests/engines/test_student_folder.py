"""The folder that a base and its adapter become: what is linked, copied, rounded, and held in memory meanwhile."""

from __future__ import annotations

import os
import resource
import shutil
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from engines.errors import ExportError
from engines.export import student as student_module
from engines.export.student import check_dtypes, prepare_student
from tests.engines.adapters import WEIGHTS, save_diffusers, save_peft, shard, store


def test_without_an_adapter_nothing_is_touched(student: Path, tmp_path: Path) -> None:
    assert prepare_student(student, None, tmp_path / "merged") == student
    assert not (tmp_path / "merged").exists()


@pytest.mark.parametrize("links", [True, False], ids=["one-file-system", "two"])
def test_what_no_adapter_changes_is_linked_or_copied(
    student: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, links: bool
) -> None:
    source = shutil.copytree(student, tmp_path / "base")
    torch.save({}, source / "vae" / "diffusion_pytorch_model.bin")
    before = {path: path.read_bytes() for path in source.rglob("*") if path.is_file()}
    if not links:

        def refuse(*_: object) -> None:
            raise OSError(18, "Invalid cross-device link")

        monkeypatch.setattr(os, "link", refuse)
    merged = prepare_student(source, save_peft(student, tmp_path / "lora"), tmp_path / "merged")
    for path, content in before.items():
        name = path.relative_to(source)
        if path.suffix == ".bin":
            assert not (merged / name).exists()
        elif name == Path("transformer", WEIGHTS):
            assert (merged / name).read_bytes() != content
        else:
            assert (merged / name).read_bytes() == content, name
            assert (merged / name).samefile(path) == links, name
        assert path.read_bytes() == content
    assert (merged / "provenance.json").is_file()


def test_weights_are_merged_in_float32_whatever_the_base_is_stored_in(student: Path, tmp_path: Path) -> None:
    half = shutil.copytree(student, tmp_path / "half")
    weights = half / "transformer" / WEIGHTS
    save_file({name: tensor.to(torch.bfloat16) for name, tensor in load_file(weights).items()}, weights)
    merged = prepare_student(half, save_peft(student, tmp_path / "lora"), tmp_path / "merged")
    with safe_open(merged / "transformer" / WEIGHTS, framework="pt") as opened:
        assert {opened.get_slice(name).get_dtype() for name in opened.keys()} == {"F32"}  # noqa: SIM118


def test_one_component_is_in_memory_at_a_time(
    student: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lora = save_diffusers(student, tmp_path / "lora", metadata=True)
    seen: list[Any] = []

    def merge(adapter: Any, name: str, module: Any) -> Any:
        assert all(earlier() is None for earlier in seen)
        seen.append(weakref.ref(module))
        return merge_(adapter, name, module)

    merge_ = student_module.merge_
    monkeypatch.setattr(student_module, "merge_", merge)
    prepare_student(student, lora, tmp_path / "merged")
    assert len(seen) == 3


def test_sharded_base_is_checked_and_merged_like_a_whole_one(student: Path, tmp_path: Path) -> None:
    sharded = shutil.copytree(student, tmp_path / "sharded")
    second = shard(sharded)
    check_dtypes(sharded)
    lora = save_peft(student, tmp_path / "lora")
    files = [
        prepare_student(folder, lora, tmp_path / name) / "transformer" / WEIGHTS
        for name, folder in (("from-whole", student), ("from-shards", sharded))
    ]
    assert files[0].read_bytes() == files[1].read_bytes()
    store(second, next(iter(load_file(second))), torch.int8)
    with pytest.raises(ExportError, match=r"00002-of-00002\.safetensors: \S+ is I8"):
        check_dtypes(sharded)


def test_full_disk_leaves_no_folder(student: Path, tmp_path: Path) -> None:
    """A limit on file sizes stands in for the disk: the kernel refuses the same writes."""
    lora = save_peft(student, tmp_path / "lora")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, before[1]))
    try:
        with pytest.raises(OSError, match=r"transformer: .*File too large"):
            prepare_student(student, lora, tmp_path / "merged")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert [path.name for path in tmp_path.iterdir()] == ["lora"]
