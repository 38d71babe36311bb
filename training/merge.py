"""A teacher with a LoRA: adapter and folder → one folder that any recipe distils.

with_lora(Path("sd3"), Path("style.safetensors"), Path("runs/mine/teacher-lora"))
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch

from engines.bundle import PROVENANCE
from engines.errors import ExportError
from engines.export.adapter import merge_, read_adapter
from engines.families.base import load_family
from engines.files import replace_folder, sha256_file
from training.adapter import require_base
from training.errors import TrainingError, told_if_full
from training.student_folder import TeacherHashes

RECORD = "merged.json"


def with_lora(teacher: Path, adapter: Path, target: Path) -> Path:
    """Write `target`: the diffusers folder `teacher` with `adapter` merged into its modules, and return it.

    A target that was made of the same two stays. `provenance.json` is taken over.

    Raises:
        TrainingError: the adapter cannot be read, or is of another base.
    """
    hashes = TeacherHashes.of(teacher)
    require_base(adapter, hashes.transformer)
    try:
        read = read_adapter(adapter)
        record = {"teacher_sha256": hashes.components, "adapter_sha256": sha256_file(read.path)}
        if _recorded(target) == record:
            return target
        family = load_family(teacher, torch.float32)
        modules = {"transformer": family.transformer, **family.text_modules()}
        for component in read.components():
            if component not in modules:
                raise TrainingError(f"{read.path} is for {component}, which {teacher} does not have")
            merge_(read, component, modules[component])
    except ExportError as error:
        raise TrainingError(str(error)) from error
    partial = target.with_name(f".{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    with told_if_full("the teacher with its LoRA", target.parent):
        family.save(partial)
    if (teacher / PROVENANCE).is_file():
        shutil.copyfile(teacher / PROVENANCE, partial / PROVENANCE)
    (partial / RECORD).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    replace_folder(partial, target)
    return target


def _recorded(target: Path) -> object:
    try:
        return json.loads((target / RECORD).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
