"""Stable Diffusion 3: MMDiT, two CLIP text encoders, an optional T5, a KL or tiny autoencoder.

Everything here equals what `StableDiffusion3Pipeline` (diffusers) computes, so that a folder written by training
makes the same pictures there, in training, and in an exported bundle. Shapes as in `engines/families/base.py`.

The text tokens are those of both CLIPs (joined along the features, zero-padded to the transformer's width) followed
by T5's. Without a T5 the pipeline puts `max_sequence_length` zero rows in its place, and these rows do take part in
attention: `family.t5_length` is how many, the CLIP tokenizer's own length. Here one zero row stands for all of them
(`engines/families/joint_attention.py`). To get the same pictures from diffusers, call the pipeline with
`max_sequence_length=family.t5_length` (its default of 256 is another model, and a slower one).
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from diffusers import StableDiffusion3Pipeline
from diffusers.pipelines.stable_diffusion_3.pipeline_stable_diffusion_3 import calculate_shift
from torch import Tensor, nn

from engines.bundle import TEXT_ENCODERS
from engines.families.base import Conditioning, Family, FamilyError, TextEncoder
from engines.families.joint_attention import fuse_projections, use_joint_attention
from engines.families.loading import load_pipeline, quiet

T5_LENGTH = 256
"""Tokens of the T5 prompt, the pipeline's default `max_sequence_length`."""

LONGEST = 2**16
"""Tokens of a prompt; transformers puts 1e30 where a tokenizer does not say."""

TIMESTEPS = 1000.0
"""SD3's transformer takes time in [0, 1000]: σ times this."""


CLASSES = {
    "transformer": ("SD3Transformer2DModel",),
    "vae": ("AutoencoderKL", "AutoencoderTiny"),
    "text_encoder": ("CLIPTextModelWithProjection",),
    "text_encoder_2": ("CLIPTextModelWithProjection",),
    "text_encoder_3": ("T5EncoderModel",),
}
"""Component → classes that it may be of."""

OPTIONAL = ("text_encoder_3",)
"""Components that an index may leave out."""

BLOCK = r"transformer_blocks\.\d+\."
ATTENTION = r"(attn2?\.to_(q|k|v|out\.0|add_out)|attn\.add_[qkv]_proj)"
"""Of a block's linear layers those of attention: its own and the text's, and of the second one over the picture."""


class _Clip(nn.Module):
    """Ids → last-but-one hidden states `(B, L, D)`, projected pooled output `(B, P)`: what SD3 takes of a CLIP."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        output = self.encoder(ids, output_hidden_states=True)
        return output.hidden_states[-2], output.text_embeds


class _T5(nn.Module):
    """Ids → last hidden states `(B, L, D)`, padding unmasked, as the pipeline calls it."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, ids: Tensor) -> tuple[Tensor]:
        return (self.encoder(ids)[0],)


