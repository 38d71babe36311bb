"""An adapter that does not fit, is broken, or is none is refused in one sentence, and leaves nothing behind."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from engines.errors import ExportError
from engines.export.student import prepare_student
from tests.engines.adapters import ADAPTER, WEIGHTS, save_diffusers, save_peft, store


@pytest.fixture(scope="module")
def adapter(student: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_diffusers(student, tmp_path_factory.mktemp("adapters") / "diffusers", metadata=True)


def _rewritten(change: Callable[[dict[str, torch.Tensor]], None]) -> Callable[[Path, Path], None]:
    """Change the tensors of the adapter; its metadata stays."""

    def rewrite(folder: Path, _: Path) -> None:
        with safe_open(folder / ADAPTER, framework="pt") as opened:
            metadata = opened.metadata()
        tensors = load_file(folder / ADAPTER)
        change(tensors)
        save_file(tensors, folder / ADAPTER, metadata)

    return rewrite


FIRST = "transformer.transformer_blocks.0.attn.to_q.lora_{}.weight"


def _rename(old: str, new: str) -> Callable[[Path, Path], None]:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        for name in [name for name in tensors if old in name]:
            tensors[name.replace(old, new)] = tensors.pop(name)

    return _rewritten(change)


def _pickled(folder: Path, _: Path) -> None:
    torch.save({}, folder / "pytorch_lora_weights.bin")
    (folder / ADAPTER).unlink()


def _set(name: str, make: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Path, Path], None]:
    return _rewritten(lambda tensors: tensors.update({name: make(tensors[name])}))


def _huge(tensors: dict[str, torch.Tensor]) -> None:
    tensors[FIRST.format("A")] = torch.full_like(tensors[FIRST.format("A")], 1e30)
    tensors[FIRST.format("B")] = torch.full_like(tensors[FIRST.format("B")], 1e30)


REFUSED: dict[str, tuple[Callable[[Path, Path], None], str]] = {
    "no folder": (lambda lora, _: shutil.rmtree(lora), r"there is no adapter .*lora; give a file or folder"),
    "empty folder": (lambda lora, _: (lora / ADAPTER).unlink(), r"lora has no pytorch_lora_weights\.safetensors and"),
    "pickle": (_pickled, r"pytorch_lora_weights\.bin is a pickle"),
    "cut short": (
        lambda lora, _: os.truncate(lora / ADAPTER, 5000),
        r"pytorch_lora_weights\.safetensors cannot be read as safetensors",
    ),
    "two adapters": (
        lambda lora, _: shutil.copyfile(lora / ADAPTER, lora / "adapter_model.safetensors"),
        r"several adapters \(pytorch_lora_weights\.safetensors, adapter_model\.safetensors\); name one",
    ),
    "no LoRA": (
        _rewritten(lambda tensors: (tensors.clear(), tensors.update({"proj_out.weight": torch.zeros(2, 2)}))),
        r"holds no LoRA weights but proj_out\.weight",
    ),
    "another model": (
        _rename("transformer_blocks.1.", "transformer_blocks.7."),
        r"adapter for another transformer: transformer_blocks\.7\.attn\.\S+ belongs to no layer of this SD3Trans",
    ),
    "another width": (
        _set(FIRST.format("A"), lambda tensor: tensor[:, :32].contiguous()),
        r"to_q\.lora_A\.weight is \[4, 32\], the layer's weight \[64, 64\]",
    ),
    "another rank": (
        _set(FIRST.format("A"), lambda tensor: tensor[:3].contiguous()),
        r"cannot be merged into transformer: size mismatch for transformer_blocks\.0\.attn\.to_q\.lora_A",
    ),
    "half": (
        _rewritten(lambda tensors: tensors.pop(FIRST.format("B"))),
        r"to_q\.lora_A\.weight is there without transformer_blocks\.0\.attn\.to_q\.lora_B\.weight",
    ),
    "scales of its own": (
        _rewritten(
            lambda tensors: tensors.update({"transformer.transformer_blocks.0.attn.to_q.alpha": torch.tensor(8.0)})
        ),
        r"transformer_blocks\.0\.attn\.to_q\.alpha is no LoRA weight",
    ),
    "another component": (_rename("text_encoder_2.", "text_encoder_3."), r"text_encoder_3\.\S+ is for none of the"),
    "component that is not there": (
        lambda _, base: _without(base, "text_encoder_2"),
        r"lora is an adapter for text_encoder_2, which .*base does not have",
    ),
    "NaN": (
        _set(FIRST.format("B"), lambda tensor: tensor * float("nan")),
        r"to_q\.lora_B\.weight holds values that are no finite numbers",
    ),
    "too much": (
        _rewritten(_huge),
        r"transformer: transformer_blocks\.0\.attn\.to_q\.weight is not finite once .* is merged",
    ),
    "base not there": (lambda _, base: shutil.rmtree(base), r"base is not a diffusers folder: model_index\.json is"),
    "base quantized": (
        lambda _, base: store(base / "transformer" / WEIGHTS, "proj_out.weight", torch.float8_e4m3fn),
        r"transformer/diffusion_pytorch_model\.safetensors: proj_out\.weight is F8_E4M3; weights in F64, F32, F16",
    ),
}  # fmt: skip


def _without(base: Path, name: str) -> None:
    index = json.loads((base / "model_index.json").read_text(encoding="utf-8"))
    index[name] = [None, None]
    (base / "model_index.json").write_text(json.dumps(index), encoding="utf-8")


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_merged_is_refused_in_one_sentence_and_leaves_nothing(
    student: Path, tmp_path: Path, adapter: Path, case: str
) -> None:
    break_it, message = REFUSED[case]
    lora, base = shutil.copytree(adapter, tmp_path / "lora"), shutil.copytree(student, tmp_path / "base")
    break_it(lora, base)
    with pytest.raises(ExportError, match=message) as refused:
        prepare_student(base, lora, tmp_path / "merged")
    assert "\n" not in str(refused.value)
    assert not (tmp_path / "merged").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"peft_type": "IA3"}, r"adapter_config\.json is of 'IA3'; a LORA adapter is needed"),
        (
            {"use_next_years_method": True},
            r"adapter_config\.json sets use_next_years_method, which PEFT \S+ does not know; install",
        ),
        (
            {"target_modules": ["attn.to_k"]},
            r"to_\w+\S*\.lora_A\.weight is in the file and not in its settings",
        ),
        ({"r": 3, "rank_pattern": {}}, r"cannot be merged into transformer: size mismatch for base_model"),
    ],
)
def test_peft_settings_that_do_not_fit_are_refused(
    student: Path, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    lora = save_peft(student, tmp_path / "lora")
    path = lora / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text(encoding="utf-8")), **change}), encoding="utf-8")
    with pytest.raises(ExportError, match=message) as refused:
        prepare_student(student, lora, tmp_path / "merged")
    assert "\n" not in str(refused.value)
    path.unlink()
    with pytest.raises(ExportError, match=r"adapter_config\.json is not a PEFT adapter's configuration"):
        prepare_student(student, lora, tmp_path / "merged")
