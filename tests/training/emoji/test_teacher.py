"""The teacher recipe end to end on a small dataset: real classes, few steps, exact resume."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableDiffusion3Pipeline

from engines.families.base import load_family
from training import checkpoint
from training.emoji import autoencoder, teacher
from training.emoji.dataset import EmojiDataset
from training.emoji.model import train_tokenizer
from training.errors import TrainingError


@pytest.fixture(scope="module")
def vae(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("autoencoder")
    settings = autoencoder.AutoencoderSettings(
        data=tiny_data, out=out, steps=12, batch=4, encoder_channels=8, decoder_channels=8
    )
    assert autoencoder.train(settings) == 0
    return out / "vae"


def _settings(data: Path, vae: Path, out: Path, **changes: object) -> teacher.TeacherSettings:
    values: dict[str, object] = {
        "data": data, "vae": vae, "out": out, "steps": 6, "cooldown": 2, "batch": 4, "layers": 1, "heads": 1,
        "sample_every": 3, "metrics_count": 4,
    }  # fmt: skip
    return teacher.TeacherSettings(**(values | changes))


def test_autoencoder_scales_latents_to_zero_mean_and_unit_deviation(tiny_data: Path, vae: Path) -> None:
    model = autoencoder.load_autoencoder(vae, "--vae")
    data = EmojiDataset.load(tiny_data)
    latents = autoencoder.encode_images(model, data.images, np.asarray(data.indices("train")))
    scaled = (latents - model.config.shift_factor) * model.config.scaling_factor
    assert abs(float(scaled.mean())) < 0.05
    assert float(scaled.std()) == pytest.approx(1, abs=0.1)


def test_a_new_decoder_leaves_the_latents_bit_for_bit(tiny_data: Path, vae: Path, tmp_path: Path) -> None:
    settings = autoencoder.AutoencoderSettings(
        data=tiny_data, out=tmp_path, steps=3, batch=4, decoder_channels=4, init=vae, freeze_encoder=True
    )
    assert autoencoder.train(settings) == 0
    before, after = (
        autoencoder.load_autoencoder(vae, "--vae"),
        autoencoder.load_autoencoder(tmp_path / "vae", "--vae"),
    )
    assert (after.config.scaling_factor, after.config.shift_factor) == (
        before.config.scaling_factor,
        before.config.shift_factor,
    )
    data = EmojiDataset.load(tiny_data)
    rows = np.arange(8)
    one, two = (autoencoder.encode_images(model, data.images, rows) for model in (before, after))
    assert np.array_equal(one, two)
    assert sum(p.numel() for p in after.decoder.parameters()) < sum(
        p.numel() for p in before.decoder.parameters()
    )


def test_freezing_no_encoder_is_refused(tiny_data: Path, tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="--init"):
        autoencoder.train(autoencoder.AutoencoderSettings(data=tiny_data, out=tmp_path, freeze_encoder=True))


def test_reconstruction_loss_is_zero_only_for_the_same_picture() -> None:
    picture = torch.rand(2, 3, 16, 16)
    assert float(autoencoder.reconstruction_loss(picture, picture)) == 0
    assert float(autoencoder.reconstruction_loss(picture + 0.1, picture)) > 0.1


def test_teacher_folder_loads_in_diffusers_and_in_our_family(
    tiny_data: Path, vae: Path, tmp_path: Path
) -> None:
    assert teacher.train(_settings(tiny_data, vae, tmp_path)) == 0
    model = tmp_path / "model"
    pipeline = StableDiffusion3Pipeline.from_pretrained(model, text_encoder_3=None, tokenizer_3=None)
    family = load_family(model)
    ours, theirs = family.transformer.state_dict(), pipeline.transformer.state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    provenance = json.loads((model / "provenance.json").read_text())
    assert provenance["steps_trained"] == 6
    assert provenance["licences"]
    assert (tmp_path / "samples" / "000003.png").is_file()


def test_stopped_and_resumed_teacher_equals_an_uninterrupted_one(
    tiny_data: Path, vae: Path, tmp_path: Path
) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    teacher.train(_settings(tiny_data, vae, whole, cooldown=0, sample_every=0))
    teacher.train(_settings(tiny_data, vae, parts, cooldown=0, sample_every=0, steps=3))
    teacher.train(_settings(tiny_data, vae, parts, cooldown=0, sample_every=0))
    last = [checkpoint.latest(folder / "checkpoints") for folder in (whole, parts)]
    assert last[0] is not None
    assert last[1] is not None
    for group in ("master", "ema", "muon", "adamw"):
        one, two = last[0].tensors(group), last[1].tensors(group)
        assert one.keys() == two.keys()
        assert all(torch.equal(one[name], two[name]) for name in one), group


def test_another_configuration_in_the_same_folder_is_refused(
    tiny_data: Path, vae: Path, tmp_path: Path
) -> None:
    teacher.train(_settings(tiny_data, vae, tmp_path, steps=1, sample_every=0))
    with pytest.raises(TrainingError, match=r"batch=2 \(there: 4\)"):
        teacher.train(_settings(tiny_data, vae, tmp_path, steps=1, sample_every=0, batch=2))


def test_other_data_or_another_autoencoder_is_refused_on_resume_whatever_its_folder(
    tiny_data: Path, vae: Path, tmp_path: Path
) -> None:
    data, codec, out = tmp_path / "data", tmp_path / "vae", tmp_path / "out"
    shutil.copytree(tiny_data, data)
    shutil.copytree(vae, codec)
    teacher.train(_settings(tiny_data, vae, out, steps=1, sample_every=0))
    teacher.train(_settings(data, codec, out, steps=2, sample_every=0))  # the same, elsewhere
    config = json.loads((codec / "config.json").read_text())
    (codec / "config.json").write_text(json.dumps({**config, "scaling_factor": 9.0}))
    with pytest.raises(TrainingError, match="vae_sha256"):
        teacher.train(_settings(data, codec, out, steps=3, sample_every=0))
    info = json.loads((data / "dataset.json").read_text())
    (data / "dataset.json").write_text(json.dumps({**info, "sha256": {"images.npy": "other"}}))
    with pytest.raises(TrainingError, match="data_sha256"):
        teacher.train(_settings(data, vae, out, steps=3, sample_every=0))
    recorded = json.loads((out / "config.json").read_text())  # a run of before hashes were recorded goes on
    old = {name: value for name, value in recorded.items() if not name.endswith("_sha256")}
    (out / "config.json").write_text(json.dumps(old))
    assert teacher.train(_settings(tiny_data, vae, out, steps=3, sample_every=0)) == 0


def test_a_start_without_a_checkpoint_leaves_no_model_to_the_next(
    tiny_data: Path, vae: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(teacher, "Teacher", lambda family, settings: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            teacher.train(_settings(tiny_data, vae, tmp_path, steps=1, sample_every=0))
    assert (tmp_path / "initial" / "model_index.json").is_file()
    teacher.train(_settings(tiny_data, vae, tmp_path, steps=1, sample_every=0, layers=2))
    assert len(load_family(tmp_path / "model").transformer.transformer_blocks) == 2


def test_a_pickled_or_unreadable_autoencoder_is_refused_by_its_flag(vae: Path, tmp_path: Path) -> None:
    codec = tmp_path / "vae"
    shutil.copytree(vae, codec)
    weights = codec / "diffusion_pytorch_model.safetensors"
    torch.save(autoencoder.load_autoencoder(codec, "--vae").state_dict(), weights.with_suffix(".bin"))
    weights.write_bytes(b"torn")
    with pytest.raises(TrainingError, match=r"--init=.* is not an autoencoder folder"):
        autoencoder.load_autoencoder(codec, "--init")
    weights.unlink()
    with pytest.raises(TrainingError, match=r"--init=.* is not an autoencoder folder"):
        autoencoder.load_autoencoder(codec, "--init")


def test_channels_that_init_does_not_have_are_refused_when_given(vae: Path) -> None:
    settings = autoencoder.AutoencoderSettings
    assert autoencoder.build_model(settings(init=vae)).config.encoder_block_out_channels[0] == 8
    assert autoencoder.build_model(settings(init=vae, encoder_channels=8))
    for side in ("encoder", "decoder"):
        with pytest.raises(TrainingError, match=f"--{side}-channels=16 differs from the 8 of --init"):
            autoencoder.build_model(settings(init=vae, **{f"{side}_channels": 16}))


def test_missing_autoencoder_is_named(tiny_data: Path, tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="nowhere"):
        teacher.train(_settings(tiny_data, tmp_path / "nowhere", tmp_path / "out"))


def test_tokenizer_gives_caption_words_one_token_each_and_refuses_no_text() -> None:
    tokenizer = train_tokenizer(["red apple", "green apple", "red car"] * 3, 1000, 12)
    assert tokenizer.tokenize("Red APPLE") == ["red</w>", "apple</w>"]
    for text in ("", "quixotic zebra", "日本 🍎", "a" * 400):
        ids = tokenizer(text, padding="max_length", truncation=True, max_length=12).input_ids
        assert (len(ids), ids[0], ids[-1]) == (12, tokenizer.bos_token_id, tokenizer.eos_token_id)


def test_sigma_is_shifted_like_the_scheduler() -> None:
    from diffusers import FlowMatchEulerDiscreteScheduler

    ours = teacher.draw_sigma(1000, 2.0, torch.Generator().manual_seed(0))
    plain = torch.sigmoid(torch.randn(1000, generator=torch.Generator().manual_seed(0)))
    scheduler = FlowMatchEulerDiscreteScheduler(shift=2.0)
    scheduler.set_timesteps(sigmas=plain.sort(descending=True).values.tolist())
    assert torch.allclose(scheduler.sigmas[:-1], ours.sort(descending=True).values, atol=1e-6)


def test_a_teacher_goes_on_from_a_finished_models_weights(tiny_data: Path, vae: Path, tmp_path: Path) -> None:
    teacher.train(_settings(tiny_data, vae, tmp_path / "first", sample_every=0))
    again = _settings(
        tiny_data, vae, tmp_path / "again", init=tmp_path / "first" / "model", steps=1, cooldown=0, lr=1e-9
    )
    teacher.train(again)
    before, after = (load_family(tmp_path / run / "model").transformer for run in ("first", "again"))
    for one, two in zip(before.parameters(), after.parameters(), strict=True):
        torch.testing.assert_close(one, two, rtol=0, atol=1e-6)
    provenance = json.loads((tmp_path / "again" / "model" / "provenance.json").read_text())
    assert provenance["teacher"].startswith("flow matching from model (transformer sha256 ")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layers": 2}, "--layers=2, but --init=.* has 1; give --layers 1"),
        ({"shift": 3.0}, "--shift=3.0, but"),
    ],
)
def test_settings_that_init_does_not_have_are_refused(
    tiny_data: Path, vae: Path, tmp_path: Path, changes: dict[str, object], message: str
) -> None:
    teacher.train(_settings(tiny_data, vae, tmp_path / "first", steps=1, cooldown=0, sample_every=0))
    settings = _settings(tiny_data, vae, tmp_path / "again", init=tmp_path / "first" / "model", **changes)
    with pytest.raises(TrainingError, match=message):
        teacher.train(settings)


def test_latents_of_another_autoencoder_than_inits_are_refused(
    tiny_data: Path, vae: Path, tmp_path: Path
) -> None:
    teacher.train(_settings(tiny_data, vae, tmp_path / "first", steps=1, cooldown=0, sample_every=0))
    codec = tmp_path / "vae"
    shutil.copytree(vae, codec)
    config = json.loads((codec / "config.json").read_text())
    (codec / "config.json").write_text(json.dumps({**config, "scaling_factor": 9.0}))
    with pytest.raises(TrainingError, match="latents of another autoencoder"):
        teacher.train(_settings(tiny_data, codec, tmp_path / "again", init=tmp_path / "first" / "model"))
