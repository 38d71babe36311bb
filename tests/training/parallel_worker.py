"""Two processes that distil together: started by `test_parallel.py`, never imported by it."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

from engines.families.base import load_family
from tests.training.tiny_distillation import TEXTS, tiny_config
from training.distill import Distillation
from training.embeddings import embed_in_memory
from training.parallel import Parallel
from training.prompts import Prompts
from training.roles import Roles


def work_on(folder: Path, mode: str, micro_batch: int, changes: dict[str, object]) -> Distillation:
    config = tiny_config(**changes)
    parallel = Parallel.start("cpu", mode)
    family = load_family(folder)
    prompts = Prompts.of([(text, 1.0) for text in TEXTS], "test")
    table = embed_in_memory(family, prompts.texts, getattr(torch, config.dtype))
    roles = Roles(family.transformer, config, parallel, family.fsdp_units)
    return Distillation(family, config, roles, prompts, table, 128, micro_batch)


def main() -> None:
    """Arguments: the teacher's folder, the run folder, ddp or fsdp, micro-batch, changes of the config as JSON."""
    folder, out, mode, micro_batch, changes = sys.argv[1:]
    torch.set_num_threads(1)
    work = work_on(Path(folder), mode, int(micro_batch), json.loads(changes))
    parallel = work.roles.parallel
    values = [work.iterate(step) for step in range(work.config.steps)]
    weights = work.roles.student_weights()
    if parallel.main:
        Path(out).mkdir(parents=True)
        save_file(weights, Path(out) / "weights.safetensors")
        (Path(out) / "values.json").write_text(json.dumps(values))
    parallel.barrier()
    assert os.environ.get("WORLD_SIZE", "1") == str(parallel.world)


if __name__ == "__main__":
    main()
