"""Random-weight folders laid out as people's own: all of SD3-Medium, all of SD3.5-Medium, LongCat-Image, emoji.

    build_sd3_medium(tmp_path / "sd3")
    FOLDERS["sd35-medium"](tmp_path / "sd35")

The classes, configs, files and oddities (the second CLIP pads with another token and finds its end by the largest id)
are those of the published folders; only the numbers are small.
"""

from __future__ import annotations

import string
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderTiny,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from torch import nn
from transformers import (
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

from engines.families.sd3 import SD3Family
from tests.tiny_longcat import build_tiny_longcat
from tests.tiny_sd3 import WORDS, build_tiny_sd3, build_tokenizer

CLIP_LENGTH = 12
GROUPS = 32
"""GroupNorm's groups in every published AutoencoderKL: the least number of channels."""


def build_t5_tokenizer() -> T5Tokenizer:
    """A unigram tokenizer of letters and `WORDS`, a word's start marked as SentencePiece does; all else is unknown."""
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0)]
    pieces += [(f"▁{word}", -3.0) for word in WORDS]
    pieces += [(letter, -6.0) for letter in string.ascii_letters + string.digits]
    return T5Tokenizer(
        vocab=pieces, extra_ids=0, additional_special_tokens=["<extra_id_0>"], model_max_length=512
    )


def build_t5(tokenizer: T5Tokenizer, width: int) -> T5EncoderModel:
    """T5 v1.1: gated GELU, relative positions kept by the first layer alone."""
    return T5EncoderModel(
        T5Config(
            vocab_size=len(tokenizer) + 3,  # real ones have unused rows too
            d_model=width,
            d_kv=8,
            d_ff=2 * width,
            num_layers=2,
            num_heads=2,
            feed_forward_proj="gated-gelu",
            tie_word_embeddings=False,
        )
    )


def build_clip(
    tokenizer: CLIPTokenizer, width: int, layers: int, **config: Any
) -> CLIPTextModelWithProjection:
    """One of SD3's two, by `config`."""
    return CLIPTextModelWithProjection(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=width,
            intermediate_size=2 * width,
            projection_dim=width,
            num_hidden_layers=layers,
            num_attention_heads=2,
            max_position_embeddings=CLIP_LENGTH,
            **config,
        )
    )


def build_kl(channels: int = GROUPS) -> AutoencoderKL:
    """SD3's autoencoder, f8 and of 16 channels, with as few feature channels as GroupNorm allows."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(channels,) * 4,
        norm_num_groups=GROUPS,
        layers_per_block=0,  # and one more in the decoder
        latent_channels=16,
        sample_size=1024,
        scaling_factor=1.5305,
        shift_factor=0.0609,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )


def _transformer(**config: Any) -> SD3Transformer2DModel:
    return SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=16,
        out_channels=16,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=48,
        caption_projection_dim=32,
        pooled_projection_dim=40,
        pos_embed_max_size=12,
        **config,
    )


def _save(folder: Path, transformer: nn.Module, vae: nn.Module, t5: bool) -> Path:
    tokenizer, tokenizer_2, tokenizer_3 = build_tokenizer(), build_tokenizer(), build_t5_tokenizer()
    tokenizer_2.pad_token = "!"
    ids = {"bos_token_id": tokenizer.bos_token_id, "pad_token_id": 1}
    eos, layers = tokenizer.eos_token_id, 2 if t5 else 1  # each costs an export seconds
    pipeline = StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=vae,
        text_encoder=build_clip(tokenizer, 16, layers, hidden_act="quick_gelu", eos_token_id=eos, **ids),
        tokenizer=tokenizer,
        text_encoder_2=build_clip(tokenizer_2, 24, 1, hidden_act="gelu", eos_token_id=2, **ids),
        tokenizer_2=tokenizer_2,
        text_encoder_3=build_t5(tokenizer_3, 48) if t5 else None,
        tokenizer_3=tokenizer_3 if t5 else None,
    )
    # Norms of 1 would hide one left out.
    with torch.no_grad():
        transformer.proj_out.weight.mul_(4.0)
        for name, weights in transformer.named_parameters():
            if ".norm_" in name:
                weights.mul_(torch.linspace(0.5, 2.0, weights.numel()))
    SD3Family(pipeline, folder).save(folder)
    return folder


def build_sd3_medium(folder: Path, *, seed: int = 0) -> Path:
    """Three text encoders and a KL autoencoder; pictures of 64 pixels."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        vae = build_kl()
        # Untrained networks paint an even grey, in which no error would show.
        vae.decoder.conv_out.weight.data.mul_(4.0)
        return _save(folder, _transformer(), vae, t5=True)


def build_sd35_medium(folder: Path, *, seed: int = 0) -> Path:
    """The first block with a second attention over the picture alone, q and k normed; saved as people do who lack the
    memory: without T5, and with TAESD3 for the autoencoder.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        vae = AutoencoderTiny(
            latent_channels=16,
            encoder_block_out_channels=(8,) * 4,
            decoder_block_out_channels=(8,) * 4,
            num_decoder_blocks=(1, 1, 1, 1),
            scaling_factor=1.0,
            shift_factor=0.0,
        )
        transformer = _transformer(dual_attention_layers=(0,), qk_norm="rms_norm")
        vae.decoder.layers[-1].weight.data.mul_(8.0)
        vae.decoder.layers[-1].bias.data.fill_(0.5)  # grey: it is black that a tiny decoder's zero stands for
        return _save(folder, transformer, vae, t5=False)


FOLDERS: dict[str, Callable[[Path], Path]] = {
    "sd3-medium": build_sd3_medium,
    "sd35-medium": build_sd35_medium,
    "longcat": partial(build_tiny_longcat, single_layers=1, text_layers=1),
    "emoji": build_tiny_sd3,
}
"""Layout → what writes it."""
