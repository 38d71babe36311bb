"""What tells one set of text encoders from another: the name of its embeddings' folder."""

from __future__ import annotations

import ast
import hashlib
import importlib
import json
from pathlib import Path

import torch

from engines.families.base import FAMILIES, INDEX
from engines.files import sha256_files
from training.errors import TrainingError


def encoder_key(teacher: Path, dtype: torch.dtype) -> str:
    """Hex SHA-256 of everything that decides an embedding, without loading anything.

    That is: every file of the text encoders and tokenizers, the pipeline's class and the width it pads text to, this
    project's code that calls them (comments aside), and the dtype they are kept in.

    Raises:
        TrainingError: `teacher` is no diffusers folder of a known family.
    """
    index = teacher / INDEX
    try:
        entries = json.loads(index.read_text(encoding="utf-8"))
        transformer = json.loads((teacher / "transformer" / "config.json").read_text(encoding="utf-8"))
        family = FAMILIES[entries["_class_name"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise TrainingError(
            f"{teacher} is no diffusers folder of a known family ({error!r}); --teacher takes one of "
            f"{', '.join(FAMILIES)}"
        ) from error
    present = {
        name: entry for name, entry in entries.items() if isinstance(entry, list) and entry[0] is not None
    }
    parts = sorted(name for name in present if name.startswith(("text_encoder", "tokenizer")))
    files = [path for name in parts for path in (teacher / name).rglob("*") if path.is_file()]
    described = {
        "family": family,
        "components": {name: present[name] for name in parts},
        "width": transformer.get("joint_attention_dim"),
        "files": sha256_files(teacher, files),
        "code": _code_sha256(family.split(":")[0]),
        "dtype": str(dtype),
    }
    return hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()


def _code_sha256(module_name: str) -> str:
    """Of a family's module and of what it uses of `engines`, as syntax trees: a comment changes nothing."""
    module = importlib.import_module(module_name)
    used = {str(getattr(value, "__module__", "")) for value in vars(module).values()}
    names = sorted({module_name} | {name for name in used if name.startswith("engines.")})
    digest = hashlib.sha256()
    for name in names:
        source = Path(str(importlib.import_module(name).__file__)).read_text(encoding="utf-8")
        digest.update(ast.dump(ast.parse(source)).encode())
    return digest.hexdigest()
