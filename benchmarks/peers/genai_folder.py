"""A diffusers folder → the folder that OpenVINO GenAI's Stable Diffusion 3 pipeline reads.

    convert(Path("runs/random-75m"), Path("runs/random-75m-genai"), steps=4)

What `optimum-cli export openvino` would write (it cannot be installed beside transformers 5): the modules traced by
OpenVINO's own frontend, weights in the precision they are stored in, one loaded at a time. GenAI finds inputs by name
and outputs by number. Without a T5 it puts as many zero rows in its place as a CLIP prompt has tokens, as we do.
"""

from __future__ import annotations

import gc
import json
import multiprocessing
import shutil
import warnings
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch
from diffusers import StableDiffusion3Pipeline
from safetensors import safe_open
from torch import Tensor, nn

from benchmarks.peers.genai import SOURCE
from engines.families.base import FamilyError
from engines.families.loading import load_pipeline, quiet
from engines.families.sd3 import CLASSES, OPTIONAL, TIMESTEPS
from engines.files import PARTIAL, replace_folder

INDEX = "model_index.json"


def convert(folder: Path, out: Path, steps: int) -> Path:
    """Write `out`, for pictures of `steps` steps, and return it.

    GenAI takes no sigmas: it draws a line from 1 to the smallest sigma that the scheduler's training steps give, and
    shifts it. With shift·(steps−1)+1 training steps that is our few-step schedule, if that number is whole (it is where
    the shift is); else it is a near one. The transformer's graph takes the scale of time back out.

    Raises:
        FamilyError: the folder is no SD3 folder, or has a T5; or `out` is there, and was not made here.
    """
    index = _read(folder / INDEX)
    if index.get("_class_name") != StableDiffusion3Pipeline.__name__:
        raise FamilyError(
            f"{folder} is a {index.get('_class_name')}; GenAI's SD3 is for a StableDiffusion3Pipeline"
        )
    if index.get("text_encoder_3", [None])[0] is not None:
        raise FamilyError(f"{folder} has a T5, which this conversion leaves out; name a folder without one")
    if out.exists() and not (out / SOURCE).is_file():
        raise FamilyError(
            f"{out} is there and was not made by this conversion; name a folder that may be replaced"
        )
    partial = out.with_name(f".{out.name}{PARTIAL}")
    shutil.rmtree(partial, ignore_errors=True)
    scheduler = _read(folder / "scheduler" / "scheduler_config.json")
    training_steps = round(float(scheduler["shift"]) * (steps - 1)) + 1
    _write(
        partial / "scheduler" / "scheduler_config.json", {**scheduler, "num_train_timesteps": training_steps}
    )
    # In a process of its own: OpenVINO's frontend leaves torch patched (a softmax then has a wrong gradient).
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
        process.submit(_models, folder, partial, TIMESTEPS / training_steps).result()
    # GenAI knows but one class of autoencoder; of its configuration it reads scales and sizes.
    _write(partial / INDEX, {**index, "vae": ["diffusers", "AutoencoderKL"]})
    _write(partial / SOURCE, _source(folder, steps))
    replace_folder(partial, out)
    return out


def _models(folder: Path, out: Path, scale: float) -> None:
    for suffix in ("", "_2"):
        _tokenizer(folder, out / f"tokenizer{suffix}")
        _text_encoder(folder, out / f"text_encoder{suffix}")
    _transformer(folder, out / "transformer", scale)
    _decoder(folder, out / "vae_decoder")


def is_conversion(folder: Path, out: Path, steps: int) -> bool:
    """Whether `out` was made by `convert(folder, out, steps)`, of the files that are in `folder` now."""
    return (out / SOURCE).is_file() and _read(out / SOURCE) == _source(folder, steps)


def _source(folder: Path, steps: int) -> dict[str, Any]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    stats = {path.relative_to(folder).as_posix(): path.stat() for path in files}
    return {
        "steps": steps,
        "files": {name: [stat.st_size, stat.st_mtime_ns] for name, stat in stats.items()},
    }


class _Transformer(nn.Module):
    def __init__(self, transformer: nn.Module, scale: float) -> None:
        super().__init__()
        self.transformer, self.scale = transformer, scale

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        pooled_projections: Tensor,
        timestep: Tensor,
    ) -> Tensor:
        velocity: Tensor = self.transformer(
            hidden_states=hidden_states,
            encoder_hidden_states=encoder_hidden_states,
            pooled_projections=pooled_projections,
            timestep=timestep * self.scale,
            return_dict=False,
        )[0]
        return velocity


