"""A LoRA adapter → merged into the component it belongs to, by diffusers' and PEFT's own loaders.

    adapter = read_adapter(Path("runs/adapter"))
    adapter.components()                                    # ("transformer", "text_encoder")
    merge_(adapter, "transformer", transformer)             # the weights are changed, the module is of its class again

Two formats: what diffusers' `save_lora_weights` (keys begin with the component) and `save_lora_adapter` (they don't)
write, with the scales in the file's metadata, or alpha = rank without any; and a PEFT adapter folder.
"""

from __future__ import annotations

import json
import warnings
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import peft
import torch
from diffusers.loaders import SD3LoraLoaderMixin
from diffusers.loaders.lora_base import (
    LORA_ADAPTER_METADATA_KEY,
    LORA_WEIGHT_NAME_SAFE,
    fuse_text_encoder_lora,
)
from diffusers.utils.peft_utils import recurse_remove_peft_layers
from diffusers.utils.state_dict_utils import (
    convert_state_dict_to_diffusers,
    convert_state_dict_to_peft,
    convert_unet_state_dict_to_peft,
)
from peft import LoraConfig, PeftModel, PeftType, get_peft_model_state_dict
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from engines.errors import ExportError
from engines.families.loading import quiet

MERGED = ("transformer", "text_encoder", "text_encoder_2")
"""Components that adapters are merged into: those that diffusers' pipelines load adapters for."""

PICKLES = (".bin", ".ckpt", ".pt", ".pth")

NAME = "student"
"""What the adapter is called while it is loaded."""

PEFT_PREFIX = "base_model.model."

WRITTEN_BY = "as diffusers' save_lora_weights or PEFT's save_pretrained write it"


@dataclass(frozen=True)
class Adapter:
    """An adapter as its file has it: tensors by component and by name there, and the LoRA settings where it has any.

    `folder` is that of a PEFT adapter; None: the file is diffusers'.
    """

    path: Path
    tensors: dict[str, dict[str, Tensor]]
    settings: dict[str, dict[str, Any] | None]
    folder: Path | None

    def components(self) -> tuple[str, ...]:
        """Which components it changes."""
        return tuple(self.tensors)


def read_adapter(path: Path) -> Adapter:
    """Read a file or folder.

    Raises:
        ExportError: nothing there, a pickle, no LoRA, one of another kind, or a value that is no number.
    """
    file = find_adapter(path)
    try:
        with safe_open(file, framework="pt") as opened:
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118  (no mapping)
            metadata = json.loads((opened.metadata() or {}).get(LORA_ADAPTER_METADATA_KEY, "{}"))
    except (OSError, ValueError, SafetensorError) as error:
        raise ExportError(
            f"{file} cannot be read as safetensors ({error}); save or download it again"
        ) from error
    if not any(".lora" in name for name in tensors):
        first = next(iter(tensors), "nothing")
        raise ExportError(f"{file} holds no LoRA weights but {first}; give an adapter {WRITTEN_BY}")
    for name, tensor in tensors.items():
        if not tensor.is_floating_point() or not bool(torch.isfinite(tensor).all()):
            raise ExportError(
                f"{file}: {name} holds values that are no finite numbers; give an adapter from before training diverged"
            )
    if file.name == SAFETENSORS_WEIGHTS_NAME:
        _check_config(file.parent)
        named = {name.removeprefix(PEFT_PREFIX): tensor for name, tensor in tensors.items()}
        return Adapter(file, {"transformer": named}, {"transformer": None}, file.parent)
    return _split(file, tensors, metadata)


def find_adapter(path: Path) -> Path:
    """The safetensors file that `path` is, or that the folder `path` has.

    Raises:
        ExportError: there is none, or several, or a pickle.
    """
    if path.is_dir():
        known = (path / LORA_WEIGHT_NAME_SAFE, path / SAFETENSORS_WEIGHTS_NAME)
        found = [file for file in known if file.is_file()] or sorted(path.glob("*.safetensors"))
        if len(found) == 1:
            return found[0]
        if found:
            names = ", ".join(file.name for file in found)
            raise ExportError(f"{path} has several adapters ({names}); name one of these files")
        pickles = sorted(file for file in path.iterdir() if file.suffix in PICKLES)
        if not pickles:
            raise ExportError(f"{path} has no {LORA_WEIGHT_NAME_SAFE} and no {SAFETENSORS_WEIGHTS_NAME}")
        path = pickles[0]
    if path.suffix in PICKLES:
        raise ExportError(
            f"{path} is a pickle, which can run any code when it is read; save it as safetensors"
        )
    if not path.is_file():
        raise ExportError(f"there is no adapter {path}; give a file or folder {WRITTEN_BY}")
    return path


def _check_config(folder: Path) -> None:
    """A PEFT adapter is nothing without its settings, and another model with settings that are not understood."""
    path = folder / CONFIG_NAME
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        kind = config["peft_type"]
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ExportError(f"{path} is not a PEFT adapter's configuration ({_first_line(error)})") from error
    if kind != PeftType.LORA:
        raise ExportError(f"{path} is of {kind!r}; a LORA adapter is needed")
    known = {field.name for field in fields(LoraConfig)}
    if unknown := [name for name, value in config.items() if value and name not in known]:
        raise ExportError(
            f"{path} sets {unknown[0]}, which PEFT {peft.__version__} does not know; install the newest PEFT"
        )


