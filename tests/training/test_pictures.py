"""Captioned pictures: what is read, what is refused, and that latents are what the family decodes."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from engines.families.base import load_family
from tests.training.tiny_data import build_tiny_data
from training.errors import TrainingError
from training.pictures import encode_pictures, read_pictures, square


def build(folder: Path, lines: list[object]) -> Path:
    folder.mkdir()
    for name, colour in (("a.png", (200, 0, 0)), ("b.png", (0, 200, 0))):
        Image.new("RGB", (80, 64), colour).save(folder / name)
    (folder / "metadata.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    return folder


GOOD = [{"file_name": "a.png", "text": "red apple"}, {"file_name": "b.png", "text": " green apple "}]


def test_a_folder_gives_pictures_and_captions_in_the_order_of_its_lines(tmp_path):
    pictures = read_pictures(build(tmp_path / "p", [*GOOD, GOOD[0]]))
    assert pictures.captions_N == ("red apple", "green apple", "red apple")
    assert [pictures.read(row).getpixel((1, 1)) for row in range(3)] == [
        (200, 0, 0),
        (0, 200, 0),
        (200, 0, 0),
    ]
    assert pictures.prompts().texts == ("red apple", "green apple")
    assert pictures.prompts().cumulative.tolist() == pytest.approx([2 / 3, 1])


def test_captions_and_files_are_hashed(tmp_path):
    one = build(tmp_path / "p", GOOD)
    before = read_pictures(one).sha256
    assert read_pictures(one).sha256 == before
    Image.new("RGB", (80, 64), (0, 0, 9)).save(one / "b.png")
    changed = read_pictures(one).sha256
    (one / "metadata.jsonl").write_text(json.dumps(GOOD[0]) + "\n")
    assert len({before, changed, read_pictures(one).sha256}) == 3


def test_transparent_pixels_become_white(tmp_path):
    folder = build(tmp_path / "p", GOOD)
    Image.new("RGBA", (8, 8), (0, 0, 0, 0)).save(folder / "a.png")
    assert read_pictures(folder).read(0).getpixel((0, 0)) == (255, 255, 255)


def test_pictures_are_cropped_at_the_centre_and_not_squeezed():
    wide = Image.new("RGB", (30, 10), (255, 0, 0))
    wide.paste((0, 255, 0), (10, 0, 20, 10))
    assert (square(wide, 10, 10) == (0, 255, 0)).all()


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([], "names no pictures"),
        ([{"file_name": "a.png"}], ":1: expected an object with 'file_name' and 'text'"),
        ([*GOOD, {"file_name": "a.png", "text": "  "}], ":3: file_name 'a.png' has the caption '  '"),
        ([{"file_name": "c.png", "text": "x"}], "there is no file .*c.png"),
        (["words"], ":1: expected an object"),
    ],
)
def test_bad_metadata_is_refused(tmp_path, lines, message):
    with pytest.raises(TrainingError, match=message):
        read_pictures(build(tmp_path / "p", lines))


def test_a_folder_without_metadata_is_refused(tmp_path):
    with pytest.raises(TrainingError, match=r"has no readable metadata\.jsonl"):
        read_pictures(tmp_path)


def test_a_file_that_is_no_picture_is_refused(tmp_path, tiny_model):
    folder = build(tmp_path / "p", GOOD)
    (folder / "b.png").write_bytes(b"rubbish")
    pictures = read_pictures(folder)
    with pytest.raises(TrainingError, match=r"b\.png cannot be read as a picture"):
        encode_pictures(load_family(tiny_model), pictures)


def test_the_emoji_data_set_is_read_with_its_weights(tmp_path):
    from training.emoji.dataset import EmojiDataset

    folder = build_tiny_data(tmp_path / "data")
    data, pictures = EmojiDataset.load(folder), read_pictures(folder)
    rows = data.indices("train")
    assert pictures.captions_N == tuple(data.caption(data.records[row]) for row in rows)
    assert pictures.weights_N.sum() == pytest.approx(1)
    assert (np.asarray(pictures.read(5)) == data.images[rows[5]]).all()


@pytest.mark.parametrize("kind", ["tiny", "kl"])
def test_latents_are_scaled_as_decode_takes_them(tiny_model, tmp_path, kind):
    """decode(encode(x)) is the autoencoder's own round trip, without any scale."""
    family = load_family(tiny_model)
    if kind == "kl":
        from diffusers import AutoencoderKL

        torch.manual_seed(0)
        family.vae = AutoencoderKL(
            block_out_channels=(8,) * 4, latent_channels=8, norm_num_groups=4, scaling_factor=1.3, shift_factor=0.1,
            down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
        )  # fmt: skip
    pictures = read_pictures(build(tmp_path / "p", GOOD))
    latents = encode_pictures(family, pictures, batch=1)
    assert latents.shape == (2, family.latent_channels, *family.latent_size)
    made = np.stack([square(pictures.read(row), 64, 64) for row in range(2)])
    x = torch.from_numpy(made).permute(0, 3, 1, 2).float() / 127.5 - 1
    with torch.no_grad():
        encoded = family.vae.encode(x)
        raw = encoded.latents if kind == "tiny" else encoded.latent_dist.mode()
        torch.testing.assert_close(
            family.decode(latents), family.vae.decode(raw).sample, rtol=1e-4, atol=1e-4
        )
    assert torch.equal(encode_pictures(family, pictures, [1]), latents[1:])
