"""npm tarballs of a few one-shape icons: `install(tmp_path / "cache", monkeypatch)` and `build` needs no network."""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from pathlib import Path
from typing import Any

import pytest

from training.emoji import fetch
from training.emoji.fetch import IconSet, Package

TONES = {
    "1f3fb": "light",
    "1f3fc": "medium-light",
    "1f3fd": "medium",
    "1f3fe": "medium-dark",
    "1f3ff": "dark",
}
# base codepoint → label; the first two have a gender and skin tones
PEOPLE = {"1f468-200d-1f33e": "man farmer", "1f469-200d-1f33e": "woman farmer"}
THINGS = {"1f680": "rocket", "1f4a1": "light bulb", "1f1ef-1f1f5": "flag: Japan", "1f420": "tropical fish"}
SET_NAMES = ("noto", "fluent-emoji", "fluent-emoji-flat", "twemoji", "fxemoji")


def emojibase() -> list[dict[str, Any]]:
    entries: list[dict[str, Any]] = [
        {"hexcode": code.upper(), "label": label, "tags": ["space", label.split()[0], "fun"]}
        for code, label in THINGS.items()
    ]
    for code, label in PEOPLE.items():
        skins = [
            {"hexcode": toned(code, mark).upper(), "label": f"{label}: {tone} skin tone"}
            for mark, tone in TONES.items()
        ]
        entries.append({"hexcode": code.upper(), "label": label, "tags": ["field", "man"], "skins": skins})
    return entries


def toned(code: str, mark: str) -> str:
    first, rest = code.split("-", 1)
    return f"{first}-{mark}-{rest}"


def chars(spelled_out: bool) -> dict[str, str]:
    """Codepoints → icon name: noto and twemoji spell "-skin-tone" out, fluent does not."""
    found = {
        code: label.lower().replace(": ", "-").replace(" ", "-") for code, label in (THINGS | PEOPLE).items()
    }
    for code, label in PEOPLE.items():
        for mark, tone in TONES.items():
            found[toned(code, mark)] = f"{label.replace(' ', '-')}-{tone}{'-skin-tone' * spelled_out}"
    return found


def pack(path: Path, members: dict[str, Any]) -> str:
    """Write the tarball, return its sha256."""
    with tarfile.open(path, "w:gz") as archive:
        for name, content in members.items():
            data = json.dumps(content).encode()
            entry = tarfile.TarInfo(f"package/{name}")
            entry.size = len(data)
            archive.addfile(entry, io.BytesIO(data))
    return hashlib.sha256(path.read_bytes()).hexdigest()


def icon_set(set_name: str, bodies: dict[str, str] | None = None) -> dict[str, Any]:
    if set_name == "fxemoji":  # no codepoints, names run together
        names, codes = [name.replace("-", "") for name in chars(True).values()][:4], {}
    else:
        codes = chars(spelled_out=not set_name.startswith("fluent"))
        names = list(codes.values())
    shade = 20 * (1 + SET_NAMES.index(set_name))
    icons = {
        name: {"body": f'<circle cx="16" cy="16" r="{4 + row % 10}" fill="rgb({shade},{7 * row},90)"/>'}
        for row, name in enumerate(names)
    }
    icons["secret"] = {"body": "<g/>", "hidden": True}
    for name, body in (bodies or {}).items():
        icons[name] = {"body": body}
    return {
        "icons.json": {
            "width": 32,
            "height": 32,
            "icons": icons,
            "aliases": {"spaceship": {"parent": "rocket"}},
        },
        "chars.json": {} if set_name == "fluent-emoji" else codes,
        "info.json": {
            "name": f"Set {set_name}",
            "author": {"name": "A. Painter", "url": "https://example.org"},
            "license": {
                "spdx": "CC-BY-4.0" if set_name == "twemoji" else "MIT",
                "url": "https://example.org/l",
            },
        },
    }


def install(cache: Path, patch: pytest.MonkeyPatch, bodies: dict[str, str] | None = None) -> None:
    """Fill the cache and pin its hashes; `bodies` adds icons to noto."""
    cache.mkdir(parents=True)
    sets: dict[str, IconSet] = {}
    for name in SET_NAMES:
        package = Package(f"@iconify-json/{name}", "1.0.0", "")
        members = icon_set(name, bodies if name == "noto" else None)
        sha = pack(cache / package.filename, members)
        sets[name] = IconSet(Package(package.name, package.version, sha), fetch.SETS[name].style)
    base = Package("emojibase-data", "1.0.0", "")
    sha = pack(cache / base.filename, {"en/data.json": emojibase()})
    patch.setattr(fetch, "SETS", sets)
    patch.setattr(fetch, "EMOJIBASE", Package(base.name, base.version, sha))
