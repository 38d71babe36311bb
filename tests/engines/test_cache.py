"""The compiled cache returns exactly what was stored under exactly this key, or nothing."""

from __future__ import annotations

from pathlib import Path

import pytest

from engines.cache import CompiledCache

KEY = {"runtime": "openvino", "version": "1", "device": "cpu", "precision": "f32", "threads": 1}


def test_stored_bytes_come_back(tmp_path: Path) -> None:
    CompiledCache.open(tmp_path, "a" * 64, **KEY).store("denoiser", b"blob")
    assert CompiledCache.open(tmp_path, "a" * 64, **KEY).load("denoiser") == b"blob"
    assert CompiledCache.open(tmp_path, "a" * 64, **KEY).load("decoder") is None


@pytest.mark.parametrize(
    "changed", [{"version": "2"}, {"device": "gpu"}, {"precision": "bf16"}, {"threads": 2}]
)
def test_any_change_of_the_key_misses(tmp_path: Path, changed: dict[str, object]) -> None:
    CompiledCache.open(tmp_path, "a" * 64, **KEY).store("denoiser", b"blob")
    assert CompiledCache.open(tmp_path, "a" * 64, **{**KEY, **changed}).load("denoiser") is None
    assert CompiledCache.open(tmp_path, "b" * 64, **KEY).load("denoiser") is None


@pytest.mark.parametrize("damage", [b"", b"x", b"\0" * 40])
def test_damaged_file_is_a_miss(tmp_path: Path, damage: bytes) -> None:
    cache = CompiledCache.open(tmp_path, "a" * 64, **KEY)
    cache.store("denoiser", b"blob")
    next(tmp_path.rglob("denoiser.blob")).write_bytes(damage)
    assert cache.load("denoiser") is None


def test_unwritable_folder_is_no_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder", encoding="utf-8")
    cache = CompiledCache.open(tmp_path / "file" / "cache", "a" * 64, **KEY)
    cache.store("denoiser", b"blob")
    assert cache.load("denoiser") is None


def test_without_a_folder_nothing_is_kept() -> None:
    cache = CompiledCache.open(None, "a" * 64, **KEY)
    cache.store("denoiser", b"blob")
    assert cache.load("denoiser") is None
