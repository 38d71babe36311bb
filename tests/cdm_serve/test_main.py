"""The command: its settings, its mistakes in one sentence, and a start without torch."""

from __future__ import annotations

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
        if name.split(".")[0] in ("torch", "torchvision", "diffusers", "transformers"):
            raise ImportError(f"{name} is blocked")

sys.meta_path.insert(0, Refuse())
from cdm_serve.main import main
raise SystemExit(main(["--engine", "fake", "--port", "0", "--max-batch", "2"]))
"""


def test_server_starts_serves_and_stops_without_torch() -> None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("CDM_")}
    command = [sys.executable, "-c", BLOCKED]
    with subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True) as process:
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
            process.send_signal(signal.SIGTERM)
            assert process.wait(PATIENCE_S) == 0
        finally:
            process.kill()


def test_engine_setting_offers_every_runtime() -> None:
    schema = ServeSettings.model_json_schema()["properties"]["engine"]
    assert set(schema["enum"]) == {"auto", *RUNTIMES}


def test_dry_run_prints_what_would_run_and_serves_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--engine", "fake", "--port", "1234", "--dry-run"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert (shown["engine"], shown["port"], shown["max_batch"]) == ("fake", 1234, 8)


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
