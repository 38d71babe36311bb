from __future__ import annotations

import hashlib
import stat
from pathlib import Path

import pytest

from engines.files import sha256_file
from training.emoji.fetch import SETS, DataError, Package, fetch, read_icons, read_json

PACKAGE = Package("@iconify-json/noto", "1.2.9", "0" * 64)


def fake_npm(folder: Path, script: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """An `npm` on the path that does what `script` says; $4 is the destination folder."""
    folder.mkdir()
    npm = folder / "npm"
    npm.write_text(f"#!/bin/sh\n{script}\n")
    npm.chmod(npm.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")


def test_file_names_are_npms_own() -> None:
    assert PACKAGE.filename == "iconify-json-noto-1.2.9.tgz"


def test_every_pinned_package_has_a_whole_hash_and_a_style_of_one_word() -> None:
    for icon_set in SETS.values():
        assert len(icon_set.package.sha256) == 64
        assert icon_set.style.isalpha()


def test_missing_npm_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(DataError, match=r"noto@1\.2\.9: npm is not installed.*install npm"):
        fetch(PACKAGE, tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


def test_wrong_hash_in_the_cache_names_file_got_and_expected(tmp_path: Path) -> None:
    (tmp_path / PACKAGE.filename).write_bytes(b"not it")
    got = sha256_file(tmp_path / PACKAGE.filename)
    with pytest.raises(DataError, match=rf"noto-1\.2\.9\.tgz: sha256 is {got}, expected 0{{64}}.*delete"):
        fetch(PACKAGE, tmp_path)


def test_wrong_download_is_refused_and_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_npm(tmp_path / "bin", f'echo evil > "$4/{PACKAGE.filename}"', monkeypatch)
    with pytest.raises(DataError, match=r"expected 0{64}.*nothing was kept"):
        fetch(PACKAGE, tmp_path / "cache")
    assert not list((tmp_path / "cache").iterdir())


def test_failed_npm_is_quoted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_npm(tmp_path / "bin", "echo ETARGET no such version >&2; exit 3", monkeypatch)
    with pytest.raises(DataError, match=r"exit 3.*ETARGET no such version"):
        fetch(PACKAGE, tmp_path / "cache")
    assert not list((tmp_path / "cache").iterdir())


def test_good_download_lands_in_the_cache_and_is_reused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "good").write_bytes(b"good")
    package = Package(PACKAGE.name, PACKAGE.version, sha256_file(tmp_path / "good"))
    fake_npm(tmp_path / "bin", f'printf good > "$4/{package.filename}"', monkeypatch)
    target = fetch(package, tmp_path / "cache")
    assert [path.name for path in (tmp_path / "cache").iterdir()] == [target.name]
    monkeypatch.setenv("PATH", "")
    assert fetch(package, tmp_path / "cache") == target


def test_broken_tarball_is_named(tmp_path: Path) -> None:
    (tmp_path / "broken.tgz").write_bytes(b"\x1f\x8b nonsense")
    with pytest.raises(DataError, match=r"broken\.tgz: cannot read package/icons\.json"):
        read_icons("noto", tmp_path / "broken.tgz")
    with pytest.raises(DataError, match="cannot read x"):
        read_json(tmp_path / "absent.tgz", "x")


def test_a_relative_cache_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """npm runs in the folder it downloads to, so a relative name of it would be looked for inside itself."""
    monkeypatch.chdir(tmp_path)
    fake_npm(tmp_path / "bin", f'printf x > "$4/{PACKAGE.filename}"', monkeypatch)
    package = Package(PACKAGE.name, PACKAGE.version, hashlib.sha256(b"x").hexdigest())
    assert fetch(package, Path("data") / "cache").read_bytes() == b"x"
