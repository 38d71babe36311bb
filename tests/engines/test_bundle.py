"""A manifest whose parts do not fit each other is refused, by name."""

from __future__ import annotations

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