class SD3Family(Family):
    """One loaded `StableDiffusion3Pipeline` folder; `pipeline` is that pipeline, of the same modules."""

    name: ClassVar[str] = "sd3"
    pipeline_class: ClassVar[str] = "StableDiffusion3Pipeline"
    fsdp_units: ClassVar[tuple[str, ...]] = ("JointTransformerBlock",)
    lora_targets: ClassVar[Mapping[str, str]] = {
        "attention": f"{BLOCK}{ATTENTION}",
        "attention+ff": rf"{BLOCK}({ATTENTION}|ff(_context)?\.net\.(0\.proj|2))",
    }
    pooled = ("clip_pooled", "clip_pooled_2")

    def __init__(self, pipeline: Any, root: Path) -> None:
        self.root = root
        self.pipeline = pipeline
        self.transformer = pipeline.transformer
        self.vae = pipeline.vae
        self.scheduler = pipeline.scheduler
        config = pipeline.transformer.config
        self.patch_size = config.patch_size
        self.latent_channels = config.in_channels
        self.latent_size = (config.sample_size, config.sample_size)
        self.downscale = pipeline.vae_scale_factor
        self.scaling_factor = float(pipeline.vae.config.scaling_factor)
        self.shift_factor = float(pipeline.vae.config.shift_factor)
        self.context_dim: int = config.joint_attention_dim
        self.clip_length: int = pipeline.tokenizer_max_length
        self.has_t5: bool = pipeline.tokenizer_3 is not None
        self.t5_length: int = T5_LENGTH if self.has_t5 else self.clip_length
        self.text_weight: int = 1 if self.has_t5 else self.t5_length
        use_joint_attention(self.transformer)

    @classmethod
    def load(
        cls, folder: Path, dtype: torch.dtype = torch.float32, only: Collection[str] | None = None
    ) -> SD3Family:
        """See `load_pipeline`. A folder whose index has no third text encoder is loaded without one."""
        pipeline = load_pipeline(StableDiffusion3Pipeline, folder, dtype, only, CLASSES, OPTIONAL)
        if pipeline.tokenizer_max_length > LONGEST:
            raise FamilyError(
                f"{folder / 'tokenizer'} does not say how many tokens it makes of a prompt (model_max_length in "
                "tokenizer_config.json); save or download it again"
            )
        return cls(pipeline, folder)

    # text

    def tokenize(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        """`input_ids` and `input_ids_2` `(B, clip_length)`, and `input_ids_3` `(B, t5_length)` where there is a T5."""
        return {
            name: tokenizer(
                list(prompts), padding="max_length", max_length=length, truncation=True, return_tensors="pt"
            ).input_ids
            for name, tokenizer, length in self._tokenizers()
        }

    def _tokenizers(self) -> list[tuple[str, Any, int]]:
        # The pipeline cuts both CLIP prompts at the *first* tokenizer's length.
        tokenizers = [
            ("input_ids", self.pipeline.tokenizer, self.clip_length),
            ("input_ids_2", self.pipeline.tokenizer_2, self.clip_length),
        ]
        if self.has_t5:
            tokenizers.append(("input_ids_3", self.pipeline.tokenizer_3, self.t5_length))
        return tokenizers

    def text_encoders(self) -> list[TextEncoder]:
        """A CLIP gives its last-but-one hidden states and its projected pooled output, a T5 its last hidden states."""
        found = []
        for suffix in ("", "_2"):
            if (encoder := getattr(self.pipeline, f"text_encoder{suffix}")) is not None:
                outputs = (f"clip_states{suffix}", f"clip_pooled{suffix}")
                found.append(
                    TextEncoder(f"text_encoder{suffix}", f"input_ids{suffix}", outputs, _Clip(encoder))
                )
        if self.pipeline.text_encoder_3 is not None:
            module = _T5(self.pipeline.text_encoder_3)
            found.append(TextEncoder("text_encoder_3", "input_ids_3", ("t5_states",), module))
        return found

    def join(self, outputs: dict[str, Tensor]) -> Conditioning:
        """`encoder_hidden_states (B, L, context_dim)`, `pooled_projections (B, P)`, as `encode_prompt` joins them.

        L is clip_length + t5_length, or clip_length + 1 without a T5: one zero row in the place of t5_length.
        """
        clip = torch.cat([outputs["clip_states"], outputs["clip_states_2"]], dim=-1)
        clip = nn.functional.pad(clip, (0, self.context_dim - clip.shape[-1]))
        if self.has_t5:
            t5 = outputs["t5_states"].to(clip.dtype)
        else:
            t5 = clip.new_zeros((clip.shape[0], 1, self.context_dim))
        return {
            "encoder_hidden_states": torch.cat([clip, t5], dim=1),
            "pooled_projections": torch.cat([outputs["clip_pooled"], outputs["clip_pooled_2"]], dim=-1),
        }

    @torch.no_grad()
    def encode(self, prompts: Sequence[str]) -> Conditioning:
        """Embeddings of prompts: the pipeline's `encode_prompt`, equal zero rows once."""
        device = self.pipeline.text_encoder.device
        return self.embed({name: ids.to(device) for name, ids in self.tokenize(prompts).items()})

    def text_modules(self) -> dict[str, nn.Module]:
        """`text_encoder`, `text_encoder_2` and, if there is one, `text_encoder_3`: those that are loaded."""
        return {
            name: getattr(self.pipeline, name)
            for name in TEXT_ENCODERS
            if getattr(self.pipeline, name) is not None
        }

    def tokenizer_specs(self) -> list[dict[str, Any]]:
        """One `{"input", "length", "pad_id", "json"}` per text encoder; the JSON neither cuts nor pads by itself."""
        specs = []
        for name, tokenizer, length in self._tokenizers():
            document = json.loads(tokenizer.backend_tokenizer.to_str())
            # transformers leaves the last call's truncation and padding in the backend: not part of the model.
            document["truncation"] = document["padding"] = None
            text = json.dumps(document, ensure_ascii=False, separators=(",", ":"))
            specs.append(
                {
                    "component": name.replace("input_ids", "text_encoder"),
                    "input": name,
                    "length": length,
                    "pad_id": int(tokenizer.pad_token_id),
                    "json": text,
                }
            )
        return specs

    # latents

    def velocity(
        self, transformer: nn.Module, x: Tensor, sigma: Tensor, conditioning: Conditioning
    ) -> Tensor:
        """v `(B, C, H, W)` in x's dtype; the time embedding's sines are computed from float32 σ·1000."""
        dtype = next(transformer.parameters()).dtype
        use_joint_attention(transformer)
        velocity: Tensor = transformer(
            hidden_states=x.to(dtype),
            encoder_hidden_states=conditioning["encoder_hidden_states"].to(dtype),
            pooled_projections=conditioning["pooled_projections"].to(dtype),
            timestep=sigma.to(torch.float32) * TIMESTEPS,
            joint_attention_kwargs={"text_weight": self.text_weight},
            return_dict=False,
        )[0]
        return velocity.to(x.dtype)

    def sigmas(self, steps: int, size: tuple[int, int] | None = None) -> tuple[float, ...]:
        """`linspace(1, 1/steps, steps)` through the scheduler's own shift, then 0: the pipeline's `sigmas=` path.

        With dynamic shifting that depends on the number of image tokens: of `size`, in latent pixels, or `latent_size`.
        """
        scheduler = type(self.scheduler).from_config(self.scheduler.config)
        config = scheduler.config
        mu = None
        if config.use_dynamic_shifting:
            height, width = size or self.latent_size
            mu = calculate_shift(
                (height // self.patch_size) * (width // self.patch_size),
                config.base_image_seq_len,
                config.max_image_seq_len,
                config.base_shift,
                config.max_shift,
            )
        scheduler.set_timesteps(sigmas=np.linspace(1.0, 1.0 / steps, steps).tolist(), mu=mu)
        shifted: list[float] = scheduler.sigmas.tolist()
        assert abs(shifted[0] - 1.0) < 1e-5, shifted
        # A float32 shift may miss 1 by a rounding error; noise is σ = 1 exactly.
        return (1.0, *shifted[1:])

    def decode(self, latents: Tensor) -> Tensor:
        """Pictures in about [−1, 1], `(B, 3, 8H, 8W)` for an f8 autoencoder: unscale, unshift, decode."""
        dtype = next(self.vae.parameters()).dtype
        unscaled = (latents / self.scaling_factor) + self.shift_factor
        decode: Any = self.vae.decode
        picture: Tensor = decode(unscaled.to(dtype), return_dict=False)[0]
        return picture

    rewrites: ClassVar[tuple[str, ...]] = ("qkv",)

    def fuse(self, skip: Collection[str] = ()) -> None:
        """`qkv`: q, k and v of every attention by one matrix product."""
        if "qkv" not in skip:
            fuse_projections(self.transformer)

    def low_precision(self) -> tuple[str, ...]:
        """Attention and feed-forward of every block, and what takes the text in."""
        block = "transformer_blocks.*"
        return (f"{block}.attn", f"{block}.attn2", f"{block}.ff", f"{block}.ff_context", "context_embedder")

    def save(self, folder: Path, transformer: nn.Module | None = None) -> None:
        """Write a diffusers folder (safetensors, JSON), with `transformer` (an unwrapped module) if given."""
        components = dict(self.pipeline.components)
        components["transformer"] = self.transformer if transformer is None else transformer
        with quiet():
            pipeline: Any = StableDiffusion3Pipeline(**components)
            pipeline.save_pretrained(str(folder), safe_serialization=True)
