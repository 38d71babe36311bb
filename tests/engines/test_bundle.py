"""A manifest whose parts do not fit each other is refused, by name."""

from __future__ import annotations

import errno
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from engines.bundle import MANIFEST, load_bundle
from engines.errors import BundleError
from engines.fake import fake_bundle

Change = Callable[[dict[str, Any]], Any]


def rename(table: dict[str, Any], old: str, new: str) -> None:
    table[new] = table.pop(old)


CHANGES: list[tuple[Change, str]] = [
    (
        lambda m: rename(m["components"]["denoiser"]["inputs"], "sigma", "timestep"),
        r"denoiser takes \[.*'timestep'.*\], not \[.*'sigma', 'sigma_next'",
    ),
    (
        lambda m: rename(m["components"]["denoiser"]["outputs"], "x0", "velocity"),
        r"denoiser gives \['velocity', 'x_next'\], not \['x0', 'x_next'\]",
    ),
    (
        lambda m: rename(m["components"]["decoder"]["inputs"], "x", "latents"),
        r"decoder takes \['latents'\], not \['x'\]",
    ),
    (
        lambda m: rename(m["components"]["decoder"]["outputs"], "image", "sample"),
        r"decoder gives \['sample'\], not \['image'\]",
    ),
    (
        lambda m: m["tokenizers"][0].update(input="ids"),
        r"text_encoder takes \['input_ids'\], not \['ids'\]",
    ),
    (lambda m: m["tokenizers"].append(m["tokenizers"][0]), "one input twice"),
    (lambda m: m["sizes"][1].update(width=60), r"size 60x64.*latent\.downscale=8"),
    (lambda m: m.update(default_steps=5), "default_steps=5 has no schedule"),
]


@pytest.mark.parametrize(("change", "message"), CHANGES)
def test_parts_that_do_not_fit_are_refused_by_name(tmp_path: Path, change: Change, message: str) -> None:
    fake_bundle(tmp_path)
    document = json.loads((tmp_path / MANIFEST).read_text(encoding="utf-8"))
    change(document)
    (tmp_path / MANIFEST).write_text(json.dumps(document), encoding="utf-8")
    with pytest.raises(BundleError, match=message):
        load_bundle(tmp_path)


def damaged(path: Path, how: str) -> None:
    data = bytearray(path.read_bytes())
    if how == "flipped":
        data[len(data) // 2] ^= 1
    path.write_bytes(data if how == "flipped" else data[:-1])


@pytest.mark.parametrize(
    ("how", "message"),
    [("flipped", "its SHA-256 is [0-9a-f]{12}…, not [0-9a-f]{12}…"), ("truncated", "it has 2 bytes, not 3")],
)
def test_damage_is_told_from_truncation(tmp_path: Path, how: str, message: str) -> None:
    fake_bundle(tmp_path)
    damaged(tmp_path / "tokenizer.json", how)
    with pytest.raises(
        BundleError, match=f"tokenizer.json is not the file that was exported: {message}; export"
    ):
        load_bundle(tmp_path)


def test_file_that_cannot_be_read_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_bundle(tmp_path)

    def forbidden(path: Path) -> str:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr("engines.bundle.sha256_file", forbidden)
    with pytest.raises(BundleError, match=r"text_encoder\.onnx cannot be read \(Permission denied\)"):
        load_bundle(tmp_path)


@pytest.mark.parametrize("text", [b"", b"{", b"\xff", b"[" * 100_000])
def test_manifest_that_is_no_json_is_told(tmp_path: Path, text: bytes) -> None:
    fake_bundle(tmp_path)
    (tmp_path / MANIFEST).write_bytes(text)
    with pytest.raises(BundleError, match=r"is not valid JSON .*; export or download the bundle again"):
        load_bundle(tmp_path)
