"""The emoji teacher's random-weight folder: SD3's own classes, sized for two CPU cores.

Tokenizer: byte-level BPE over the training captions, so that nearly every word is one token and no prompt is an error.
Two small CLIP text encoders, an MMDiT of about 8 M parameters, the trained autoencoder, a flow-matching scheduler.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

import torch
from diffusers import (
    AutoencoderTiny,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from pydantic import BaseModel, ConfigDict, Field
from tokenizers import Regex, Tokenizer
from tokenizers.models import BPE
from tokenizers.normalizers import Lowercase
from tokenizers.pre_tokenizers import ByteLevel, Sequence, Split
from tokenizers.trainers import BpeTrainer
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, CLIPTokenizer

BOS, EOS = "<|startoftext|>", "<|endoftext|>"
# CLIP's own splitting rule (letters, single digits, runs of anything else), as its tokenizer applies it.
WORD = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"


class ModelConfig(BaseModel):
    """Sizes of the emoji teacher."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    layers: int = Field(6, ge=1, description="transformer blocks")
    heads: int = Field(3, ge=1, description="attention heads of the transformer, 64 wide each")
    text_layers: int = Field(3, ge=2, description="layers of each text encoder")
    text_width: int = Field(128, ge=16, description="width of each text encoder")
    vocabulary: int = Field(4096, ge=600, description="tokenizer entries")
    text_length: int = Field(12, ge=3, description="tokens per prompt, with start and end")
    shift: float = Field(1.5, gt=0, description="the scheduler's sigma shift")


def train_tokenizer(captions: Iterable[str], vocabulary: int, length: int) -> CLIPTokenizer:
    """A CLIP tokenizer whose merges were learnt on `captions`."""
    model = Tokenizer(BPE(end_of_word_suffix="</w>"))
    model.normalizer = Lowercase()
    model.pre_tokenizer = Sequence(
        [Split(Regex(WORD), "removed", invert=True), ByteLevel(add_prefix_space=False)]
    )
    alphabet = sorted(ByteLevel.alphabet())
    model.train_from_iterator(
        captions,
        BpeTrainer(vocab_size=vocabulary - 256 - 2, initial_alphabet=alphabet, end_of_word_suffix="</w>",
                   show_progress=False),
    )  # fmt: skip
    document = json.loads(model.to_str())["model"]
    merges = [
        tuple(merge) if isinstance(merge, list) else tuple(merge.split(" ")) for merge in document["merges"]
    ]
    # CLIP's order: bytes, bytes that end a word, merges, specials. Every byte must be there in both forms.
    tokens = [*alphabet, *(letter + "</w>" for letter in alphabet)]
    known = set(tokens)
    for left, right in merges:
        if left + right not in known:
            known.add(left + right)
            tokens.append(left + right)
    vocab = {token: index for index, token in enumerate([*tokens, BOS, EOS])}
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=length)


def _text_encoder(tokenizer: CLIPTokenizer, config: ModelConfig) -> CLIPTextModelWithProjection:
    width = config.text_width
    return CLIPTextModelWithProjection(
        CLIPTextConfig(
            vocab_size=len(tokenizer), hidden_size=width, intermediate_size=4 * width, projection_dim=width,
            num_hidden_layers=config.text_layers, num_attention_heads=max(1, width // 64),
            max_position_embeddings=config.text_length, bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
        )
    )  # fmt: skip


def build_pipeline(
    folder: Path,
    vae: AutoencoderTiny,
    captions: Iterable[str],
    latent_size: int,
    config: ModelConfig,
    seed: int,
) -> Path:
    """Write a random-weight `StableDiffusion3Pipeline` folder around a trained autoencoder."""
    torch.manual_seed(seed)
    tokenizer = train_tokenizer(captions, config.vocabulary, config.text_length)
    width = config.heads * 64
    transformer = SD3Transformer2DModel(
        sample_size=latent_size, patch_size=2, in_channels=vae.config.latent_channels,
        out_channels=vae.config.latent_channels, num_layers=config.layers, attention_head_dim=64,
        num_attention_heads=config.heads, joint_attention_dim=2 * config.text_width, caption_projection_dim=width,
        pooled_projection_dim=2 * config.text_width, pos_embed_max_size=latent_size // 2,
    )  # fmt: skip
    # adaLN-zero (DiT): every block starts as the identity, and the model by predicting nothing.
    for name, module in transformer.named_modules():
        modulation = name.endswith(("norm1.linear", "norm1_context.linear", "norm_out.linear"))
        if isinstance(module, torch.nn.Linear) and (modulation or name == "proj_out"):
            torch.nn.init.zeros_(module.weight)
            torch.nn.init.zeros_(module.bias)
    StableDiffusion3Pipeline(
        transformer=transformer, vae=vae, scheduler=FlowMatchEulerDiscreteScheduler(shift=config.shift),
        text_encoder=_text_encoder(tokenizer, config), tokenizer=tokenizer,
        text_encoder_2=_text_encoder(tokenizer, config),
        tokenizer_2=CLIPTokenizer(vocab=tokenizer.get_vocab(), merges=_merges(tokenizer),
                                  model_max_length=config.text_length),
        text_encoder_3=None, tokenizer_3=None,
    ).save_pretrained(folder, safe_serialization=True)  # fmt: skip
    return folder


def _merges(tokenizer: CLIPTokenizer) -> list[tuple[str, str]]:
    document = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    return [
        tuple(merge) if isinstance(merge, list) else tuple(merge.split(" ")) for merge in document["merges"]
    ]
