"""LongCat-Image: a flow transformer of double and single blocks, Qwen2.5-VL reading the prompt, a KL autoencoder.

Everything here equals what `LongCatImagePipeline` (diffusers) computes with `enable_prompt_rewrite=False`, so that a
folder written by training makes the same pictures there, in training, and in an exported bundle. Shapes as in
`engines/families/base.py`; N image tokens, each of 2×2 latent pixels.

The prompt stands between a fixed prefix and, in the pipeline, a fixed suffix, and is padded to 512 tokens; all 512 of
them, padding included, are what the transformer reads. Three things are done in another way, to the same end:
- the suffix is left out. The encoder is causal and nothing after the prompt is kept, so nobody sees it;
- padding has an id of its own, one past the vocabulary, so that the mask comes from the ids alone and a prompt that
  spells out the pad token is no padding. Inside, the pad token's embedding takes its place;
- Qwen's vision tower and language head never run.
One thing differs: see `engines/spelling.py` on prompts with two different words with apostrophes.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from diffusers import LongCatImagePipeline
from diffusers.models.transformers.transformer_longcat_image import LongCatImageTimestepEmbeddings
from diffusers.pipelines.longcat_image.pipeline_longcat_image import calculate_shift
from torch import Tensor, nn

from engines.families.base import INDEX, Conditioning, Family, FamilyError, TextEncoder
from engines.families.loading import load_pipeline, quiet
from engines.families.qwen import Qwen, keep_rotary_exact
from engines.families.rotary import fuse_projections, use_rotate_half, use_tables
from engines.spelling import frame, tokenize

TIMESTEPS = 1000.0
"""The time embedding's sines take time in [0, 1000]: σ times this."""

REWRITER = "text_processor"
"""The pipeline's component that rewrites prompts: not loaded, as it needs torchvision, but kept."""

CLASSES = {
    "transformer": ("LongCatImageTransformer2DModel",),
    "vae": ("AutoencoderKL", "AutoencoderTiny"),
    "text_encoder": ("Qwen2_5_VLForConditionalGeneration",),
}
"""Component → classes that it may be of."""

ATTENTION = r"attn\.(to_(q|k|v|out\.0|add_out)|add_[qkv]_proj)"
"""Linear layers of a double block's attention, and more than a single block's has."""


class _Pipeline(LongCatImagePipeline):  # type: ignore[misc]
    """The pipeline of a folder as if its index named no processor for rewriting prompts."""

    @classmethod
    def load_config(cls, *args: Any, **kwargs: Any) -> Any:
        config = super().load_config(*args, **kwargs)
        return {**config, REWRITER: [None, None]}


def pack(x_BCHW: Tensor) -> Tensor:
    """Image tokens `(B, N, 4C)` in rows: 2×2 latent pixels each."""
    batch, channels, height, width = x_BCHW.shape
    rows, columns = height // 2, width // 2
    patches = x_BCHW.reshape(batch, channels, rows, 2, columns, 2).permute(0, 2, 4, 1, 3, 5)
    return patches.reshape(batch, rows * columns, channels * 4)


