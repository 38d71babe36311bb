"""What a plan knows of a model before anything is loaded: its configuration files, and its transformer without weights.

    model = describe("sd3-medium")                     # a built-in size, a local diffusers folder or a hub id
    model.transformer(torch.bfloat16)                  # on torch's meta device: shapes, no memory

From a folder or a hub only JSON is read, and of weights the headers, which say how many numbers there are.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from engines.families.base import FAMILIES, HUB_ID, INDEX, Conditioning, Family
from training.errors import TrainingError
from training.requirements import require_resolution, stored_numbers

Config = Mapping[str, Any]


@dataclass(frozen=True)
class Model:
    """One model's shapes."""

    name: str
    pipeline: str
    """Class of the diffusers pipeline."""
    config: Config
    """Of the transformer."""
    size: int
    """Latent pixels along a side of a picture."""
    vae: Config
    text_tokens: int
    """Rows of a prompt's embedding as they are cached."""
    text_weight: int
    """How many tokens the last of them stands for in attention (`engines/families/joint_attention.py`)."""
    text_parameters: int
    """Of all text encoders; 0: not known."""

    def at_resolution(self, side: int) -> Model:
        """The same model at pictures of `side`².

        Raises:
            TrainingError: no whole number of tokens, or more than the transformer's position table holds.
        """
        downscale = 2 ** (len(self.vae["block_out_channels"]) - 1)
        unit, table = downscale * 2, self.config.get("pos_embed_max_size")
        require_resolution(side, unit, None if table is None else int(table))
        return replace(self, size=side // downscale)

    @property
    def latent(self) -> tuple[int, int, int]:
        """(channels, height, width) of a picture."""
        return int(self.config["in_channels"]) // (4 if self.longcat else 1), self.size, self.size

    @property
    def longcat(self) -> bool:
        """Whether its tokens are packed by the pipeline, not the transformer."""
        return self.pipeline == "LongCatImagePipeline"

    @property
    def units(self) -> tuple[str, ...]:
        """Class names of its blocks."""
        return type(self.family()).fsdp_units

    def transformer(self, dtype: torch.dtype, device: str = "meta") -> nn.Module:
        """The transformer, on the meta device unless told otherwise; its weights mean nothing."""
        import diffusers

        kind = diffusers.LongCatImageTransformer2DModel if self.longcat else diffusers.SD3Transformer2DModel
        with torch.device(device):
            built: nn.Module = kind.from_config(dict(self.config))
        return nn.Module.to(built, dtype)

    def autoencoder(self) -> nn.Module:
        """The autoencoder on the meta device, float32 as training loads it."""
        import diffusers

        with torch.device("meta"):
            built: nn.Module = getattr(diffusers, self.vae["_class_name"]).from_config(dict(self.vae))
        return built

    def family(self) -> Family:
        """The family's forward, without a pipeline: `velocity` is all that may be asked of it."""
        from engines.families.longcat import LongCatFamily
        from engines.families.sd3 import SD3Family

        if self.longcat:
            longcat = object.__new__(LongCatFamily)
            longcat.text_length = self.text_tokens
            return longcat
        sd3 = object.__new__(SD3Family)
        sd3.text_weight = self.text_weight
        return sd3

    def embedding(self, count: int, dtype: torch.dtype, device: str = "meta") -> Conditioning:
        """Conditioning of `count` prompts, without values, as the table of embeddings holds it."""
        width = int(self.config["joint_attention_dim"])
        shapes: dict[str, tuple[int, ...]] = {"encoder_hidden_states": (count, self.text_tokens, width)}
        if not self.longcat:
            shapes["pooled_projections"] = (count, int(self.config["pooled_projection_dim"]))
        return {name: torch.empty(shape, dtype=dtype, device=device) for name, shape in shapes.items()}

    def latents(self, count: int) -> Tensor:
        """`(count, C, H, W)` float32 on the meta device."""
        return torch.empty((count, *self.latent), device="meta")


_KL = {
    "_class_name": "AutoencoderKL", "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4, "block_out_channels": [128, 256, 512, 512], "layers_per_block": 2,
    "latent_channels": 16, "norm_num_groups": 32, "sample_size": 1024, "use_quant_conv": False,
    "use_post_quant_conv": False,
}  # fmt: skip
_SD3 = {
    "sample_size": 128, "patch_size": 2, "in_channels": 16, "out_channels": 16, "num_layers": 24,
    "num_attention_heads": 24, "attention_head_dim": 64, "joint_attention_dim": 4096,
    "caption_projection_dim": 1536, "pooled_projection_dim": 2048, "pos_embed_max_size": 192,
}  # fmt: skip
_SD35 = {**_SD3, "pos_embed_max_size": 384, "dual_attention_layers": list(range(13)), "qk_norm": "rms_norm"}
_LONGCAT = {
    "in_channels": 64, "num_layers": 10, "num_single_layers": 20, "attention_head_dim": 128,
    "num_attention_heads": 24, "joint_attention_dim": 3584, "pooled_projection_dim": 3584,
    "axes_dims_rope": [16, 56, 56],
}  # fmt: skip
LONGCAT_SIZE = 128  # the pipeline's default, in latent pixels
CLIP_LENGTH, T5_LENGTH, QWEN_LENGTH = 77, 256, 512
_SD3_TEXT = 123_650_304 + 694_659_840 + 4_762_310_656  # CLIP-L, OpenCLIP-G, T5-XXL's encoder
_QWEN = 8_292_166_656  # Qwen2.5-VL-7B, its vision tower included

BUILT_IN: Mapping[str, Model] = {
    "sd3-medium": Model(
        "sd3-medium", "StableDiffusion3Pipeline", _SD3, 128, _KL, CLIP_LENGTH + T5_LENGTH, 1, _SD3_TEXT
    ),
    "sd3.5-medium": Model(
        "sd3.5-medium", "StableDiffusion3Pipeline", _SD35, 128, _KL, CLIP_LENGTH + T5_LENGTH, 1, _SD3_TEXT
    ),
    "longcat-image": Model(
        "longcat-image", "LongCatImagePipeline", _LONGCAT, LONGCAT_SIZE, _KL, QWEN_LENGTH, 1, _QWEN
    ),
}
"""Published configurations, so that a plan needs neither a download nor a connection."""

HUB_NAMES: Mapping[str, str] = {
    "stabilityai/stable-diffusion-3-medium-diffusers": "sd3-medium",
    "stabilityai/stable-diffusion-3.5-medium": "sd3.5-medium",
    "meituan-longcat/LongCat-Image": "longcat-image",
}
"""Hub ids of the built-in sizes."""


def describe(source: str) -> Model:
    """The model of a built-in name, a local diffusers folder, or a hub id (its JSON files are fetched).

    Raises:
        TrainingError: it is none of these, or a configuration is missing or of no known family.
    """
    name = HUB_NAMES.get(source, source)
    if name in BUILT_IN and not Path(source).is_dir():
        return BUILT_IN[name]
    folder = Path(source)
    if not folder.is_dir() and not HUB_ID.fullmatch(source):
        raise TrainingError(
            f"--teacher={source} is no folder, no hub id and no built-in size; sizes: {', '.join(BUILT_IN)}"
        )
    read = _reader(source)
    index = read(INDEX)
    pipeline = str(index.get("_class_name"))
    if pipeline not in FAMILIES:
        raise TrainingError(
            f"--teacher={source}: {INDEX} names {pipeline!r}; families known here: {', '.join(FAMILIES)}"
        )
    tokens, weight = QWEN_LENGTH, 1
    if pipeline == "StableDiffusion3Pipeline":
        length = int(read("tokenizer/tokenizer_config.json").get("model_max_length", CLIP_LENGTH))
        has_t5 = (index.get("text_encoder_3") or [None])[0] is not None
        # Without a T5 one zero row stands for as many as the CLIP tokenizer's length.
        tokens, weight = (length + T5_LENGTH, 1) if has_t5 else (length + 1, length)
    config = read("transformer/config.json")
    size = LONGCAT_SIZE if pipeline == "LongCatImagePipeline" else int(config["sample_size"])
    encoders = [folder / part for part in index if part.startswith("text_encoder")]
    return Model(
        source, pipeline, config, size, read("vae/config.json"), tokens, weight,
        sum(stored_numbers(path) for path in encoders),
    )  # fmt: skip


def _reader(source: str) -> Callable[[str], dict[str, Any]]:
    def read(name: str) -> dict[str, Any]:
        try:
            path = Path(source) / name
            if not Path(source).is_dir():
                from huggingface_hub import hf_hub_download

                path = Path(hf_hub_download(source, name))
            found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        except Exception as error:  # files, JSON, the hub and its HTTP client share no base
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
            raise TrainingError(
                f"--teacher={source}: {name} cannot be read ({reason}); name a local diffusers folder, or one of the "
                f"built-in sizes {', '.join(BUILT_IN)}"
            ) from error
        return found

    return read
