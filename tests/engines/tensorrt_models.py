"""Graphs of real classes that the tiny bundle does not have, with random weights: a T5 and a KL autoencoder."""

from __future__ import annotations

import logging
import warnings
from pathlib import Path
from typing import Any

import onnx
import torch
from torch import Tensor, nn

from engines.bundle import Bundle, Component, Graph, Parity, TensorSpec, file_ref

DYNAMIC = torch.export.Dim.DYNAMIC
LOW = torch.bfloat16


class _Decoder(nn.Module):
    def __init__(self, vae: Any) -> None:
        super().__init__()
        self.vae = vae

    def forward(self, x: Tensor) -> Tensor:
        picture = self.vae.decode(x.to(LOW), return_dict=False)[0].float()
        return ((picture / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1) * 255).round().to(torch.uint8)


class _TextEncoder(nn.Module):
    def __init__(self, encoder: Any) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, input_ids: Tensor) -> Tensor:
        states: Tensor = self.encoder(input_ids)[0].float()
        return states


def with_kl_decoder(bundle: Bundle, root: Path, channels: tuple[int, ...]) -> Bundle:
    """`bundle` with the decoder of an `AutoencoderKL`; its one attention has one head, `channels[-1]` wide."""
    from diffusers import AutoencoderKL

    vae = AutoencoderKL(
        latent_channels=bundle.manifest.latent.channels,
        block_out_channels=channels,
        down_block_types=("DownEncoderBlock2D",) * len(channels),
        up_block_types=("UpDecoderBlock2D",) * len(channels),
        layers_per_block=1,
        norm_num_groups=8,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )
    example = torch.zeros(2, bundle.manifest.latent.channels, 8, 10)
    path = _export(
        _Decoder(vae.to(LOW).eval()), example, {0: DYNAMIC, 2: DYNAMIC, 3: DYNAMIC}, "x", root / "kl.onnx"
    )
    return _with(bundle, root, "decoder", path)


def with_t5(bundle: Bundle, root: Path, length: int) -> Bundle:
    """`bundle` with a T5 as its text encoder, at `length` tokens."""
    from transformers import T5Config, T5EncoderModel

    config = T5Config(
        vocab_size=64,
        d_model=64,
        d_kv=32,
        d_ff=128,
        num_layers=2,
        num_heads=2,
        feed_forward_proj="gated-gelu",
    )
    example = torch.ones(2, length, dtype=torch.int64)
    encoder = _TextEncoder(T5EncoderModel(config).to(LOW).eval())
    path = _export(encoder, example, {0: DYNAMIC, 1: DYNAMIC}, "input_ids", root / "t5.onnx")
    return _with(bundle, root, "text_encoder", path)


def _export(module: nn.Module, example: Tensor, dynamic: dict[int, Any], name: str, path: Path) -> Path:
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            module, (example,), dynamo=True, opset_version=23, dynamic_shapes=(dynamic,), input_names=[name],
            verbose=False,
        )  # fmt: skip
    assert program is not None
    onnx.save(program.model_proto, str(path))
    return path


def _with(bundle: Bundle, root: Path, name: str, path: Path) -> Bundle:
    """The bundle's manifest with another graph in place of one; the copy lives in `root`, with nothing else in it."""
    return with_graph(bundle, root, name, path, bundle.manifest.components[name].inputs)


def with_graph(bundle: Bundle, root: Path, name: str, path: Path, inputs: dict[str, TensorSpec]) -> Bundle:
    """The bundle with another bfloat16 graph as its component `name`."""
    component = Component(
        graphs={"bfloat16": Graph(file=file_ref(root, path), opset=23)},
        inputs=inputs,
        outputs=bundle.manifest.components[name].outputs,
        parity=(Parity(batch=1, max_abs=0, rel_l2=0),),
    )
    components = {**bundle.manifest.components, name: component}
    return Bundle(root, bundle.manifest.model_copy(update={"components": components}), bundle.sha256)
