"""Pinned npm tarballs → icons in memory. Nothing is unpacked to disk.

tarball = fetch(SETS["noto"].package, cache)     # runs `npm pack`, checks the sha256
icons = read_icons("noto", tarball)
"""

from __future__ import annotations

import json
import shutil
import subprocess
import tarfile
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engines.files import sha256_file


class DataError(Exception):
    """The data set cannot be built or read; the message says what, why and what to do."""


@dataclass(frozen=True)
class Package:
    """One npm package at one version, with the hash its tarball must have."""

    name: str
    version: str
    sha256: str

    @property
    def spec(self) -> str:
        return f"{self.name}@{self.version}"

    @property
    def filename(self) -> str:
        # npm's own naming: the scope's @ goes, its slash becomes a dash
        return f"{self.name.removeprefix('@').replace('/', '-')}-{self.version}.tgz"


@dataclass(frozen=True)
class IconSet:
    package: Package
    style: str  # the word a caption starts with


@dataclass(frozen=True)
class Icon:
    set: str
    name: str
    body: str
    left: float
    top: float
    width: float
    height: float


@dataclass(frozen=True)
class Licence:
    spdx: str
    title: str
    author: str
    url: str
    licence_url: str

    @property
    def attribution(self) -> str:
        return f"{self.title} by {self.author} ({self.url})"


def _iconify(name: str, version: str, style: str, sha256: str) -> IconSet:
    return IconSet(Package(f"@iconify-json/{name}", version, sha256), style)


# Left out on purpose: openmoji and emojione-v1 are share-alike, which would bind the trained weights.
SETS: dict[str, IconSet] = {
    "noto": _iconify(
        "noto", "1.2.9", "noto", "3e918d88fc945c0bb3d468dbace6f88caef67f01c9f0e7bcae0915a042e8f1ad"
    ),
    "noto-v1": _iconify(
        "noto-v1", "1.2.5", "blob", "2bf62c26c2c2884aa99e90aec942cdaee17a5921f05690694f4978ad4b017c37"
    ),
    "fluent-emoji": _iconify(
        "fluent-emoji", "1.2.7", "fluent", "8044210dbf11e016d4de85f15d01a243423bd832457e7e2491df1b751c0e272b"
    ),
    "fluent-emoji-flat": _iconify(
        "fluent-emoji-flat",
        "1.2.6",
        "flat",
        "7d064769dee690815f823bc5bcc511d957198caf9f5edd8dd9c1aa48a6aeb175",
    ),
    "twemoji": _iconify(
        "twemoji", "1.2.5", "twemoji", "19046dff7d8707ce96212ec86468b36ac5f8e60409629dd13f809265c6d0ebb7"
    ),
    "fxemoji": _iconify(
        "fxemoji", "1.2.2", "firefox", "f3e72b3c59d05e1db03b7e308d55c0d05bd7ba3f625a90da1b79313c12858eef"
    ),
}
EMOJIBASE = Package(
    "emojibase-data", "17.0.0", "d01d0e2ca4e22cb402679532155342c71e2e871f25c32223c013b8b166ebdf5a"
)


def fetch(package: Package, cache: Path) -> Path:
    """The package's tarball in `cache`, fetched by `npm pack` unless a file with the right hash lies there."""
    target = cache / package.filename
    if target.is_file():
        got = sha256_file(target)
        if got == package.sha256:
            return target
        raise DataError(
            f"{target}: sha256 is {got}, expected {package.sha256} for {package.spec}; "
            f"delete the file and run the command again"
        )
    npm = shutil.which("npm")
    if npm is None:
        raise DataError(
            f"{package.spec}: npm is not installed, and {target} is not there; "
            f"install npm, or put the tarball in place yourself (sha256 {package.sha256})"
        )
    cache.mkdir(parents=True, exist_ok=True)
    # A private folder first: a broken or wrong download must never lie in the cache under the right name.
    with tempfile.TemporaryDirectory(dir=cache.resolve(), prefix=".fetch-") as folder:
        command = [
            npm,
            "pack",
            package.spec,
            "--pack-destination",
            folder,
            "--ignore-scripts",
            "--loglevel=error",
        ]
        done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=folder)
        fetched = Path(folder) / package.filename
        if done.returncode != 0 or not fetched.is_file():
            said = (done.stderr.strip() or done.stdout.strip() or "nothing")[-500:]
            raise DataError(
                f"{package.spec}: npm pack failed (exit {done.returncode}), it said: {said}; "
                f"check the registry in `npm config get registry`, or put {package.filename} into {cache}"
            )
        got = sha256_file(fetched)
        if got != package.sha256:
            raise DataError(
                f"{package.spec}: npm brought a tarball with sha256 {got}, expected {package.sha256}; "
                f"the registry serves something else than what was pinned: nothing was kept"
            )
        fetched.replace(target)
    return target


def read_json(tarball: Path, member: str) -> Any:
    """One JSON member, read straight from the tar."""
    try:
        with tarfile.open(tarball, "r:gz") as archive:
            file = archive.extractfile(member)
            if file is None:
                raise KeyError(member)
            return json.load(file)
    except (KeyError, tarfile.TarError, OSError, EOFError, ValueError) as error:
        raise DataError(
            f"{tarball}: cannot read {member} ({error}); delete the file and fetch it again"
        ) from error


def read_icons(set_name: str, tarball: Path) -> list[Icon]:
    """The visible icons, sorted by name. Aliases are the same picture under another name: not listed."""
    data = read_json(tarball, "package/icons.json")

    def number(icon: dict[str, Any], key: str, default: float) -> float:
        return float(icon.get(key, data.get(key, default)))

    return [
        Icon(
            set=set_name,
            name=name,
            body=icon["body"],
            left=number(icon, "left", 0),
            top=number(icon, "top", 0),
            width=number(icon, "width", 16),  # 16 is Iconify's own default
            height=number(icon, "height", 16),
        )
        for name, icon in sorted(data["icons"].items())
        if not icon.get("hidden")
    ]


def read_chars(tarball: Path) -> dict[str, list[str]]:
    """Icon name → its codepoint sequences ("1f468-200d-1f692"); empty for a set that has none."""
    names: dict[str, list[str]] = {}
    for codepoints, name in sorted(read_json(tarball, "package/chars.json").items()):
        names.setdefault(name, []).append(codepoints)
    return names


def read_aliases(tarball: Path) -> dict[str, str]:
    """Another name → the icon it stands for."""
    aliases = read_json(tarball, "package/icons.json").get("aliases", {})
    return {name: alias["parent"] for name, alias in aliases.items() if set(alias) == {"parent"}}  # no flips


def read_licence(tarball: Path) -> Licence:
    info = read_json(tarball, "package/info.json")
    return Licence(
        spdx=info["license"]["spdx"],
        title=info["name"],
        author=info["author"]["name"],
        url=info["author"].get("url", ""),
        licence_url=info["license"].get("url", ""),
    )
