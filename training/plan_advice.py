"""What to change when a distillation does not fit, cheapest first, with the numbers that each change gives."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

from training.config import CDMConfig, KeepConfig, MachineConfig
from training.errors import TrainingError
from training.plan_memory import Memory
from training.plan_setup import Setup
from training.plan_time import Speed, seconds

LORA_RANK = 64
"""Of the authors' LoRA option; its alpha, 128, is the config's default."""


@dataclass(frozen=True)
class Change:
    """One change of a setup and what comes of it."""

    flags: str
    costs: str
    """What is given up for it."""
    setup: Setup
    total: int
    """Bytes on one GPU."""
    seconds: float
    """Of an average iteration."""


class Advisor:
    """Changes of one setup; traces are shared."""

    def __init__(self, setup: Setup, limit: int, speed: Speed, cache: dict[Any, Any]) -> None:
        """`limit`: bytes of one GPU."""
        self.setup, self.limit, self.speed, self.cache = setup, limit, speed, cache

    def memory(self, setup: Setup) -> Memory:
        """The plan of another setup."""
        return Memory(setup, self.cache)

    def fits(self, setup: Setup | None) -> bool:
        """Whether it fits; None: what cannot be does not."""
        return setup is not None and self.memory(setup).total <= self.limit

    def largest_micro_batch(self, setup: Setup) -> int:
        """The largest micro-batch that fits; 0: not even 1 does. Memory grows with it."""
        low, high = 0, setup.share
        while low < high:
            middle = (low + high + 1) // 2
            if self.fits(machine(setup, micro_batch=middle)):
                low = middle
            else:
                high = middle - 1
        return low

    def alone(self) -> list[Change]:
        """Every change that takes less memory, by itself, cheapest first."""
        before = self.memory(self.setup).total
        return [change for change in self._candidates(self.setup) if change.total < before]

    def together(self) -> list[Change]:
        """Changes one upon another until it fits, without those that turn out unneeded; empty: no such changes.

        Each carries the totals with all before it.
        """
        taken: list[int] = []
        kinds = len(KINDS)
        for kind in range(kinds):
            if self.fits(self._applied([*taken, kind])):
                taken.append(kind)
                break
            if self._total([*taken, kind]) < self._total(taken):
                taken.append(kind)
        if not self.fits(self._applied(taken)):
            return []
        for kind in list(reversed(taken)):  # the dearest that can be spared goes first
            rest = [other for other in taken if other != kind]
            if self.fits(self._applied(rest)):
                taken = rest
        final = self._applied(taken)
        assert final is not None
        if not self.memory(final).total < self.memory(self.setup).total:
            return []
        micro = self.largest_micro_batch(final)  # where one sample at a time fits, more may
        changes, setup = [], self.setup
        for flags, costs, of_machine, of_config in (KINDS[kind] for kind in taken):
            if "micro_batch" in of_machine:
                flags, of_machine = f"--micro-batch {micro}", {"micro_batch": micro}
            changes.append(self._change((flags, costs, of_machine, of_config), setup))
            setup = changes[-1].setup
        return changes

    def _candidates(self, setup: Setup) -> Iterator[Change]:
        for kind in KINDS:
            with suppress(TrainingError):  # what cannot be with the rest
                yield self._change(kind, setup)

    def _applied(self, kinds: list[int]) -> Setup | None:
        setup = self.setup
        try:
            for kind in kinds:
                setup = self._change(KINDS[kind], setup).setup
        except TrainingError:
            return None
        return setup

    def _total(self, kinds: list[int]) -> float:
        setup = self._applied(kinds)
        return math.inf if setup is None else self.memory(setup).total

    def _change(self, kind: tuple[str, str, Mapping[str, Any], Mapping[str, Any]], setup: Setup) -> Change:
        flags, costs, of_machine, of_config = kind
        changed = machine(setup, **of_machine)
        if of_config.get("sample_grids") is False:
            changed = replace(changed, sample_grids=False)
        elif of_config:
            wanted = {
                name: value for name, value in of_config.items() if name in type(setup.config).model_fields
            }
            if isinstance(setup.config, KeepConfig):  # goes on with every weight of the student
                wanted.pop("student_rank", None)
                if wanted.get("fake_rank"):  # a merge needs both alike
                    flags, wanted = f"--fake-rank {LORA_RANK} --fake-merge 1", {**wanted, "fake_merge": 1.0}
            changed = replace(changed, config=setup.config.model_copy(update=wanted))
            if not isinstance(setup.config, CDMConfig):
                flags = flags.split(" --fake-rank")[0]
        return self._told(flags, costs, changed)

    def _told(self, flags: str, costs: str, setup: Setup) -> Change:
        memory = self.memory(setup)
        return Change(flags, costs, setup, memory.total, seconds(memory, self.speed))


KINDS: tuple[tuple[str, str, Mapping[str, Any], Mapping[str, Any]], ...] = (
    ("--sample-every 0", "no sample grids", {}, {"sample_grids": False}),
    ("--pass-batch 8", "no result changes", {"pass_batch": 8}, {}),
    ("--micro-batch 1", "no result changes", {"micro_batch": 1}, {}),
    ("--gradient-checkpointing", "one more forward a backward", {"gradient_checkpointing": True}, {}),
    ("--parallel fsdp", "communication in every pass", {"parallel": "fsdp"}, {}),
    ("--optimizer adamw8bit", "moments rounded to 8 bits", {}, {"optimizer": "adamw8bit"}),
    (
        f"--student-rank {LORA_RANK} --fake-rank {LORA_RANK}", "LoRA instead of every weight",
        {}, {"student_rank": LORA_RANK, "fake_rank": LORA_RANK},
    ),
)  # fmt: skip
"""(flags, what they cost, changes of the machine, changes of the config), cheapest first."""


def machine(setup: Setup, **changes: Any) -> Setup:
    """The setup on another machine configuration."""
    return replace(setup, machine=MachineConfig(**{**setup.machine.model_dump(), **changes}))
