"""The compiled cache returns exactly what was stored under exactly this key, or nothing."""

from __future__ import annotations

import errno
import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from engines.cache import CompiledCache
from engines.files import PARTIAL

KEY = {
    "runtime": "openvino",
    "model": "a" * 64,
    "version": "1",
    "device": "cpu",
    "precision": "f32",
    "threads": 1,
}


def test_stored_bytes_come_back(tmp_path: Path) -> None:
    CompiledCache.open(tmp_path, **KEY).store("denoiser", b"blob")
    assert CompiledCache.open(tmp_path, **KEY).load("denoiser") == b"blob"
    assert CompiledCache.open(tmp_path, **KEY).load("decoder") is None


@pytest.mark.parametrize(
    "changed", [{"version": "2"}, {"device": "gpu"}, {"precision": "bf16"}, {"threads": 2}]
)
def test_any_change_of_the_key_misses(tmp_path: Path, changed: dict[str, object]) -> None:
    CompiledCache.open(tmp_path, **KEY).store("denoiser", b"blob")
    assert CompiledCache.open(tmp_path, **{**KEY, **changed}).load("denoiser") is None
    assert CompiledCache.open(tmp_path, **{**KEY, "model": "b" * 64}).load("denoiser") is None


@pytest.mark.parametrize("damage", [b"", b"x", b"\0" * 40])
def test_damaged_file_is_a_miss(tmp_path: Path, damage: bytes) -> None:
    cache = CompiledCache.open(tmp_path, **KEY)
    cache.store("denoiser", b"blob")
    next(tmp_path.rglob("denoiser.blob")).write_bytes(damage)
    assert cache.load("denoiser") is None


def _cut(blob: Path) -> None:
    blob.write_bytes(blob.read_bytes()[:-1])


def _flip(blob: Path) -> None:
    data = bytearray(blob.read_bytes())
    data[-2] ^= 4
    blob.write_bytes(data)


def _empty(blob: Path) -> None:
    blob.write_bytes(b"")


def _unreadable(blob: Path) -> None:
    blob.unlink()
    blob.mkdir()


@pytest.mark.parametrize("damage", [_cut, _flip, _empty, _unreadable])
def test_damaged_model_is_built_anew_with_a_warning_that_names_the_file(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, damage: Callable[[Path], None]
) -> None:
    builds: list[str] = []

    def build() -> tuple[bytes, bytes]:
        builds.append("denoiser")
        return b"blob", b"blob"

    cache = CompiledCache.open(tmp_path, **KEY)
    for _ in range(2):
        assert cache.obtain("denoiser", bytes, build) == b"blob"
    assert (len(builds), caplog.text) == (1, "")
    blob = next(tmp_path.rglob("denoiser.blob"))
    damage(blob)
    assert cache.obtain("denoiser", bytes, build) == b"blob"
    assert len(builds) == 2
    told = [record.getMessage() for record in caplog.records]
    assert str(blob) in told[0]
    assert "its model is compiled anew" in told[0]
    assert len(told) == (2 if damage is _unreadable else 1)  # where nothing can be stored either, that too
    caplog.clear()
    if damage is not _unreadable:
        assert CompiledCache.open(tmp_path, **KEY).obtain("denoiser", bytes, build) == b"blob"
        assert (len(builds), caplog.text) == (2, "")


