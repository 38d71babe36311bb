"""A server process with keys, and the official OpenAI client; what it logs and when it reads its keys again."""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from benchmarks.server import Server
from cdm_serve import keys
from cdm_serve.main import main
from tests.cdm_serve.helpers import wait_until

ROOT = Path(__file__).resolve().parents[2]


class Guarded:
    """A running server, its file of keys, and what it has logged."""

    def __init__(self, folder: Path) -> None:
        self.keys = folder / "keys.json"
        self.secrets = {name: self.new_key(name) for name in ("alice", "bob")}
        flags = ["--engine", "fake", "--keys", str(self.keys), "--log-format", "json", "--max-images", "4"]
        self.server = Server(flags)

    def new_key(self, name: str, *flags: str) -> str:
        command = [sys.executable, "-m", "cdm_serve.keys", "new", name, "--keys", str(self.keys), *flags]
        return subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout.strip()

    def draw(self, key: str, **more: Any) -> Any:
        url, web = f"{self.server.url}/v1", httpx.Client(trust_env=False)
        with openai.OpenAI(base_url=url, api_key=key, max_retries=0, http_client=web) as client:
            return client.images.generate(prompt="cat", **more)

    def lines(self) -> list[dict[str, Any]]:
        """Every line on standard error. A server that writes anything but JSON fails the test."""
        log = self.server._output
        size = os.fstat(log.fileno()).st_size
        return [json.loads(line) for line in os.pread(log.fileno(), size, 0).decode().splitlines()]

    def hang_up(self) -> None:
        """Send SIGHUP, and wait until the file has been read or refused."""
        before = sum(line["logger"] == "cdm_serve.keys" for line in self.lines())
        assert self.server._process is not None
        self.server._process.send_signal(signal.SIGHUP)
        wait_until(lambda: sum(line["logger"] == "cdm_serve.keys" for line in self.lines()) > before)


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Guarded]:
    guarded = Guarded(tmp_path_factory.mktemp("guarded"))
    with guarded.server:  # started though nobody gave it a key: /readyz is open
        yield guarded


def test_openai_client_is_let_in_by_its_key_alone(guarded: Guarded) -> None:
    assert guarded.draw(guarded.secrets["alice"], n=2).data[1].b64_json
    with pytest.raises(openai.AuthenticationError) as raised:
        guarded.draw("cdm_wrong")
    assert raised.value.code == "invalid_api_key"
    assert raised.value.request_id


def test_openai_client_reads_what_a_key_may_not_do(guarded: Guarded) -> None:
    secret = guarded.new_key("small", "--max-concurrent", "1", "--rate-per-minute", "1")
    guarded.hang_up()
    with pytest.raises(openai.BadRequestError) as raised:
        guarded.draw(secret, n=2)
    assert "max_concurrent=1" in raised.value.message
    guarded.draw(secret)
    with pytest.raises(openai.RateLimitError) as limited:
        guarded.draw(secret)
    assert limited.value.code == "rate_limit_exceeded"
    assert 1 <= int(limited.value.response.headers["retry-after"]) <= 60


def test_keys_are_read_again_on_hangup_and_a_broken_file_changes_nothing(guarded: Guarded) -> None:
    secret = guarded.new_key("late")
    guarded.hang_up()
    assert guarded.draw(secret).data
    good = guarded.keys.read_bytes()
    guarded.keys.write_bytes(good[:-20])
    guarded.hang_up()
    assert guarded.draw(secret).data
    guarded.keys.write_bytes(good)
    assert keys.main(["remove", "late", "--keys", str(guarded.keys)]) == 0
    guarded.hang_up()
    with pytest.raises(openai.AuthenticationError):
        guarded.draw(secret)
    errors = [line for line in guarded.lines() if line["level"] == "error"]
    assert len(errors) == 1
    assert "stay in force" in errors[0]["message"]


def test_log_names_keys_and_shows_none(guarded: Guarded) -> None:
    guarded.draw(guarded.secrets["bob"])

    def bob_was_served() -> bool:  # told after the answer
        return any(line.get("key") == "bob" and line["status"] == 200 for line in guarded.lines())

    wait_until(bob_was_served)
    lines = guarded.lines()
    assert not any(secret in json.dumps(lines) for secret in guarded.secrets.values())


@pytest.mark.parametrize("keyed", [True, False])
def test_server_open_to_a_network_without_keys_warns(
    keyed: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cdm_serve.main._is_loopback", lambda _: False)  # tests listen on loopback only
    monkeypatch.setattr("uvicorn.Server.run", lambda *_, **__: None)
    flags = ["--engine", "fake", "--port", "0"]
    if keyed:
        assert keys.main(["new", "alice", "--keys", str(tmp_path / "keys.json")]) == 0
        flags += ["--keys", str(tmp_path / "keys.json")]
    main(flags)
    warnings = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert len(warnings) == (not keyed)
    assert all("--keys" in warning for warning in warnings)


@pytest.mark.parametrize(
    ("address", "loopback"),
    [
        *((address, True) for address in ("127.0.0.1", "127.8.9.1", "::1")),
        *((address, False) for address in ("0.0.0.0", "::", "192.168.1.5", "fe80::1%eth0")),
    ],
)
def test_loopback_is_told_from_networks(address: str, loopback: bool) -> None:
    from cdm_serve.main import _is_loopback

    class Listener:
        def getsockname(self) -> tuple[str, int]:
            return (address, 8000)

    assert _is_loopback(Listener()) == loopback  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("flags", "fragments"),
    [
        (["--keys", "no/keys.json"], ["no/keys.json", "No such file"]),
        (["--metrics-open"], ["--metrics-open goes with --keys"]),
        (["--cors-origin", "example.org"], ["--cors-origin=example.org"]),
        (["--cors-origin", "https://example.org/path"], ["--cors-origin=https://example.org/path"]),
        (["--body-timeout-s", "0"], ["--body-timeout-s=0"]),
        (["--max-connections", "0"], ["--max-connections=0"]),
    ],
)
def test_users_mistake_is_one_sentence(
    flags: list[str], fragments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--engine", "fake", "--port", "0", *flags]) == 2
    error = capsys.readouterr().err
    assert error.startswith("cdm-serve: error: ")
    assert all(fragment in error for fragment in fragments), error
