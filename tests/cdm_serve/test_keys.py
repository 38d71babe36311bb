"""API keys: made once, hashed at rest, compared with all of them, read again when their file changes."""

from __future__ import annotations

import hmac
import json
import logging
import os
import stat
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cdm_serve.keys import CHECK_S, Key, KeyRing, hashed, main, read_keys
from engines.cli import UsageError


class Clock:
    """Stands still until it is told to go on."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def write(path: Path, *secrets: str) -> Path:
    keys = [Key(name=f"key-{i}", sha256=hashed(secret)) for i, secret in enumerate(secrets)]
    path.write_text(json.dumps({"keys": [key.model_dump() for key in keys]}))
    return path


def make(path: Path, name: str, capsys: pytest.CaptureFixture[str], *flags: str) -> str:
    assert main(["new", name, "--keys", str(path), *flags]) == 0
    return capsys.readouterr().out.strip()


def test_new_key_is_printed_once_and_only_its_hash_is_kept(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "keys.json"
    limits = ["--role", "admin", "--rate-per-minute", "60", "--max-concurrent", "4", "--max-priority", "3"]
    secret = make(path, "alice", capsys, *limits)
    assert len(secret) == len("cdm_") + 43  # 256 bits in base64
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert secret not in path.read_text()
    (key,) = read_keys(path)
    assert key == Key(
        name="alice",
        sha256=hashed(secret),
        role="admin",
        rate_per_minute=60,
        max_concurrent=4,
        max_priority=3,
    )
    assert KeyRing(path).find(secret) == key
    assert main(["list", "--keys", str(path)]) == 0
    listed = capsys.readouterr().out
    assert json.loads(listed) == {"name": "alice", "role": "admin"} | {
        "rate_per_minute": 60, "max_concurrent": 4, "max_priority": 3
    }  # fmt: skip


def test_file_that_others_could_read_is_theirs_no_more(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(tmp_path / "real.json", "one")
    path.chmod(0o644)
    link = tmp_path / "link.json"
    link.symlink_to(path)
    make(link, "alice", capsys)
    assert link.is_symlink()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert [key.name for key in read_keys(path)] == ["key-0", "alice"]
    assert sorted(os.listdir(tmp_path)) == ["link.json", "real.json"]


def test_no_two_keys_are_equal_and_names_are_taken_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "keys.json"
    assert make(path, "alice", capsys) != make(path, "bob", capsys)
    before = path.read_bytes()
    assert main(["new", "alice", "--keys", str(path)]) == 2
    assert "'alice' already" in capsys.readouterr().err
    assert path.read_bytes() == before


@pytest.mark.parametrize("name", ["", "two words", "x" * 65, 'a"b', "línea", "a\nb"])
def test_name_that_would_not_do_in_a_label_is_refused(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["new", name, "--keys", str(tmp_path / "keys.json")]) == 2
    assert capsys.readouterr().err.startswith("python -m cdm_serve.keys new: error: ")
    assert not (tmp_path / "keys.json").exists()


def test_writers_at_once_lose_nothing(tmp_path: Path) -> None:
    path = tmp_path / "keys.json"
    names = [f"key-{i}" for i in range(12)]
    with ThreadPoolExecutor(4) as pool:
        assert set(pool.map(lambda name: main(["new", name, "--keys", str(path)]), names)) == {0}
    assert sorted(key.name for key in read_keys(path)) == sorted(names)


def test_removed_key_opens_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "keys.json"
    alice, bob = make(path, "alice", capsys), make(path, "bob", capsys)
    assert main(["remove", "alice", "--keys", str(path)]) == 0
    ring = KeyRing(path)
    assert ring.find(alice) is None
    assert ring.find(bob) is not None
    assert main(["remove", "alice", "--keys", str(path)]) == 2
    assert "it has: bob" in capsys.readouterr().err


@given(st.lists(st.text(min_size=1), min_size=1, unique=True), st.text())
def test_a_ring_opens_for_its_keys_and_for_nothing_else(
    tmp_path_factory: pytest.TempPathFactory, secrets: list[str], other: str
) -> None:
    ring = KeyRing(write(tmp_path_factory.mktemp("ring") / "keys.json", *secrets))
    for i, secret in enumerate(secrets):
        found = ring.find(secret)
        assert found is not None
        assert found.name == f"key-{i}"
    assert (ring.find(other) is not None) == (other in secrets)


@pytest.mark.parametrize("secret", ["first", "second", "third", "none of them"])
def test_every_entry_is_compared_whichever_it_is(
    secret: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ring = KeyRing(write(tmp_path / "keys.json", "first", "second", "third"))
    compared = []
    compare = hmac.compare_digest

    def counting(a: str, b: str) -> bool:
        compared.append(a)
        return compare(a, b)

    monkeypatch.setattr(hmac, "compare_digest", counting)
    ring.find(secret)
    assert compared == [hashed(key) for key in ("first", "second", "third")]


HASH = "0" * 64


def entries(*keys: dict[str, str]) -> str:
    return json.dumps({"keys": keys})


@pytest.mark.parametrize(
    ("text", "fragment"),
    [
        ("", "Invalid JSON"),
        ('{"keys": {}}', "keys"),
        (entries({"name": "a", "sha256": "SECRET"}), "keys.0.sha256"),
        (entries({"name": "a"}), "keys.0.sha256: Field required"),
        (entries({"name": "SECRET key", "sha256": HASH}), "keys.0.name"),
        (entries({"name": "a", "sha256": HASH, "role": "SECRET"}), "keys.0.role"),
        (entries({"name": "a", "sha256": HASH, "rate": "SECRET"}), "keys.0.rate"),
        (entries({"name": "a", "sha256": HASH}, {"name": "b", "sha256": HASH}), "the sha256 of 'b'"),
        (entries({"name": "a", "sha256": HASH}, {"name": "a", "sha256": "1" * 64}), "the name of 'a'"),
    ],
)
def test_broken_file_is_told_without_its_values(text: str, fragment: str, tmp_path: Path) -> None:
    path = tmp_path / "keys.json"
    path.write_text(text)
    with pytest.raises(UsageError) as raised:
        KeyRing(path)
    assert str(path) in str(raised.value)
    assert fragment in str(raised.value)
    assert "SECRET" not in str(raised.value)
    assert raised.value.__cause__ is None  # its text would show the value in a trace


def test_changed_file_is_read_again_and_a_broken_or_lost_one_changes_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    clock, path = Clock(), tmp_path / "keys.json"
    ring = KeyRing(write(path, "old"), clock)
    caplog.set_level(logging.INFO)

    write(path, "old", "new")
    assert ring.find("new") is None  # not looked at so soon
    clock.now += CHECK_S
    assert ring.find("new") is not None

    for spoil in (lambda: path.write_text("{"), path.unlink):
        caplog.clear()
        spoil()
        for _ in range(3):
            clock.now += CHECK_S
            assert ring.find("old") is not None
        errors = [record.getMessage() for record in caplog.records if record.levelname == "ERROR"]
        assert len(errors) == 1  # once, not at every look
        assert "2 keys read before stay in force" in errors[0]

    write(path, "new")
    clock.now += CHECK_S
    assert ring.find("old") is None
    assert ring.find("new") is not None


def test_file_of_the_same_time_and_size_is_another_if_it_is_another_file(tmp_path: Path) -> None:
    clock, path = Clock(), tmp_path / "keys.json"
    ring = KeyRing(write(path, "old"), clock)
    before = path.stat()
    other = write(tmp_path / "other.json", "new")
    os.utime(other, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert other.stat().st_size == before.st_size
    os.replace(other, path)
    clock.now += CHECK_S
    assert ring.find("new") is not None


@pytest.mark.parametrize("command", ["new", "list", "remove"])
def test_folder_or_file_that_is_not_there_is_told(
    command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name = [] if command == "list" else ["alice"]
    assert main([command, *name, "--keys", str(tmp_path / "no" / "keys.json")]) == 2
    assert "No such file or directory" in capsys.readouterr().err
