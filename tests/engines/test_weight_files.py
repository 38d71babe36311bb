"""Weights that are incomplete, or no floating-point numbers, are told from the files' headers."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from engines.errors import ExportError
from engines.export.student import check_dtypes
from tests.engines.adapters import WEIGHTS, shard, store


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_floating_weights_and_known_integer_buffers_are_let_pass(
    student: Path, tmp_path: Path, dtype: torch.dtype
) -> None:
    folder = shutil.copytree(student, tmp_path / "model")
    file = folder / "text_encoder" / "model.safetensors"
    tensors = {name: tensor.to(dtype) for name, tensor in load_file(file).items()}
    save_file({**tensors, "text_model.embeddings.position_ids": torch.arange(12)[None]}, file)
    check_dtypes(folder)


@pytest.mark.parametrize(
    ("dtype", "name"),
    [
        (torch.float8_e4m3fn, "F8_E4M3"),
        (torch.float8_e5m2, "F8_E5M2"),
        (torch.int8, "I8"),
        (torch.uint8, "U8"),
        (torch.int64, "I64"),
        (torch.bool, "BOOL"),
    ],
)
def test_quantized_weights_are_refused_by_file_tensor_and_dtype(
    student: Path, tmp_path: Path, dtype: torch.dtype, name: str
) -> None:
    folder = shutil.copytree(student, tmp_path / "model")
    store(folder / "vae" / WEIGHTS, "decoder.layers.0.weight", dtype)
    with pytest.raises(
        ExportError,
        match=rf"vae/{WEIGHTS}: decoder\.layers\.0\.weight is {name}; weights in F64, F32, F16, BF16 are",
    ):
        check_dtypes(folder)


def _missing_shard(folder: Path) -> None:
    shard(folder).unlink()


def _bad_index(folder: Path) -> None:
    shard(folder)
    (folder / "transformer" / "diffusion_pytorch_model.safetensors.index.json").write_text(
        "{}", encoding="utf-8"
    )


def _variant(folder: Path) -> None:
    weights = folder / "transformer" / WEIGHTS
    weights.rename(weights.with_name("diffusion_pytorch_model.fp16.safetensors"))


def _pointer(folder: Path) -> None:
    text = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n"
    (folder / "transformer" / WEIGHTS).write_text(text, encoding="utf-8")


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (
            _missing_shard,
            r"transformer lacks diffusion_pytorch_model-00002-of-00002\.safetensors, 1 of the 2 files that",
        ),
        (_bad_index, r"diffusion_pytorch_model\.safetensors\.index\.json is not an index of shards"),
        (
            _variant,
            r"transformer has no diffusion_pytorch_model\.safetensors .*there is config\.json, diff\S+\.fp16\.s",
        ),
        (_pointer, rf"{WEIGHTS} is no whole safetensors file: it is a Git LFS pointer; run git lfs pull"),
        (
            lambda folder: os.truncate(folder / "transformer" / WEIGHTS, 9000),
            rf"{WEIGHTS} is no whole safetensors file: .*; copy or download it again",
        ),
        (lambda folder: shutil.rmtree(folder / "vae"), r"model lacks vae, which its model_index\.json names"),
        (lambda folder: (folder / "model_index.json").unlink(), r"model is not a diffusers folder"),
    ],
)
def test_incomplete_folders_are_told_before_anything_is_loaded(
    student: Path, tmp_path: Path, break_it: Callable[[Path], None], message: str
) -> None:
    folder = shutil.copytree(student, tmp_path / "model")
    break_it(folder)
    with pytest.raises(ExportError, match=message) as refused:
        check_dtypes(folder)
    assert "\n" not in str(refused.value)