class _TextEncoder(nn.Module):
    """Output 0 is the pooled one, 2 + i the hidden states after i layers: GenAI takes number layers + 1."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, input_ids: Tensor) -> tuple[Tensor, ...]:
        output = self.encoder(input_ids, output_hidden_states=True)
        return (output.text_embeds, output.last_hidden_state, *output.hidden_states)


class _Decoder(nn.Module):
    def __init__(self, vae: Any) -> None:
        super().__init__()
        self.vae = vae

    def forward(self, latent_sample: Tensor) -> Tensor:
        picture: Tensor = self.vae.decode(latent_sample, return_dict=False)[0]
        return picture


def _transformer(folder: Path, out: Path, scale: float) -> None:
    module = _load(folder, out.name)
    config = module.config
    shapes = {
        "hidden_states": (-1, config.in_channels, -1, -1),
        "encoder_hidden_states": (-1, -1, config.joint_attention_dim),
        "pooled_projections": (-1, config.pooled_projection_dim),
        "timestep": (-1,),
    }
    side = 2 * config.patch_size
    examples = {
        "hidden_states": torch.zeros(2, config.in_channels, side, 2 * side),
        "encoder_hidden_states": torch.zeros(2, 3, config.joint_attention_dim),
        "pooled_projections": torch.zeros(2, config.pooled_projection_dim),
        "timestep": torch.ones(1),
    }
    _trace(_Transformer(module, scale), examples, shapes, ("out_sample",), out)
    shutil.copy(folder / "transformer" / "config.json", out)


def _text_encoder(folder: Path, out: Path) -> None:
    module = _load(folder, out.name)
    length, layers = module.config.max_position_embeddings, module.config.num_hidden_layers
    outputs = ("text_embeds", "last_hidden_state", *(f"hidden_states.{i}" for i in range(layers + 1)))
    examples = {"input_ids": torch.zeros(2, length, dtype=torch.int64)}
    _trace(_TextEncoder(module), examples, {"input_ids": (-1, -1)}, outputs, out)
    shutil.copy(folder / out.name / "config.json", out)


def _decoder(folder: Path, out: Path) -> None:
    module = _load(folder, "vae")
    config = module.config
    channels = config.latent_channels
    examples = {"latent_sample": torch.zeros(1, channels, 4, 6)}
    _trace(_Decoder(module), examples, {"latent_sample": (-1, channels, -1, -1)}, ("sample",), out)
    blocks = config.get("block_out_channels") or config.decoder_block_out_channels
    keys = ("in_channels", "out_channels", "latent_channels", "scaling_factor", "shift_factor")
    _write(out / "config.json", {**{key: config[key] for key in keys}, "block_out_channels": list(blocks)})


def _tokenizer(folder: Path, out: Path) -> None:
    import openvino
    from openvino_tokenizers import convert_tokenizer  # type: ignore[import-untyped]

    tokenizer = getattr(
        load_pipeline(StableDiffusion3Pipeline, folder, torch.float32, (), CLASSES, OPTIONAL), out.name
    )
    model = convert_tokenizer(tokenizer, truncation=True, max_length=tokenizer.model_max_length)
    out.mkdir(parents=True)
    openvino.save_model(model, str(out / "openvino_tokenizer.xml"))


def _load(folder: Path, name: str) -> Any:
    """One module, in the precision that it is stored in (that of its first tensor)."""
    files = sorted((folder / name).glob("*.safetensors"))
    if not files:
        raise FamilyError(f"{folder / name} holds no .safetensors; only these are read")
    with safe_open(files[0], framework="pt") as file:
        dtype = file.get_tensor(next(iter(file.keys()))).dtype
    return getattr(load_pipeline(StableDiffusion3Pipeline, folder, dtype, (name,), CLASSES, OPTIONAL), name)


def _trace(
    module: nn.Module,
    examples: dict[str, Tensor],
    shapes: Mapping[str, tuple[int, ...]],
    outputs: Sequence[str],
    out: Path,
) -> None:
    import openvino
    from openvino.frontend.pytorch import patch_model

    module.eval().requires_grad_(False)
    getattr(patch_model, "__make_16bit_traceable")(module)  # as optimum does: 16-bit weights stay 16-bit
    inputs = [(name, openvino.PartialShape(list(shape))) for name, shape in shapes.items()]
    with quiet(), warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # of tracing: deprecated by torch, and what the frontend is made for
        model = openvino.convert_model(module, example_input=examples, input=inputs)
    for port, name in zip(model.outputs, outputs, strict=True):
        port.get_tensor().set_names({name})
    out.mkdir(parents=True)
    openvino.save_model(model, str(out / "openvino_model.xml"), compress_to_fp16=False)
    del model
    gc.collect()


def _read(path: Path) -> dict[str, Any]:
    try:
        document: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise FamilyError(f"{path} is missing or unreadable; name a diffusers folder") from error
    return document


def _write(path: Path, document: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(document, indent=2), encoding="utf-8")
