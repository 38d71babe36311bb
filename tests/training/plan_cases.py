"""What the planner's tests share."""

from __future__ import annotations

import json

from engines.cli import parse_settings, run_command
from tests.training.tiny_distillation import tiny_config
from training.config import MachineConfig
from training.plan import PlanSettings, plan
from training.plan_model import describe
from training.plan_setup import Setup
from training.plan_time import Speed

ERRORS = ("training.errors:TrainingError",)
SPEED = Speed(tflops=100, bandwidth=1000, efficiency=0.5)


def tiny_setup(folder, **changes) -> Setup:
    machine = {name: changes.pop(name) for name in list(changes) if name in MachineConfig.model_fields}
    of_setup = {name: changes.pop(name) for name in list(changes) if name in Setup.__dataclass_fields__}
    return Setup(
        describe(str(folder)),
        tiny_config(**changes),
        MachineConfig(**machine),
        **{"kernels": "cpu", **of_setup},
    )


def parsed(arguments) -> PlanSettings:
    return parse_settings(PlanSettings, arguments, "plan", "")[0]


def command(arguments, capsys) -> tuple[int, dict]:
    code = run_command(PlanSettings, plan, arguments, prog="plan", user_errors=ERRORS)
    output = capsys.readouterr()
    return code, json.loads(output.out.splitlines()[-1]) if output.out else {"error": output.err}


def bytes_of(tensors) -> int:
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())
