from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from engines.files import sha256_file
from tests.training.emoji.fake_packages import SET_NAMES, install
from training.emoji import build as build_module
from training.emoji import fetch
from training.emoji.build import EmojiDataSettings, build
from training.emoji.dataset import EmojiDataset
from training.emoji.fetch import DataError

pytest.importorskip("resvg_py")


def settings(tmp_path: Path, out: str = "emoji", **changes: object) -> EmojiDataSettings:
    values = {"out": tmp_path / out, "cache": tmp_path / "cache", "sets": SET_NAMES, "size": 16, **changes}
    return EmojiDataSettings.model_validate({"heldout_combinations": 0.3, "heldout_pairs": 0.3, **values})


@pytest.fixture
def packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(tmp_path / "cache", monkeypatch)


@pytest.mark.usefixtures("packages")
def test_what_is_written_can_be_loaded(tmp_path: Path) -> None:
    data = EmojiDataset.load(build(settings(tmp_path)))
    assert isinstance(data.images, np.memmap)
    assert data.images.shape == (len(data.records), 16, 16, 3)
    assert [record.index for record in data.records] == list(range(len(data.records)))
    assert "secret" not in {record.icon for record in data.records}  # hidden
    assert "spaceship" not in {record.icon for record in data.records}  # an alias
    assert {record.licence for record in data.records if record.set == "twemoji"} == {"CC-BY-4.0"}
    assert data.records[0].attribution == "Set noto by A. Painter (https://example.org)"
    assert sum(data.info["counts"]["split"].values()) == len(data.records)
    for name in SET_NAMES:
        assert f"@iconify-json/{name}@1.0.0" in (tmp_path / "emoji" / "NOTICE").read_text()


@pytest.mark.usefixtures("packages")
def test_a_concept_has_one_name_in_every_style(tmp_path: Path) -> None:
    data = EmojiDataset.load(build(settings(tmp_path)))
    styles = {record.style for record in data.records if record.name == "tropical fish"}
    assert styles == {"noto", "fluent", "flat", "twemoji", "firefox"}
    name = "woman farmer medium light skin tone"
    assert {record.style for record in data.records if record.name == name} == {
        "noto",
        "fluent",
        "flat",
        "twemoji",
    }


@pytest.mark.usefixtures("packages")
def test_two_builds_are_equal_to_the_byte(tmp_path: Path) -> None:
    one, two = build(settings(tmp_path, "one")), build(settings(tmp_path, "two"))
    for name in build_module.FILES:
        assert sha256_file(one / name) == sha256_file(two / name), name


@pytest.mark.usefixtures("packages")
def test_hashes_in_dataset_json_are_those_of_the_files(tmp_path: Path) -> None:
    out = build(settings(tmp_path))
    for name, expected in json.loads((out / "dataset.json").read_text())["sha256"].items():
        assert sha256_file(out / name) == expected


@pytest.mark.usefixtures("packages")
def test_same_settings_are_reused_with_a_line_that_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = build(settings(tmp_path))
    before = (out / "images.npy").stat().st_mtime_ns
    build(settings(tmp_path))
    assert "reused" in " ".join(capsys.readouterr().err.split())
    assert (out / "images.npy").stat().st_mtime_ns == before
    build(settings(tmp_path, force=True))
    assert (out / "images.npy").stat().st_mtime_ns != before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cache", "emoji"]


@pytest.mark.usefixtures("packages")
def test_other_settings_a_damaged_file_or_a_foreign_folder_are_not_overwritten(tmp_path: Path) -> None:
    out = build(settings(tmp_path))
    with pytest.raises(DataError, match="other settings; use --force"):
        build(settings(tmp_path, seed=1))
    (out / "NOTICE").write_text("changed")
    with pytest.raises(DataError, match="NOTICE: missing or sha256"):
        build(settings(tmp_path))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    with pytest.raises(DataError, match="not a data set"):
        build(settings(tmp_path, "mine", force=True))


def test_an_unreadable_svg_is_named_and_nothing_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(tmp_path / "cache", monkeypatch, bodies={"zz-torn": "<circle <"})
    with pytest.raises(DataError, match=r"noto:zz-torn: resvg cannot read"):
        build(settings(tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["cache"]


@pytest.mark.usefixtures("packages")
def test_a_failed_rebuild_leaves_the_old_folder_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = build(settings(tmp_path))
    before = {path.name: sha256_file(path) for path in out.iterdir()}

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(build_module, "render", interrupted)
    with pytest.raises(KeyboardInterrupt):
        build(settings(tmp_path, force=True))
    assert {path.name: sha256_file(path) for path in out.iterdir()} == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cache", "emoji"]


@pytest.mark.usefixtures("packages")
def test_a_wrong_hash_or_an_unknown_set_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "cache" / fetch.SETS["noto"].package.filename).write_bytes(b"torn")
    with pytest.raises(DataError, match=r"noto-1\.0\.0\.tgz: sha256 is"):
        build(settings(tmp_path))
    with pytest.raises(DataError, match=r"sets: nope unknown; choose from noto"):
        build(settings(tmp_path, sets=("nope",)))
    assert [path.name for path in tmp_path.iterdir()] == ["cache"]