def test_model_that_its_runtime_does_not_take_is_built_anew_and_replaced(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def read(body: bytes) -> str:
        if body != b"good":
            raise RuntimeError("compiled for another processor")
        return "model"

    cache = CompiledCache.open(tmp_path, **KEY)
    cache.store("denoiser", b"foreign")
    assert cache.obtain("denoiser", read, lambda: ("model", b"good")) == "model"
    assert [record.getMessage() for record in caplog.records] == [
        "the stored denoiser cannot be used, it is compiled anew: compiled for another processor"
    ]
    assert cache.load("denoiser") == b"good"


def test_build_that_fails_keeps_nothing_and_is_told_as_it_is(tmp_path: Path) -> None:
    def build() -> tuple[bytes, bytes]:
        raise RuntimeError("no such operator")

    cache = CompiledCache.open(tmp_path, **KEY)
    with pytest.raises(RuntimeError, match="no such operator"):
        cache.obtain("denoiser", bytes, build)
    assert cache.load("denoiser") is None
    assert cache.obtain("denoiser", bytes, lambda: (b"blob", b"blob")) == b"blob"


def test_unwritable_folder_is_no_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder", encoding="utf-8")
    cache = CompiledCache.open(tmp_path / "file" / "cache", **KEY)
    cache.store("denoiser", b"blob")
    assert cache.load("denoiser") is None


def test_without_a_folder_nothing_is_kept() -> None:
    cache = CompiledCache.open(None, **KEY)
    cache.store("denoiser", b"blob")
    assert cache.obtain("denoiser", bytes, lambda: (b"built", b"built")) == b"built"
    assert cache.load("denoiser") is None


def test_what_goes_wrong_is_logged_with_its_reason(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").write_text("not a folder", encoding="utf-8")
    unwritable = CompiledCache.open(tmp_path / "file", **KEY)
    for name in ("denoiser", "decoder"):
        assert unwritable.obtain(name, bytes, lambda: (b"blob", b"blob")) == b"blob"
    assert caplog.text.count("Not a directory") == 1  # told once: of the key, not of every model too
    assert "could not be written (Not a directory): the next start compiles again" in caplog.text
    cache = CompiledCache.open(tmp_path, **KEY)
    caplog.clear()
    assert cache.load("denoiser") is None
    assert caplog.text == ""  # not there is nothing wrong
    cache.store("denoiser", b"blob")
    blob = next(tmp_path.rglob("denoiser.blob"))
    blob.write_bytes(blob.read_bytes()[:-1])
    assert cache.load("denoiser") is None
    assert "denoiser.blob is damaged" in caplog.text
    blob.unlink()
    blob.mkdir()
    assert cache.load("denoiser") is None
    assert "denoiser.blob cannot be read" in caplog.text


def test_folder_that_cannot_be_written_is_used_as_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    CompiledCache.open(tmp_path, **KEY).store("denoiser", b"blob")

    def read_only(*_: object) -> int:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr("engines.cache.write_atomically", read_only)
    assert CompiledCache.open(tmp_path, **KEY).load("denoiser") == b"blob"
    assert caplog.text == ""


def test_full_disk_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    cache = CompiledCache.open(tmp_path, **KEY)
    cache.store("denoiser", b"old")

    def full(path: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("engines.files.to_disk", full)  # when all but the last bytes are written
    cache.store("denoiser", b"new")
    cache.store("decoder", b"new")
    assert caplog.text.count("No space left on device") == 1
    assert cache.load("denoiser") == b"old"
    assert {path.name for path in tmp_path.rglob("*") if path.is_file()} == {"key.json", "denoiser.blob"}


def test_real_full_disk_is_a_miss(tmp_path: Path) -> None:
    """A file system of 64 KiB, where one may be mounted."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(disk)], capture_output=True, check=False
    ).returncode  # fmt: skip
    if mounted != 0:
        pytest.skip("only root can mount a file system")
    try:
        cache = CompiledCache.open(disk, **KEY)
        cache.store("small", b"blob")
        cache.store("large", bytes(2**20))
        assert cache.load("small") == b"blob"
        assert cache.load("large") is None
        assert {path.name for path in disk.rglob("*") if path.is_file()} == {"key.json", "small.blob"}
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_what_a_killed_server_left_half_written_is_removed_when_it_is_old(tmp_path: Path) -> None:
    cache = CompiledCache.open(tmp_path, **KEY)
    assert cache.folder is not None
    old, new = (cache.folder / f".denoiser.blob.{name}{PARTIAL}" for name in ("old", "new"))
    for path in (old, new):
        path.write_bytes(b"half")
    os.utime(old, (0, 0))
    assert CompiledCache.open(tmp_path, **KEY).load("denoiser") is None
    assert not old.exists()
    assert new.exists()  # another server may be writing it
