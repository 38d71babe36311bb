"""Processes that distil together: started by `test_parallel.py`, never imported by it. One start for many cases."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

from engines.families.base import load_family
from tests.training.tiny_distillation import SMALL, TEXTS, tiny_config
from tests.training.tiny_tuning import tiny_finetune, tiny_keep
from training import checkpoint
from training.config import ConsistencyConfig
from training.consistency import Consistency
from training.distill import Distillation, Method
from training.embeddings import embed_in_memory
from training.parallel import Parallel, whole
from training.prompts import Prompts
from training.roles import Computing, Roles


@dataclass(frozen=True)
class Case:
    """One short distillation; its results lie in `out`."""

    out: str
    mode: str = "ddp"
    method: str = "cdm"
    micro_batch: int = 0
    steps: int = 4
    save: str = ""
    """Where a checkpoint is written after `steps`; beside `out`."""
    resume: str = ""
    """Whence to go on, up to `steps` in all."""
    changes: dict[str, Any] = field(default_factory=dict)
    checkpointing: bool = False
    ask: tuple[int, ...] = ()
    """Iterations after which the averaged student is asked, as sample grids and scores do."""

    @classmethod
    def read(cls, text: str) -> Case:
        return cls(**json.loads(text))

    def write(self) -> str:
        return json.dumps(asdict(self))


def work_on(folder: Path, case: Case) -> Method:
    parallel = Parallel.start("cpu", case.mode)
    if case.method == "keep":
        return tiny_keep(folder, case.micro_batch, parallel, **case.changes)
    if case.method == "finetune":
        return tiny_finetune(folder, case.micro_batch, parallel, **case.changes)
    family = load_family(folder)
    config: Any
    if case.method == "consistency":
        shared = {key: SMALL[key] for key in ("steps", "batch", "lr_student", "warmup", "dtype", "n_max")}
        config = ConsistencyConfig(**{**shared, "tangent_warmup": 1, **case.changes})
    else:
        config = tiny_config(**case.changes)
    prompts = Prompts.of([(text, 1.0) for text in TEXTS], "test")
    table = embed_in_memory(family, prompts.texts, getattr(torch, config.dtype))
    computing = Computing(family.fsdp_units, family.lora_targets, case.checkpointing)
    roles = Roles(family.transformer, config, parallel, computing)
    made = Consistency if case.method == "consistency" else Distillation
    return made(family, config, roles, prompts, table, 128, case.micro_batch)


def run(folder: Path, case: Case) -> None:
    work = work_on(folder, case)
    roles, first, same = work.roles, 0, True
    if case.resume:
        saved = checkpoint.latest(Path(case.resume))
        assert saved is not None
        roles.restore(saved)
        first, same = saved.step, holds(roles, saved)
    values, answers = [], []
    for step in range(first, case.steps):
        values.append(work.iterate(step))
        if step in case.ask:
            assert isinstance(work, Distillation)
            answers.append(averaged_answer(work))
    if case.save:
        checkpoint.save(
            Path(case.save), case.steps, roles.tensors(), roles.counters(), main=roles.parallel.main
        )
        roles.parallel.barrier()
    weights = roles.student_weights()
    if work.roles.parallel.main:
        out = Path(case.out)
        out.mkdir(parents=True)
        save_file(weights, out / "weights.safetensors")
        told = {"world": work.roles.parallel.world, "values": values, "same": same, "answers": answers}
        (out / "values.json").write_text(json.dumps(told))
    work.roles.parallel.barrier()


@torch.no_grad()
def averaged_answer(work: Distillation) -> float:
    """Mean square of the averaged student's velocity at one point."""
    x_RCHW = torch.ones(1, *work.latent_shape)
    cond = work.table.rows(np.array([0]), work.device)
    with work.roles.averaged() as student:
        v_RCHW = work.velocity(student, x_RCHW, torch.full((1,), 0.7), cond)
    return float(v_RCHW.float().square().mean())


def holds(roles: Roles, saved: checkpoint.Checkpoint) -> bool:
    """Whether what a checkpoint would now be written of is what was read, to the bit, in every process."""
    now = roles.tensors()
    wrong = [
        f"{group}/{name}"
        for group, tensors in now.items()
        for read in [saved.tensors(group)]
        for name in sorted(
            tensors.keys() | read.keys()
        )  # every process in one order: `whole` is a collective
        if name not in tensors or name not in read or not torch.equal(whole(tensors[name]), read[name])
    ]
    print(*wrong, sep="\n")
    return not roles.parallel.agree(bool(wrong))


def main() -> None:
    """Arguments: the teacher's folder, then cases as JSON."""
    torch.set_num_threads(1)
    for text in sys.argv[2:]:
        run(Path(sys.argv[1]), Case.read(text))


if __name__ == "__main__":
    main()
