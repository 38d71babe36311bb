"""Laws of replacing files and folders: the old or the new, whole, whenever it stops."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pytest

from engines.files import (
    ABANDONED_FOLDER_S,
    remove_abandoned_folders,
    replace_folder,
    sha256_file,
    sha256_files,
    write_text_atomically,
)


def folder(path: Path, text: str) -> Path:
    (path / "inner").mkdir(parents=True)
    (path / "inner" / "file").write_text(text)
    return path


def test_a_folder_is_replaced_whole_and_nothing_else_is_left(tmp_path):
    target = folder(tmp_path / "model", "old")
    (target / "only-in-the-old").touch()
    replace_folder(folder(tmp_path / ".new", "new"), target)
    assert (target / "inner" / "file").read_text() == "new"
    assert not (target / "only-in-the-old").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_folder_that_was_not_there_is_made(tmp_path):
    replace_folder(folder(tmp_path / ".new", "new"), tmp_path / "model")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_failed_replacement_leaves_the_old_folder(tmp_path, monkeypatch):
    target, new = folder(tmp_path / "model", "old"), folder(tmp_path / ".new", "new")
    rename = Path.rename

    def fails(self: Path, to: Path) -> Path:
        if self == new:
            raise OSError("no")
        return rename(self, to)

    monkeypatch.setattr(Path, "rename", fails)
    with pytest.raises(OSError, match="no"):
        replace_folder(new, target)
    assert (target / "inner" / "file").read_text() == "old"


def test_the_old_folder_of_a_killed_replacement_stays_until_a_new_one_stands(tmp_path, monkeypatch):
    folder(tmp_path / ".model.old", "old")  # killed between the two renames
    kept = []
    rename = Path.rename

    def seen(self: Path, to: Path) -> Path:
        kept.append((tmp_path / ".model.old").is_dir())
        return rename(self, to)

    monkeypatch.setattr(Path, "rename", seen)
    replace_folder(folder(tmp_path / ".new", "new"), tmp_path / "model")
    assert kept == [True]
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_text_is_the_old_one_until_the_new_one_is_whole(tmp_path, monkeypatch):
    path = tmp_path / "config.json"
    write_text_atomically(path, "old ü")
    assert path.read_text(encoding="utf-8") == "old ü"

    def killed(descriptor: int) -> None:
        assert path.read_text(encoding="utf-8") == "old ü"
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", killed)
    with pytest.raises(KeyboardInterrupt):
        write_text_atomically(path, "new")
    assert path.read_text(encoding="utf-8") == "old ü"
    assert [each.name for each in tmp_path.iterdir()] == ["config.json"]


def test_the_hash_of_files_sees_names_and_bytes_and_no_order(tmp_path):
    a, b = tmp_path / "a", tmp_path / "b"
    a.write_text("1")
    b.write_text("2")
    assert sha256_file(a) == hashlib.sha256(b"1").hexdigest()
    both = sha256_files(tmp_path, [a, b])
    assert both == sha256_files(tmp_path, [b, a])
    a.rename(tmp_path / "c")
    assert sha256_files(tmp_path, [tmp_path / "c", b]) != both
    (tmp_path / "c").rename(a)
    a.write_text("3")
    assert sha256_files(tmp_path, [a, b]) != both


def test_writers_of_one_path_do_not_mix_theirs(tmp_path, monkeypatch):
    path = tmp_path / "costs.json"
    replace = Path.replace

    def another_writes_meanwhile(self: Path, to: Path) -> Path:
        monkeypatch.undo()
        write_text_atomically(path, "theirs")
        return replace(self, to)

    monkeypatch.setattr(Path, "replace", another_writes_meanwhile)
    write_text_atomically(path, "ours")
    assert path.read_text() == "ours"
    assert [each.name for each in tmp_path.iterdir()] == ["costs.json"]


def test_folders_of_killed_exports_go_after_a_day_and_others_stay(tmp_path):
    target, day = tmp_path / "my-model", ABANDONED_FOLDER_S + 60
    killed, running, other, file = (
        tmp_path / name
        for name in (".my-model-abc_1234", ".my-model-zzzzzzzz", ".my-model-of-mine", ".my-model-00000000")
    )
    for path in (killed, running, other):
        folder(path, "weights")
    file.touch()
    for path in tmp_path.rglob("*"):
        os.utime(path, (path.stat().st_atime, path.stat().st_mtime - day))
    (running / "inner" / "file").write_text("more")
    remove_abandoned_folders(target)
    assert not killed.exists()
    assert running.exists()
    assert file.exists()
    assert not (tmp_path / "my-model").exists()
    remove_abandoned_folders(tmp_path / "nowhere" / "model")
