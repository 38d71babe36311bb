"""The picture codec: `AutoencoderTiny`, 128×128 RGB → 8×16×16 latents, trained on crops of the icons.

Loss = L1 + L1 of image gradients at two scales (crisp edges matter more than texture in flat drawings) + L1 of block
colours, with a little noise on the latents so that small errors of a generator decode to small errors in the picture.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderTiny
from numpy.typing import NDArray
from pydantic import Field
from safetensors import SafetensorError
from torch import Tensor
from torch.nn import functional as F

from engines.cli import CommandSettings
from engines.files import replace_folder, sha256_files
from training import checkpoint
from training.draws import generator
from training.ema import EMA
from training.emoji.dataset import EmojiDataset
from training.errors import TrainingError
from training.optim import MixedPrecision, warmup
from training.optimizer_state import load_optimizer, optimizer_tensors
from training.run import Run, numpy_generator

LATENT_CHANNELS = 8


class AutoencoderSettings(CommandSettings, env_prefix="CDM_AUTOENCODER_"):
    """Train the emoji autoencoder; the same command resumes."""

    data: Path = Field(Path("data/emoji"), description="dataset folder, from `cdm-train emoji-data`")
    out: Path = Field(Path("runs/autoencoder"), description="run folder; the model is written to OUT/vae")
    steps: int = Field(4500, ge=1, description="optimizer steps")
    batch: int = Field(16, ge=1, description="crops per step")
    crop: int = Field(64, ge=32, le=128, multiple_of=8, description="crop side in pixels")
    encoder_channels: int = Field(32, ge=4, description="width of the encoder")
    decoder_channels: int = Field(48, ge=4, description="width of the decoder")
    lr: float = Field(1.5e-3, gt=0, description="peak learning rate of AdamW; cosine to zero")
    latent_noise: float = Field(0.05, ge=0, description="noise added to latents, in units of their deviation")
    init: Path | None = Field(None, description="autoencoder folder to start from; none: random weights")
    freeze_encoder: bool = Field(
        False, description="train a new decoder for the encoder of --init; its latents stay what they are"
    )
    seed: int = Field(0, ge=0, description="seed of everything drawn")
    threads: int = Field(1, ge=1, description="CPU threads")


def load_autoencoder(folder: Path, flag: str) -> AutoencoderTiny:
    """A trained autoencoder; nothing pickled is read.

    Raises:
        TrainingError: no such folder, or another thing in it; `flag` is named.
    """
    try:
        if not (folder / "config.json").is_file():  # diffusers would take the path for a hub's name
            raise FileNotFoundError("it has no config.json")
        loaded: AutoencoderTiny = AutoencoderTiny.from_pretrained(
            folder, use_safetensors=True, local_files_only=True
        )
    except (OSError, ValueError, TypeError, KeyError, RuntimeError, SafetensorError) as error:
        raise TrainingError(
            f"{flag}={folder} is not an autoencoder folder ({error}); run cdm-train emoji-autoencoder first"
        ) from error
    return loaded


def autoencoder_sha256(folder: Path, flag: str) -> str:
    """Hash of weights and configuration (the latents' scale is part of it).

    Raises:
        TrainingError: there are no weights; `flag` is named.
    """
    files = [*folder.glob("*.safetensors"), *folder.glob("config.json")]
    if len(files) < 2:
        raise TrainingError(
            f"{flag}={folder} is not an autoencoder folder (it lacks config.json or *.safetensors); run cdm-train "
            "emoji-autoencoder first"
        )
    return sha256_files(folder, files)


def build_model(settings: AutoencoderSettings) -> AutoencoderTiny:
    """A random-weight autoencoder; no blocks at full resolution, where they cost most and add least."""
    torch.manual_seed(settings.seed)
    if settings.freeze_encoder:
        if settings.init is None:
            raise TrainingError("--freeze-encoder needs a trained encoder; name its folder with --init")
        return _with_new_decoder(load_autoencoder(settings.init, "--init"), settings.decoder_channels)
    if settings.init is not None:
        loaded = load_autoencoder(settings.init, "--init")
        for side in ("encoder", "decoder"):
            asked, there = (
                getattr(settings, f"{side}_channels"),
                loaded.config[f"{side}_block_out_channels"][0],
            )
            if f"{side}_channels" in settings.model_fields_set and asked != there:
                raise TrainingError(
                    f"--{side}-channels={asked} differs from the {there} of --init={settings.init}; leave it out"
                )
        return loaded
    return _random(settings.encoder_channels, settings.decoder_channels, 1.0, 0.0)


def _random(encoder: int, decoder: int, scaling_factor: float, shift_factor: float) -> AutoencoderTiny:
    model: AutoencoderTiny = AutoencoderTiny(
        encoder_block_out_channels=(encoder,) * 4, decoder_block_out_channels=(decoder,) * 4,
        latent_channels=LATENT_CHANNELS, num_encoder_blocks=(0, 1, 2, 3), num_decoder_blocks=(3, 3, 2, 0),
        force_upcast=False, scaling_factor=scaling_factor, shift_factor=shift_factor,
    )  # fmt: skip
    return model


def _with_new_decoder(trained: AutoencoderTiny, channels: int) -> AutoencoderTiny:
    config = trained.config
    model = _random(
        config["encoder_block_out_channels"][0], channels, config["scaling_factor"], config["shift_factor"]
    )
    model.encoder.load_state_dict(trained.encoder.state_dict())
    model.encoder.requires_grad_(False)
    return model


def reconstruction_loss(output_BCHW: Tensor, target_BCHW: Tensor) -> Tensor:
    """L1 + L1 of finite differences at full and half resolution, + squared error of the colours of 8×8 blocks.

    The square matters: L1 is content to paint a rare hue (green, purple) in a common one (brown, grey) for ever.
    """
    loss = torch.zeros(())
    for scale in (1, 2):
        a = F.avg_pool2d(output_BCHW, scale) if scale > 1 else output_BCHW
        b = F.avg_pool2d(target_BCHW, scale) if scale > 1 else target_BCHW
        error = a - b
        loss = loss + error.abs().mean()
        loss = loss + error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()
    return loss + 4 * F.avg_pool2d(output_BCHW - target_BCHW, 8).square().mean()


def crops(
    images: NDArray[np.uint8], rows: NDArray[np.int64], side: int, rng: np.random.Generator
) -> NDArray[np.uint8]:
    """One random `side`×`side` crop of each of `rows`; blank ones are drawn again (an icon's border is white)."""
    out = np.empty((len(rows), side, side, 3), np.uint8)
    span = images.shape[1] - side + 1
    for position, row in enumerate(rows):
        for _ in range(4):
            top, left = rng.integers(span), rng.integers(span)
            out[position] = images[row, top : top + side, left : left + side]
            if out[position].min() < 250:
                break
    return out


def to_unit(images_BHWC: NDArray[np.uint8]) -> Tensor:
    """uint8 NHWC → float32 NCHW in [−1, 1]."""
    return torch.from_numpy(images_BHWC.astype(np.float32) / 127.5 - 1).permute(0, 3, 1, 2)


class _State:
    def __init__(self, optimizer: torch.optim.Optimizer, mixed: MixedPrecision, ema: EMA) -> None:
        self.optimizer, self.mixed, self.ema = optimizer, mixed, ema

    def tensors(self) -> Mapping[str, Mapping[str, Tensor]]:
        return {"master": self.mixed.masters, "ema": self.ema.average,
                "adamw": optimizer_tensors(self.optimizer)}  # fmt: skip

    def counters(self) -> Mapping[str, Any]:
        return {"ema_updates": self.ema.updates}

    def restore(self, saved: checkpoint.Checkpoint) -> None:
        self.mixed.load(saved.tensors("master"))
        self.ema.load(saved.tensors("ema"), saved.meta["ema_updates"])
        load_optimizer(self.optimizer, saved.tensors("adamw"))


def train(settings: AutoencoderSettings) -> int:
    """Train, then measure the latents' mean and deviation and write a diffusers `vae/` folder."""
    torch.set_num_threads(settings.threads)
    data = EmojiDataset.load(settings.data)
    rows_train = np.asarray(data.indices("train"))
    model = build_model(settings).to(memory_format=torch.channels_last)
    # A linear read-out of block colours from the latents, thrown away at the end: it makes the encoder keep all three
    # colour axes from the first steps, which the decoder alone was seen not to ask for.
    colours = torch.nn.Conv2d(LATENT_CHANNELS, 3, 1)
    whole = torch.nn.ModuleDict({"autoencoder": model, "colours": colours})
    mixed = MixedPrecision.of(whole, torch.bfloat16)
    optimizer = torch.optim.AdamW(mixed.parameters, lr=settings.lr, betas=(0.9, 0.99), weight_decay=0.01)
    ema = EMA(mixed.masters, 0.998)
    state = _State(optimizer, mixed, ema)
    run = Run(
        settings.out,
        {**settings.model_dump(mode="json"), "data_sha256": data.sha256()},
        settings.steps,
        save_minutes=2,
        free=("threads", "out", "data", "steps"),
    )
    for step in run.steps(run.resume(state), state):
        rng = numpy_generator(settings.seed, step)
        rows = rows_train[rng.integers(len(rows_train), size=settings.batch)]
        target = to_unit(crops(data.images, rows, settings.crop, rng))
        latents = model.encoder(target.bfloat16().contiguous(memory_format=torch.channels_last))
        noise = torch.randn(latents.shape, generator=generator(settings.seed, step, 0)).bfloat16()
        latents_noisy = latents + settings.latent_noise * latents.detach().float().std().bfloat16() * noise
        output = model.decoder(latents_noisy).float()
        read = colours(latents).float()
        # Latents drift without a pull towards unit size: nothing else in the loss cares about their scale.
        loss = reconstruction_loss(output, target) + 1e-3 * latents.float().square().mean()
        loss = loss + 2 * (read - F.avg_pool2d(target, target.shape[-1] // read.shape[-1])).square().mean()
        loss.backward()
        mixed.step(optimizer, clip=1.0, lr=settings.lr * warmup(step, settings.steps, 100, "cosine"))
        ema.update(mixed.masters)
        error = (output - target).detach()
        run.log(
            step,
            loss=loss.item(),
            l1=error.abs().mean().item(),
            colour=F.avg_pool2d(error, 8).square().mean().item(),
        )
    _finish(model.float(), ema, data, settings)
    return 0


def _finish(model: AutoencoderTiny, ema: EMA, data: EmojiDataset, settings: AutoencoderSettings) -> None:
    averaged = {name.removeprefix("autoencoder."): value for name, value in ema.average.items()}
    trained = {name: value for name, value in averaged.items() if not name.startswith("colours.")}
    if settings.freeze_encoder:  # its compute copy was rounded to bfloat16
        assert settings.init is not None
        encoder = load_autoencoder(settings.init, "--init").encoder.state_dict()
        trained |= {f"encoder.{name}": value for name, value in encoder.items()}
    model.load_state_dict(trained)
    model.eval()
    if not settings.freeze_encoder:
        _set_scale(model, data)
    partial = settings.out / ".vae.partial"
    shutil.rmtree(partial, ignore_errors=True)
    model.save_pretrained(partial, safe_serialization=True)
    replace_folder(partial, settings.out / "vae")
    held = np.asarray(data.indices("heldout_pair"))
    print(
        f"mean |error| on {len(held)} held-out pictures: {round_trip_error(model, data.images, held):.4f} of [-1, 1]"
    )


def _set_scale(model: AutoencoderTiny, data: EmojiDataset) -> None:
    """Measure what brings latents to mean 0 and deviation 1."""
    rows = np.asarray(data.indices("train"))
    latents = encode_images(model, data.images, rows[:: max(1, len(rows) // 1024)])
    if not np.isfinite(latents).all():
        raise TrainingError(
            "the trained autoencoder makes latents that are not finite; train again with a lower --lr"
        )
    # The pipeline feeds latents / scaling_factor + shift_factor to the decoder.
    model.register_to_config(scaling_factor=1 / float(latents.std()), shift_factor=float(latents.mean()))


@torch.no_grad()
def encode_images(
    model: AutoencoderTiny, images: NDArray[np.uint8], rows: NDArray[np.int64], batch: int = 32
) -> NDArray[np.float32]:
    """Unscaled latents `(len(rows), 8, 16, 16)` of pictures."""
    parts = [model.encode(to_unit(images[rows[i : i + batch]])).latents for i in range(0, len(rows), batch)]
    result: NDArray[np.float32] = torch.cat(parts).float().numpy()
    return result


@torch.no_grad()
def round_trip_error(model: AutoencoderTiny, images: NDArray[np.uint8], rows: NDArray[np.int64]) -> float:
    """Mean absolute error of decode(encode(picture)) on [−1, 1]."""
    total = 0.0
    for i in range(0, len(rows), 32):
        x = to_unit(images[rows[i : i + 32]])
        total += float((model.decode(model.encode(x).latents).sample.clamp(-1, 1) - x).abs().mean()) * len(x)
    return total / len(rows)
