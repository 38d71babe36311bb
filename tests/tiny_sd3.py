"""A random-weight model of SD3's real classes, small enough to build in a test: `build_tiny_sd3(tmp_path / "tiny")`.

The classes, configs and files are those of any `StableDiffusion3Pipeline` folder; only the numbers are small.
"""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import (
    AutoencoderTiny,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from tokenizers.pre_tokenizers import ByteLevel
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, CLIPTokenizer

from engines.families.sd3 import SD3Family

WORDS = ("red", "green", "apple", "woman", "firefighter", "face", "with", "tears", "flag", "of", "japan")
BOS, EOS = "<|startoftext|>", "<|endoftext|>"


def build_tokenizer(words: tuple[str, ...] = WORDS, length: int = 12) -> CLIPTokenizer:
    """A CLIP tokenizer that knows every byte, and `words` as one token each; unknown words fall apart into bytes."""
    alphabet = sorted(ByteLevel.alphabet())
    vocab = {
        token: index for index, token in enumerate([*alphabet, *(f"{letter}</w>" for letter in alphabet)])
    }
    merges: list[tuple[str, str]] = []
    for word in words:
        left = word[0]
        for position, letter in enumerate(word[1:], start=1):
            right = f"{letter}</w>" if position == len(word) - 1 else letter
            if left + right not in vocab:
                vocab[left + right] = len(vocab)
                merges.append((left, right))
            left += right
    for special in (BOS, EOS):
        vocab[special] = len(vocab)
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=length)


def _text_encoder(tokenizer: CLIPTokenizer, width: int) -> CLIPTextModelWithProjection:
    return CLIPTextModelWithProjection(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=width,
            intermediate_size=2 * width,
            projection_dim=width,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=tokenizer.model_max_length,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def build_tiny_sd3(
    folder: Path,
    *,
    seed: int = 0,
    layers: int = 2,
    heads: int = 4,
    head_dim: int = 16,
    text_width: int = 32,
    joint_dim: int = 64,
    sample_size: int = 8,
    vae_channels: int = 8,
    shift: float = 3.0,
) -> Path:
    """Write the folder and return it. Weights depend on `seed` alone; pictures are `8 · sample_size` pixels wide."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        tokenizer = build_tokenizer()
        transformer = SD3Transformer2DModel(
            sample_size=sample_size,
            patch_size=2,
            in_channels=8,
            out_channels=8,
            num_layers=layers,
            attention_head_dim=head_dim,
            num_attention_heads=heads,
            joint_attention_dim=joint_dim,
            caption_projection_dim=heads * head_dim,
            pooled_projection_dim=2 * text_width,
            pos_embed_max_size=max(sample_size, 12),
            qk_norm="rms_norm",
        )
        vae = AutoencoderTiny(
            latent_channels=8,
            encoder_block_out_channels=(vae_channels,) * 4,
            decoder_block_out_channels=(vae_channels,) * 4,
            scaling_factor=1.3,
            shift_factor=0.1,
        )
        pipeline = StableDiffusion3Pipeline(
            transformer=transformer,
            scheduler=FlowMatchEulerDiscreteScheduler(shift=shift),
            vae=vae,
            text_encoder=_text_encoder(tokenizer, text_width),
            tokenizer=tokenizer,
            text_encoder_2=_text_encoder(tokenizer, text_width),
            tokenizer_2=build_tokenizer(),
            text_encoder_3=None,
            tokenizer_3=None,
        )
    # Untrained networks paint an even grey, in which no error would show: give the last layers some contrast.
    with torch.no_grad():
        transformer.proj_out.weight.mul_(4.0)
        vae.decoder.layers[-1].weight.mul_(40.0)
    SD3Family(pipeline, folder).save(folder)
    return folder
