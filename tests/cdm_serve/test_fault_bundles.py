"""Faults of a bundle: one sentence, and exit code 2."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from cdm_serve.main import main
from engines.bundle import MANIFEST
from engines.fake import fake_bundle


def flipped(folder: Path) -> None:
    data = bytearray((folder / "tokenizer.json").read_bytes())
    data[0] ^= 1
    (folder / "tokenizer.json").write_bytes(data)


def truncated(folder: Path) -> None:
    (folder / "tokenizer.json").write_bytes(b"{")


def missing(folder: Path) -> None:
    (folder / "denoiser.onnx").unlink()


def of_another_version(folder: Path) -> None:
    document = json.loads((folder / MANIFEST).read_bytes())
    (folder / MANIFEST).write_text(json.dumps({**document, "format_version": 99}))


def with_a_wrong_schedule(folder: Path) -> None:
    document = json.loads((folder / MANIFEST).read_bytes())
    document["schedules"]["4"].reverse()
    (folder / MANIFEST).write_text(json.dumps(document))


def half_a_manifest(folder: Path) -> None:
    data = (folder / MANIFEST).read_bytes()
    (folder / MANIFEST).write_bytes(data[: len(data) // 2])


@pytest.mark.parametrize(
    ("harm", "words"),
    [
        (flipped, "tokenizer.json is not the file that was exported: its SHA-256 is"),
        (truncated, "tokenizer.json is not the file that was exported: it has 1 bytes, not 3"),
        (missing, "lacks denoiser.onnx, which bundle.json names; export or download the bundle again"),
        (
            of_another_version,
            "has bundle format 99, this version serves 2; install the cdm-serve that wrote it",
        ),
        (with_a_wrong_schedule, "it must be 5 sigmas falling strictly from 1 to 0"),
        (half_a_manifest, "bundle.json is not valid JSON"),
    ],
)
def test_corrupt_bundle_is_one_sentence_and_exit_2(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    harm: Callable[[Path], None],
    words: str,
) -> None:
    monkeypatch.setattr("uvicorn.Server.run", lambda *_, **__: None)  # what is not refused must not be served
    fake_bundle(tmp_path)
    harm(tmp_path)
    assert main(["--engine", "fake", "--bundle", str(tmp_path), "--port", "0"]) == 2
    told = capsys.readouterr().err
    assert told.startswith("cdm-serve: error: ")
    assert words in told
    assert told.count("\n") == 1