def _split(file: Path, tensors: dict[str, Tensor], metadata: dict[str, Any]) -> Adapter:
    """By the component that keys begin with; the transformer's, where none does."""
    named = {name: (name.split(".")[0], name) for name in tensors}
    if not any(head in MERGED for head, _ in named.values()):
        return Adapter(file, {"transformer": tensors}, {"transformer": metadata or None}, None)
    parts: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        component, _, rest = name.partition(".")
        if component not in MERGED:
            raise ExportError(
                f"{file}: {name} is for none of the components that adapters are merged into: {', '.join(MERGED)}"
            )
        parts.setdefault(component, {})[rest] = tensor
    settings = {
        component: {
            key.removeprefix(f"{component}."): value
            for key, value in metadata.items()
            if key.startswith(f"{component}.")
        }
        or None
        for component in parts
    }
    return Adapter(file, parts, settings, None)


def merge_(adapter: Adapter, component: str, module: nn.Module) -> nn.Module:
    """Add the adapter's product to the weights of `module`, and return it: the same class, the same names.

    Raises:
        ExportError: it is an adapter for another base, or the sum is not finite.
    """
    where = f"{adapter.path} is an adapter for another {component}"
    tensors = adapter.tensors[component]
    if adapter.folder is None:
        tensors = _peft_names(component, tensors)
        # transformers 5 has flattened its CLIPTextModel: diffusers drops this part of older names too.
        if not hasattr(module, "text_model"):
            tensors = {name.removeprefix("text_model."): tensor for name, tensor in tensors.items()}
    _check_fits(where, tensors, module, whole=adapter.folder is not None)
    try:
        with quiet(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that a tensor has not arrived is looked at below
            merged = _merge(adapter, component, tensors, module, where)
    except (ValueError, RuntimeError, TypeError, LookupError) as error:
        raise ExportError(
            f"{adapter.path} cannot be merged into {component}: {_first_line(error)}"
        ) from error
    for name, parameter in merged.named_parameters():
        if not bool(torch.isfinite(parameter).all()):
            raise ExportError(
                f"{component}: {name} is not finite once {adapter.path} is merged into it; base or adapter is broken"
            )
    return merged


def _merge(
    adapter: Adapter, component: str, tensors: dict[str, Tensor], module: Any, where: str
) -> nn.Module:
    settings = adapter.settings[component]
    if adapter.folder is not None:
        wrapped = PeftModel.from_pretrained(module, str(adapter.folder), adapter_name=NAME)
        _check_arrived(where, tensors, wrapped)
        merged: nn.Module = wrapped.merge_and_unload()
        return merged
    if component == "transformer":
        module.load_lora_adapter(tensors, prefix=None, metadata=settings, adapter_name=NAME)
        _check_arrived(where, tensors, module)
        module.fuse_lora()
        module.unload_lora()
        return module  # type: ignore[no-any-return]
    SD3LoraLoaderMixin.load_lora_into_text_encoder(
        {f"{component}.{name}": tensor for name, tensor in tensors.items()},
        network_alphas=None,
        text_encoder=module,
        prefix=component,
        metadata=settings and {f"{component}.{key}": value for key, value in settings.items()},
        adapter_name=NAME,
    )
    _check_arrived(where, tensors, module)
    fuse_text_encoder_lora(module)
    recurse_remove_peft_layers(module)
    del module.peft_config
    module._hf_peft_config_loaded = False  # or only an adapter would be saved
    return module  # type: ignore[no-any-return]


def _peft_names(component: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """PEFT's names of what diffusers wrote before it used PEFT (`to_q_lora.down`, `lora_linear_layer.up`)."""
    if all(".lora_A" in name or ".lora_B" in name for name in tensors):
        return tensors
    if component == "transformer":
        return dict(convert_unet_state_dict_to_peft(tensors))
    return dict(convert_state_dict_to_peft(convert_state_dict_to_diffusers(tensors)))


def _check_fits(where: str, tensors: dict[str, Tensor], module: nn.Module, whole: bool) -> None:
    """Every tensor has a place of its shape. `whole`: parameters may come whole too, as PEFT's `modules_to_save`."""
    modules, parameters = dict(module.named_modules()), dict(module.named_parameters())
    for name, tensor in tensors.items():
        target, marker, part = name.partition(".lora_")
        if not marker and whole and name in parameters and parameters[name].shape == tensor.shape:
            continue
        if not marker:
            raise ExportError(f"{where}: {name} is no LoRA weight; give an adapter {WRITTEN_BY}")
        weight = getattr(modules.get(target), "weight", None)
        if weight is None:
            raise ExportError(f"{where}: {name} belongs to no layer of this {type(module).__name__}")
        if part in ("A.weight", "B.weight"):
            other = f"{target}.lora_{'B' if part == 'A.weight' else 'A'}.weight"
            if other not in tensors:
                raise ExportError(f"{where}: {name} is there without {other}")
        fits = {
            "A.weight": tensor.shape[1:] == weight.shape[1:],
            "B.weight": tensor.shape[0] == weight.shape[0],
        }
        if not fits.get(part, True):
            raise ExportError(
                f"{where}: {name} is {list(tensor.shape)}, the layer's weight {list(weight.shape)}"
            )


def _check_arrived(where: str, tensors: dict[str, Tensor], module: Any) -> None:
    """Loaders leave out without a word what their settings do not speak of."""
    arrived = get_peft_model_state_dict(module, adapter_name=NAME)
    names = {name.removeprefix(PEFT_PREFIX) for name in arrived}
    if left_out := [name for name in tensors if name not in names]:
        raise ExportError(f"{where}: {left_out[0]} is in the file and not in its settings")


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    named = [line for line in lines if line.startswith("size mismatch")]
    return (named or lines or [type(error).__name__])[0]