def unpack(tokens: Tensor, height: int, width: int) -> Tensor:
    """`(B, C, height, width)`: `pack` undone."""
    batch, _, channels = tokens.shape
    patches = tokens.reshape(batch, height // 2, width // 2, channels // 4, 2, 2).permute(0, 3, 1, 4, 2, 5)
    return patches.reshape(batch, channels // 4, height, width)


def cfg_renorm(conditional: Tensor, unconditional: Tensor, guidance: float, minimum: float = 0.0) -> Tensor:
    """Classifier-free guidance that lets no token's velocity grow: the pipeline's `enable_cfg_renorm`.

    All `(B, C, H, W)`. The guided velocity of each 2×2 patch is scaled down to the length of the conditional one where
    it is longer, by no less than `minimum` (the pipeline's `cfg_renorm_min`; 1 leaves it as it is).
    """
    height, width = conditional.shape[2:]
    wanted, guided = pack(conditional), pack(unconditional + guidance * (conditional - unconditional))
    lengths = [tokens.norm(dim=-1, keepdim=True) for tokens in (wanted, guided)]
    return unpack(guided * (lengths[0] / (lengths[1] + 1e-8)).clamp(min=minimum, max=1.0), height, width)


class LongCatFamily(Family):
    """One loaded `LongCatImagePipeline` folder; `pipeline` is that pipeline, of the same modules."""

    name: ClassVar[str] = "longcat"
    pipeline_class: ClassVar[str] = "LongCatImagePipeline"
    fsdp_units: ClassVar[tuple[str, ...]] = (
        "LongCatImageTransformerBlock",
        "LongCatImageSingleTransformerBlock",
    )
    lora_targets: ClassVar[Mapping[str, str]] = {
        "attention": rf"(single_)?transformer_blocks\.\d+\.{ATTENTION}",
        "attention+ff": rf"transformer_blocks\.\d+\.({ATTENTION}|ff(_context)?\.net\.(0\.proj|2))"
        rf"|single_transformer_blocks\.\d+\.({ATTENTION}|proj_mlp|proj_out)",
    }
    patch_size = 2

    def __init__(self, pipeline: Any, root: Path) -> None:
        self.root = root
        self.pipeline = pipeline
        self.transformer = pipeline.transformer
        self.vae = pipeline.vae
        self.scheduler = pipeline.scheduler
        self.latent_channels = pipeline.transformer.config.in_channels // 4
        self.latent_size = (pipeline.default_sample_size, pipeline.default_sample_size)
        self.downscale = pipeline.vae_scale_factor
        self.scaling_factor = float(pipeline.vae.config.scaling_factor)
        self.shift_factor = float(pipeline.vae.config.shift_factor)
        self.text_length: int = pipeline.tokenizer_max_length
        self.prefix: list[int] = self._ids(pipeline.prompt_template_encode_prefix)
        self.pad_id = max(pipeline.tokenizer.get_vocab().values()) + 1
        self.language: nn.Module | None = None
        if pipeline.text_encoder is not None:
            self.language = pipeline.text_encoder.model.language_model
            keep_rotary_exact(self.language)

    @classmethod
    def load(
        cls, folder: Path, dtype: torch.dtype = torch.float32, only: Collection[str] | None = None
    ) -> LongCatFamily:
        """See `load_pipeline`."""
        pipeline = load_pipeline(_Pipeline, folder, dtype, only, CLASSES)
        if pipeline.tokenizer.padding_side != "right":
            raise FamilyError(
                f"{folder} has a tokenizer that pads on the left; set its padding_side to right"
            )
        return cls(pipeline, folder)

    # text

    def _ids(self, text: str) -> list[int]:
        ids: list[int] = self.pipeline.tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids

    def tokenize(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        """`input_ids` `(B, prefix + text_length)`: the prefix, and prompts cut or padded."""
        length = len(self.prefix) + self.text_length
        rows = [frame(tokenize(prompt, self._ids), length, self.pad_id, self.prefix) for prompt in prompts]
        return {"input_ids": torch.tensor(rows, dtype=torch.int64)}

    def text_encoders(self) -> list[TextEncoder]:
        """Qwen's language part gives its last hidden states, after the final norm, without those of the prefix."""
        if self.language is None:
            return []
        pad_token = int(self.pipeline.tokenizer.pad_token_id)
        module = Qwen(self.language, len(self.prefix), self.pad_id, pad_token)
        return [TextEncoder("text_encoder", "input_ids", ("text_states",), module)]

    def join(self, outputs: dict[str, Tensor]) -> Conditioning:
        """`encoder_hidden_states (B, L, D)`: Qwen's."""
        return {"encoder_hidden_states": outputs["text_states"]}

    @torch.no_grad()
    def encode(self, prompts: Sequence[str]) -> Conditioning:
        """Embeddings of prompts: the pipeline's `encode_prompt`."""
        assert self.language is not None
        device = next(self.language.parameters()).device
        return self.embed({name: ids.to(device) for name, ids in self.tokenize(prompts).items()})

    def text_modules(self) -> dict[str, nn.Module]:
        """`text_encoder`: its language part, if it is loaded."""
        return {} if self.language is None else {"text_encoder": self.language}

    def drop_text_encoders(self) -> None:
        """The vision tower and the head, too, which are never asked."""
        if self.pipeline.text_encoder is not None:
            self.pipeline.text_encoder.to("meta")

    def tokenizer_specs(self) -> list[dict[str, Any]]:
        """Qwen's; the JSON neither cuts nor pads by itself."""
        document = json.loads(self.pipeline.tokenizer.backend_tokenizer.to_str())
        document["truncation"] = document["padding"] = None
        return [
            {
                "component": "text_encoder",
                "input": "input_ids",
                "length": len(self.prefix) + self.text_length,
                "pad_id": self.pad_id,
                "prefix": tuple(self.prefix),
                "spell_quotes": True,
                "json": json.dumps(document, ensure_ascii=False, separators=(",", ":")),
            }
        ]

    # latents

    def velocity(
        self, transformer: nn.Module, x: Tensor, sigma: Tensor, conditioning: Conditioning
    ) -> Tensor:
        """v `(B, C, H, W)` in x's dtype, H and W even; the time embedding's sines are of float32 σ·1000."""
        dtype = next(transformer.parameters()).dtype
        height, width = x.shape[2:]
        text = conditioning["encoder_hidden_states"].to(dtype)
        text_ids, image_ids = self._positions(text.shape[1], height // 2, width // 2, x.device)
        sigma = sigma.to(torch.float32)
        with nullcontext() if dtype == torch.float32 else _float32_time(transformer, sigma):
            tokens: Tensor = transformer(
                hidden_states=pack(x.to(dtype)),
                encoder_hidden_states=text,
                timestep=sigma,
                txt_ids=text_ids,
                img_ids=image_ids,
                return_dict=False,
            )[0]
        return unpack(tokens, height, width).to(x.dtype)

    def guided(self, v_cond: Tensor, v_uncond: Tensor, scale: float) -> Tensor:
        """`cfg_renorm`, the pipeline's default."""
        return cfg_renorm(v_cond, v_uncond, scale)

    def _positions(self, length: int, rows: int, columns: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """`(L, 3)` and `(N, 3)`: text is (0, i, i), image tokens (1, row, column), counted on from the longest text."""
        place = torch.arange(length, device=device)
        row = (torch.arange(rows, device=device) + self.text_length)[:, None].expand(rows, columns)
        column = (torch.arange(columns, device=device) + self.text_length)[None, :].expand(rows, columns)
        text = torch.stack([torch.zeros_like(place), place, place], dim=-1)
        image = torch.stack([torch.ones_like(row), row, column], dim=-1)
        return text, image.reshape(rows * columns, 3)

    def sigmas(self, steps: int, size: tuple[int, int] | None = None) -> tuple[float, ...]:
        """`linspace(1, 1/steps, steps)` through the scheduler's shift, then 0: the pipeline's.

        The shift depends on the number of image tokens: of `size` (height, width in latent pixels), or `latent_size`.
        """
        scheduler = type(self.scheduler).from_config(self.scheduler.config)
        height, width = size or self.latent_size
        mu = calculate_shift(
            (height // 2) * (width // 2),
            scheduler.config.get("base_image_seq_len", 256),
            scheduler.config.get("max_image_seq_len", 4096),
            scheduler.config.get("base_shift", 0.5),
            scheduler.config.get("max_shift", 1.15),
        )
        scheduler.set_timesteps(sigmas=np.linspace(1.0, 1.0 / steps, steps).tolist(), mu=mu)
        shifted: list[float] = scheduler.sigmas.tolist()
        assert abs(shifted[0] - 1.0) < 1e-5, shifted
        # A float32 shift may miss 1 by a rounding error; noise is σ = 1 exactly.
        return (1.0, *shifted[1:])

    def decode(self, latents: Tensor) -> Tensor:
        """Pictures in about [−1, 1], `(B, 3, 8H, 8W)`: unscale, unshift, decode."""
        dtype = next(self.vae.parameters()).dtype
        unscaled = (latents / self.scaling_factor) + self.shift_factor
        decode: Any = self.vae.decode
        picture: Tensor = decode(unscaled.to(dtype), return_dict=False)[0]
        return picture

    rewrites: ClassVar[tuple[str, ...]] = ("rotary_tables", "rotate_half", "qkv")

    def fuse(self, skip: Collection[str] = ()) -> None:
        """`rotary_tables` and `rotate_half`: see `rotary.py`; `qkv`: q, k and v by one matrix product."""
        if "rotary_tables" not in skip:
            use_tables(self.transformer)
        if "rotate_half" not in skip:
            use_rotate_half(self.transformer)
        if "qkv" not in skip:
            fuse_projections(self.transformer)

    def low_precision(self) -> tuple[str, ...]:
        """Attention and feed-forward of every block, and what takes the text in."""
        double, single = "transformer_blocks.*", "single_transformer_blocks.*"
        return (
            *(f"{double}.{name}" for name in ("attn", "ff", "ff_context")),
            *(f"{single}.{name}" for name in ("attn", "proj_mlp", "proj_out")),
            "context_embedder",
        )

    def save(self, folder: Path, transformer: nn.Module | None = None) -> None:
        """Write a diffusers folder (safetensors, JSON), with `transformer` (an unwrapped module) if given.

        The processor that rewrites prompts is copied along from a local folder, if that has one.
        """
        components = dict(self.pipeline.components)
        components["transformer"] = self.transformer if transformer is None else transformer
        with quiet():
            pipeline: Any = LongCatImagePipeline(**components)
            pipeline.save_pretrained(str(folder), safe_serialization=True)
        if (self.root / REWRITER).is_dir() and folder.resolve() != self.root.resolve():
            shutil.copytree(self.root / REWRITER, folder / REWRITER, dirs_exist_ok=True)
            index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
            index[REWRITER] = json.loads((self.root / INDEX).read_text(encoding="utf-8"))[REWRITER]
            (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


@contextmanager
def _float32_time(transformer: nn.Module, sigma: Tensor) -> Iterator[None]:
    """Give the time embedding float32 σ·1000, where diffusers rounds σ to the model's dtype before anything else."""

    def exact(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return (sigma * TIMESTEPS, *args[1:])

    embeddings = [part for part in transformer.modules() if isinstance(part, LongCatImageTimestepEmbeddings)]
    hooks = [part.register_forward_pre_hook(exact) for part in embeddings]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
