"""Processes that distil together: started by `test_parallel.py`, never imported by it. One start for many cases."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from engines.families.base import load_family
from tests.training.tiny_distillation import TEXTS, tiny_config
from training.distill import Distillation
from training.embeddings import embed_in_memory
from training.parallel import Parallel
from training.prompts import Prompts
from training.roles import Computing, Roles


@dataclass(frozen=True)
class Case:
    """One short distillation; its results lie in `out`."""

    out: str
    mode: str = "ddp"
    micro_batch: int = 0
    steps: int = 4
    changes: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def read(cls, text: str) -> Case:
        return cls(**json.loads(text))

    def write(self) -> str:
        return json.dumps(asdict(self))


def work_on(folder: Path, case: Case) -> Distillation:
    config = tiny_config(**case.changes)
    parallel = Parallel.start("cpu", case.mode)
    family = load_family(folder)
    prompts = Prompts.of([(text, 1.0) for text in TEXTS], "test")
    table = embed_in_memory(family, prompts.texts, getattr(torch, config.dtype))
    roles = Roles(family.transformer, config, parallel, Computing(family.fsdp_units, family.lora_targets))
    return Distillation(family, config, roles, prompts, table, 128, case.micro_batch)


def run(folder: Path, case: Case) -> None:
    work = work_on(folder, case)
    values = [work.iterate(step) for step in range(case.steps)]
    weights = work.roles.student_weights()
    if work.roles.parallel.main:
        out = Path(case.out)
        out.mkdir(parents=True)
        save_file(weights, out / "weights.safetensors")
        (out / "values.json").write_text(json.dumps({"world": work.roles.parallel.world, "values": values}))
    work.roles.parallel.barrier()


def main() -> None:
    """Arguments: the teacher's folder, then cases as JSON."""
    torch.set_num_threads(1)
    for text in sys.argv[2:]:
        run(Path(sys.argv[1]), Case.read(text))


if __name__ == "__main__":
    main()
