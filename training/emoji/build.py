"""Fetch, caption, split, render, write: `build(EmojiDataSettings())` leaves a complete folder or nothing.

data/emoji/images.npy     uint8 (N, 128, 128, 3)
data/emoji/records.jsonl  one line per picture, in the same order
data/emoji/dataset.json   versions, hashes, counts
data/emoji/NOTICE         licence and attribution per set
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import Field
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from engines.cli import CommandSettings
from engines.files import replace_folder, sha256_file
from training.emoji import fetch as source
from training.emoji.captions import Catalogue
from training.emoji.dataset import FORMAT_VERSION, Record, read_info
from training.emoji.fetch import DataError, Icon, Licence
from training.emoji.render import render
from training.emoji.splits import Item, assign

FILES = ("images.npy", "records.jsonl", "NOTICE", "dataset.json")


class EmojiDataSettings(CommandSettings, env_prefix="CDM_EMOJI_DATA_"):
    """Fetch the icon sets and write the emoji data set. Same settings, same bytes."""

    out: Path = Field(Path("data/emoji"), description="folder to write the data set to")
    cache: Path = Field(Path("data/cache"), description="folder that keeps the npm tarballs")
    sets: tuple[str, ...] = Field(tuple(source.SETS), description="icon sets to use")
    size: int = Field(128, ge=16, le=512, description="width and height of the pictures, in pixels")
    seed: int = Field(0, description="seed of the held-out splits")
    heldout_combinations: float = Field(
        0.03,
        ge=0,
        le=0.5,
        description="share of (concept, gender, skin tone) combinations held out in all styles",
    )
    heldout_pairs: float = Field(0.03, ge=0, le=0.5, description="share of (name, style) pairs held out")
    force: bool = Field(False, description="build again even if a complete data set is there")

    def fingerprint(self) -> dict[str, Any]:
        """All that decides the bytes, as it stands in dataset.json."""
        chosen = self.model_dump(
            mode="json", include={"sets", "size", "seed", "heldout_combinations", "heldout_pairs"}
        )
        packages = [*(source.SETS[name].package for name in self.sets), source.EMOJIBASE]
        return {**chosen, "packages": {package.name: asdict(package) for package in packages}}


def build(settings: EmojiDataSettings) -> Path:
    console = Console(stderr=True)
    if unknown := [name for name in settings.sets if name not in source.SETS]:
        raise DataError(f"sets: {', '.join(unknown)} unknown; choose from {', '.join(source.SETS)}")
    out = settings.out
    if _is_reusable(settings):
        console.print(f"{out}: complete, same settings: reused (--force builds it again)")
        return out

    tarballs = {name: source.fetch(source.SETS[name].package, settings.cache) for name in settings.sets}
    emojibase = source.fetch(source.EMOJIBASE, settings.cache)
    icons = {name: source.read_icons(name, tarball) for name, tarball in tarballs.items()}
    licences = {name: source.read_licence(tarball) for name, tarball in tarballs.items()}
    catalogue = Catalogue.build(
        source.read_json(emojibase, "package/en/data.json"),
        {name: source.read_chars(tarball) for name, tarball in tarballs.items()},
        {name: source.read_aliases(tarball) for name, tarball in tarballs.items()},
        {name: [icon.name for icon in of_set] for name, of_set in icons.items()},
    )
    everything = [icon for of_set in icons.values() for icon in of_set]
    records = _records(settings, everything, catalogue, licences)

    out.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(dir=out.parent, prefix=f".{out.name}-"))
    try:
        scratch.chmod(0o755)
        _write_images(scratch / "images.npy", everything, settings.size, console)
        lines = (json.dumps(asdict(record), sort_keys=True) + "\n" for record in records)
        (scratch / "records.jsonl").write_text("".join(lines), encoding="utf-8")
        (scratch / "NOTICE").write_text(_notice(settings, licences, records), encoding="utf-8")
        info = _info(settings, records, scratch)
        (scratch / "dataset.json").write_text(json.dumps(info, indent=2) + "\n", encoding="utf-8")
        replace_folder(scratch, out)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)  # gone already when all went well
    console.print(f"{out}: {len(records)} pictures, {info['counts']['split']}")
    return out


def _is_reusable(settings: EmojiDataSettings) -> bool:
    out = settings.out
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return False
    if not (out / "dataset.json").is_file():
        raise DataError(f"{out}: holds something that is not a data set; choose another folder or remove it")
    if settings.force:
        return False
    info = read_info(out)
    if info["settings"] != settings.fingerprint():
        raise DataError(f"{out}: was built with other settings; use --force to replace it, or another folder")
    for name, expected in info["sha256"].items():
        if not (out / name).is_file() or sha256_file(out / name) != expected:
            raise DataError(
                f"{out / name}: missing or sha256 is not {expected}; use --force to build it again"
            )
    return True


def _records(
    settings: EmojiDataSettings, icons: Sequence[Icon], catalogue: Catalogue, licences: dict[str, Licence]
) -> list[Record]:
    captions = [catalogue.resolve(icon.set, icon.name) for icon in icons]
    styles = [source.SETS[icon.set].style for icon in icons]
    items = [
        Item(one.name, style, one.concept, one.attributes.get("gender"), one.attributes.get("skin_tone"))
        for one, style in zip(captions, styles, strict=True)
    ]
    splits = assign(items, settings.seed, settings.heldout_combinations, settings.heldout_pairs)
    return [
        Record(
            index=index,
            set=icon.set,
            style=style,
            icon=icon.name,
            name=one.name,
            concept=one.concept,
            attributes=one.attributes,
            keywords=one.keywords,
            licence=licences[icon.set].spdx,
            attribution=licences[icon.set].attribution,
            split=split,
        )
        for index, (icon, one, style, split) in enumerate(zip(icons, captions, styles, splits, strict=True))
    ]


def _write_images(path: Path, icons: Sequence[Icon], size: int, console: Console) -> None:
    images = np.lib.format.open_memmap(path, mode="w+", dtype=np.uint8, shape=(len(icons), size, size, 3))
    columns = (
        TextColumn("rendering {task.fields[set]}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("render", total=len(icons), set="")
        for row, icon in enumerate(icons):
            images[row] = render(icon, size)
            progress.update(task, advance=1, set=icon.set)
    images.flush()


def _info(settings: EmojiDataSettings, records: Sequence[Record], folder: Path) -> dict[str, Any]:
    return {
        "format_version": FORMAT_VERSION,
        "settings": settings.fingerprint(),
        "counts": {
            "images": len(records),
            "names": len({record.name for record in records}),
            "concepts": len({record.concept for record in records}),
            "set": dict(sorted(Counter(record.set for record in records).items())),
            "split": dict(sorted(Counter(record.split for record in records).items())),
            "licence": dict(sorted(Counter(record.licence for record in records).items())),
        },
        "sha256": {name: sha256_file(folder / name) for name in FILES if name != "dataset.json"},
    }


def _notice(settings: EmojiDataSettings, licences: dict[str, Licence], records: Sequence[Record]) -> str:
    counts = Counter(record.set for record in records)
    parts = [
        "The pictures of this data set were rendered from the icon sets below: scaled to "
        f"{settings.size}x{settings.size} pixels on white, otherwise unchanged.\n"
    ]
    for name in settings.sets:
        licence = licences[name]
        parts.append(
            f"{licence.title} ({source.SETS[name].package.spec}), {counts[name]} pictures, style "
            f'"{source.SETS[name].style}"\n  by {licence.author}, {licence.url}\n'
            f"  licence {licence.spdx}, {licence.licence_url}\n"
        )
    parts.append(f"Keywords and names: {source.EMOJIBASE.spec} by Miles Johnson, licence MIT\n")
    return "\n".join(parts)
