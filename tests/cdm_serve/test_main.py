"""The command: its settings, its mistakes in one sentence, and a start without torch."""

from __future__ import annotations

import errno
import json
import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

import httpx
import pytest
from pydantic import ValidationError

from cdm_serve.images import read_parameters
from cdm_serve.main import main
from cdm_serve.settings import ServeSettings, default_bundle
from engines.base import RUNTIMES
from engines.bundle import Bundle
from tests.cdm_serve.helpers import PATIENCE_S

ROOT = Path(__file__).resolve().parents[2]

BLOCKED = """
import sys

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("torch", "torchvision", "diffusers", "transformers", "onnx", "onnxscript"):
            raise ModuleNotFoundError(f"{name} is blocked", name=name)

sys.meta_path.insert(0, Refuse())
"""
SERVE = BLOCKED + "from cdm_serve.main import main\nraise SystemExit(main(sys.argv[1:]))"
EXPORT = BLOCKED + "from engines.export.main import main\nraise SystemExit(main(sys.argv[1:]))"


def environment() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if not name.startswith("CDM_")}


@pytest.mark.parametrize("engine", ["fake", "onnxruntime", "openvino"])
def test_server_starts_serves_and_stops_without_torch(engine: str, request: pytest.FixtureRequest) -> None:
    flags = ["--engine", engine, "--port", "0", "--max-batch", "2"]
    if engine != "fake":
        flags += ["--threads", "1", "--bundle", str(request.getfixturevalue("tiny_bundle").root)]
    command = [sys.executable, "-c", SERVE, *flags]
    with subprocess.Popen(command, cwd=ROOT, env=environment(), stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stderr is not None
            lines = iter(process.stderr.readline, "")
            found = next(
                filter(None, (re.search(r"at (http://127\.0\.0\.1:\d+)", line) for line in lines)), None
            )
            assert found, f"it never listened; exit code {process.wait()}"
            body = {"prompt": "red apple", "seed": 7}
            response = httpx.post(f"{found[1]}/generate", json=body, timeout=PATIENCE_S)
            assert response.status_code == 200
            assert read_parameters(response.content)["seed"] == 7
            assert httpx.get(f"{found[1]}/info").json()["engine"]["runtime"] == engine
            process.send_signal(signal.SIGTERM)
            assert process.wait(PATIENCE_S) == 0
        finally:
            process.kill()


def test_export_without_its_packages_shows_help_and_names_the_extra() -> None:
    def export(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-c", EXPORT, *arguments]
        return subprocess.run(
            command, cwd=ROOT, env=environment(), capture_output=True, text=True, check=False
        )

    shown = export("--help")
    assert (shown.returncode, shown.stderr) == (0, "")
    assert "--tolerance-stored" in shown.stdout
    refused = export("a-student", "--out", "a-bundle")
    assert refused.returncode == 2
    assert re.fullmatch(
        r"cdm-export: error: cdm-export needs the package '\w+', which is not installed; "
        r"pip install 'cdm-serve\[train\]'\n",
        refused.stderr,
    )


def test_start_that_fails_is_no_success(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> bytes:
        raise OSError("no encoder here")

    monkeypatch.setattr("cdm_serve.delivery.encode_image", broken)
    assert main(["--engine", "fake", "--port", "0"]) == 1


@pytest.mark.parametrize(
    ("flags", "fragments"),
    [
        (["--precision", "bf16"], ["precision=bf16", "fake", "leave it out"]),
        (["--threads", "2"], ["threads=2", "fake", "leave it out"]),
        (["--cache-dir", "compiled"], ["cache_dir=compiled", "fake", "leave it out"]),
    ],
)
def test_option_that_the_fake_engine_cannot_follow_is_refused(
    flags: list[str], fragments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--engine", "fake", "--port", "0", *flags]) == 2
    error = capsys.readouterr().err
    assert all(fragment in error for fragment in fragments), error


@pytest.mark.parametrize(
    ("error", "remedy"),
    [
        (socket.gaierror(socket.EAI_NONAME, "Name or service not known"), "with --host"),
        (OSError(errno.EADDRNOTAVAIL, "Cannot assign requested address"), "with --host"),
        (OSError(errno.EACCES, "Permission denied"), "ports below 1024"),
        (OSError(errno.EADDRINUSE, "Address already in use"), "choose another with --port"),
    ],
)
def test_address_that_cannot_be_had_is_told_with_its_own_remedy(
    error: OSError, remedy: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(*_: object, **__: object) -> socket.socket:
        raise error

    monkeypatch.setattr(socket, "create_server", refuse)
    assert main(["--engine", "fake", "--port", "80"]) == 2
    told = capsys.readouterr().err
    assert f"--host=127.0.0.1 --port=80: {error.strerror}; " in told
    assert remedy in told


def test_host_of_no_machine_is_told_as_the_host(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--engine", "fake", "--port", "0", "--host", "256.0.0.1.2"]) == 2
    assert "with --host" in capsys.readouterr().err


def test_engine_setting_offers_every_runtime() -> None:
    schema = ServeSettings.model_json_schema()["properties"]["engine"]
    assert set(schema["enum"]) == {"auto", *RUNTIMES}


def test_dry_run_prints_what_would_run_and_serves_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--engine", "fake", "--port", "1234", "--dry-run"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert (shown["engine"], shown["port"], shown["max_batch"]) == ("fake", 1234, 8)


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize("flag", ["--dry-run", "--help"])
def test_reader_that_leaves_early_ends_it_quietly(flag: str, unbuffered: str) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    try:
        command = [sys.executable, "-m", "cdm_serve.main", flag]
        done = subprocess.run(
            command,
            cwd=ROOT,
            env={**environment(), "PYTHONUNBUFFERED": unbuffered},
            stdout=writing,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
    finally:
        os.close(writing)
    assert (done.returncode, done.stderr) == (0, "")


def test_flag_wins_over_variable_and_variable_over_default(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("CDM_SERVE_PORT", "1111")
    monkeypatch.setenv("CDM_SERVE_MAX_BATCH", "3")
    assert main(["--port", "2222", "-n"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert (shown["port"], shown["max_batch"]) == (2222, 3)


@pytest.mark.parametrize(
    ("flags", "fragments"),
    [
        (["--port", "70000"], ["--port=70000", "65535"]),
        (["--max-batch", "0"], ["--max-batch=0", "1"]),
        (["--engine", "tpu"], ["--engine=tpu", "openvino"]),
        (["--max-images", "20", "--queue-limit", "10"], ["--max-images=20", "--queue-limit=10"]),
        (["--max-prompt-chars", "5000"], ["--max-prompt-chars=5000", "4096"]),
        (["--bundle", "no/such/folder"], ["no/such/folder", "is not a bundle"]),
        (["--engine", "fake", "--bundle", "no/such/folder"], ["no/such/folder"]),
        (["--nonsense"], ["--nonsense"]),
    ],
)
def test_users_mistake_is_one_sentence_and_exit_2(
    flags: list[str], fragments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--port", "0", *flags] if "--port" not in flags else flags) == 2
    error = capsys.readouterr().err
    assert error.startswith("cdm-serve: error: ")
    assert "Traceback" not in error
    for fragment in fragments:
        assert fragment in error


def test_taken_port_is_told_with_the_remedy(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert main(["--engine", "fake", "--port", str(port)]) == 2
    error = capsys.readouterr().err
    assert f"--port={port}" in error
    assert "choose another" in error


def test_limit_that_leaves_no_step_count_is_told(
    bundle: Bundle, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from engines.fake import fake_bundle

    fake_bundle(tmp_path, steps=[4, 8])
    assert main(["--engine", "fake", "--bundle", str(tmp_path), "--port", "0", "--max-steps", "2"]) == 2
    error = capsys.readouterr().err
    assert "--max-steps=2" in error
    assert "--max-steps 4" in error


def test_missing_bundled_model_is_told_with_the_remedy(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("cdm_serve.main.default_bundle", lambda: tmp_path / "none")
    assert main(["--port", "0"]) == 2
    assert "--bundle" in capsys.readouterr().err


def test_bundled_model_lies_inside_the_package() -> None:
    assert default_bundle().parent.parent == ROOT / "cdm_serve"


def test_one_request_must_fit_the_queue() -> None:
    with pytest.raises(ValidationError, match="raise --queue-limit to at least 20"):
        ServeSettings(max_images=20, queue_limit=10)
