"""Laws of the planner: time, advice, the command."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

import training.plan_model as plan_model
from tests.training.plan_cases import SPEED, command, parsed, tiny_setup
from tests.training.tiny_distillation import tiny_distillation
from training.config import CDMConfig, MachineConfig
from training.main import COMMANDS
from training.plan import RECIPES
from training.plan_advice import Advisor
from training.plan_memory import Memory
from training.plan_model import describe
from training.plan_setup import Passes
from training.plan_time import GPUS, iteration, longest, seconds
from training.plan_trace import Compute, Traces
from training.rollout import draw_schedule, rollout


@pytest.fixture(scope="module")
def cache() -> dict:
    """Traces, which setups of one model share."""
    return {}


# time


def test_passes_are_those_of_the_loop():
    assert Passes.of(CDMConfig()) == Passes(7.75, 2, 4, 2)
    assert Passes.of(CDMConfig(truncated_rollout=False, shared_forward=False)) == Passes(14.5, 3, 4, 2)
    assert Passes.of(CDMConfig(shared_rollout=True, student_every=5)) == Passes(1.55, 2, 4, 2)
    assert Passes.of(CDMConfig(schedule="fixed", weight_cdm=0)) == Passes(2.5, 1, 3, 1)
    assert Passes.of(CDMConfig(weight_ca=0, weight_cdm=0, dm_guidance=8)) == Passes(7.75, 1, 2, 1)


def test_passes_of_a_student_step_are_counted_in_the_loop(tiny_model):
    work = tiny_distillation(tiny_model)
    asked = {id(work.roles.teacher): 0, id(work.roles.fake): 0, id(work.roles.student): 0}
    velocity = work.velocity

    def counted(network, x, sigma, cond):
        asked[id(network)] += len(x) if not torch.is_grad_enabled() or network is work.roles.student else 0
        return velocity(network, x, sigma, cond)

    work.rollout = lambda sigma, cond, draws: rollout(
        lambda x, s, rows: velocity(work.roles.student, x, s, {k: v[rows] for k, v in cond.items()}),
        draws.normal(work.latent_shape), sigma, draws.integers(len(sigma)),
    )  # fmt: skip
    work.velocity = counted
    work.iterate(1)
    passes, batch = Passes.of(work.config), work.config.batch
    assert list(asked.values()) == [passes.teacher * batch, passes.fake * batch, passes.student * batch]


def test_the_average_rollout_is_as_long_as_drawn(tiny_model):
    memory = Memory(tiny_setup(tiny_model, batch=6, n_max=5))
    generator, passes, calls = torch.Generator().manual_seed(0), 0, 0
    for _ in range(1500):
        sigma = draw_schedule(generator, 5, 0.25, 0.95)
        k = torch.randint(0, len(sigma), (6,), generator=generator)
        found = rollout(lambda x, s, rows: torch.zeros_like(x), torch.zeros(6, 1, 1, 1), sigma, k)
        passes += found.passes / 6
        calls += int(k.max()) + 1
    assert passes / 1500 == pytest.approx(memory.passes.rollout, rel=0.03)
    assert calls / 1500 == pytest.approx(longest(memory), rel=0.03)


def test_a_shared_rollout_is_paid_once(tiny_model, cache):
    own, shared = (
        iteration(Memory(tiny_setup(tiny_model, gpus=2, parallel="fsdp", student_every=4, **changes), cache))
        for changes in ({"shared_rollout": False}, {"shared_rollout": True})
    )
    assert [part.name for part in own] == [part.name for part in shared]
    assert shared[0].flops == pytest.approx(own[0].flops / 4)
    assert shared[0].sent == pytest.approx(own[0].sent / 4)
    assert own[1:] == shared[1:]


def test_checkpointing_costs_a_forward_of_the_blocks(tiny_model):
    plain, kept = (
        Traces(describe(str(tiny_model)), Compute(checkpointing=on, kernels="cpu")).steps(1)
        for on in (False, True)
    )
    assert kept.forward_flops == plain.forward_flops
    added = kept.backward_flops - plain.backward_flops
    assert 0.7 * plain.forward_flops < added <= plain.forward_flops


def test_time_follows_its_parts(tiny_model, cache):
    setup = tiny_setup(tiny_model, dtype="bfloat16")
    memory = Memory(setup, cache)
    assert seconds(memory, SPEED) == pytest.approx(sum(part.seconds(SPEED) for part in iteration(memory)))
    alone = {part.name: part for part in iteration(memory)}
    rarer = {
        p.name: p for p in iteration(Memory(tiny_setup(tiny_model, dtype="bfloat16", student_every=4), cache))
    }
    assert rarer["student step"].flops == pytest.approx(alone["student step"].flops / 2)
    assert rarer["fake step"] == alone["fake step"]
    assert all(part.sent == 0 for part in alone.values())
    sharded = iteration(Memory(replace(setup, gpus=2, machine=MachineConfig(parallel="fsdp")), cache))
    assert all(part.sent > 0 for part in sharded)


# advice


def test_applying_advice_gives_what_it_promised(tiny_model, cache):
    arguments = ["emoji-cdm", "--teacher", str(tiny_model), "--gpus", "2", "--batch", "64", "--device", "cpu"]
    setup = parsed(arguments).setup()
    advisor = Advisor(setup, 1000, SPEED, cache)
    before, changes = Memory(setup, cache), advisor.alone()
    wanted = {"--gradient-checkpointing", "--micro-batch 1", "--optimizer adamw8bit", "--sample-every 0"}
    assert len({change.flags for change in changes} & wanted) >= 3
    for change in changes:
        after = Memory(parsed([*arguments, *change.flags.split()]).setup(), cache)
        assert after.total == change.total < before.total, change.flags
        assert seconds(after, SPEED) == change.seconds
    assert advisor.together() == []  # nothing fits into a kilobyte


@pytest.mark.parametrize("share", [0.3, 0.5, 0.8])
def test_changes_together_fit_and_none_is_spare(tiny_model, cache, share):
    arguments = [
        "emoji-cdm",
        "--teacher",
        str(tiny_model),
        "--batch",
        "64",
        "--overhead",
        "0",
        "--sample-every",
        "0",
    ]
    limit = round(Memory(parsed(arguments).setup(), cache).total * share)
    changes = Advisor(parsed(arguments).setup(), limit, SPEED, cache).together()
    assert changes
    for count in range(1, len(changes) + 1):
        flags = [flag for change in changes[:count] for flag in change.flags.split()]
        assert Memory(parsed([*arguments, *flags]).setup(), cache).total == changes[count - 1].total
    assert changes[-1].total <= limit
    for spared in changes:
        rest = [flag for change in changes if change is not spared for flag in change.flags.split()]
        assert Memory(parsed([*arguments, *rest]).setup(), cache).total > limit, spared.flags


def test_what_does_not_fit_ends_with_1_and_says_what_would(tiny_model, capsys):
    arguments = ["emoji-cdm", "--teacher", str(tiny_model), "--overhead", "0"]
    code, found = command([*arguments, "--memory", "0.015"], capsys)
    assert (code, found["fits"]) == (1, False)
    assert found["total_gb"] > 0.015 >= found["together"][-1]["total_gb"]
    assert found["alone"]


def test_the_largest_micro_batch_fits_and_one_more_does_not(tiny_model, cache):
    setup = tiny_setup(tiny_model, batch=16, sample_grids=False)
    limit = Memory(replace(setup, machine=MachineConfig(micro_batch=5)), cache).total
    advisor = Advisor(setup, limit, SPEED, cache)
    assert advisor.largest_micro_batch(setup) == 5
    assert not advisor.fits(replace(setup, machine=MachineConfig(micro_batch=6)))


# the command


def test_nothing_is_loaded(tiny_model, tmp_path, monkeypatch, capsys):
    import diffusers
    import safetensors.torch

    def refuse(*arguments, **keywords):
        raise AssertionError("weights were loaded")

    monkeypatch.setattr(safetensors.torch, "load_file", refuse)
    monkeypatch.setattr(diffusers.ModelMixin, "from_pretrained", refuse)
    monkeypatch.setattr(diffusers.DiffusionPipeline, "from_pretrained", refuse)
    code, found = command(["emoji-cdm", "--teacher", str(tiny_model), "--memory", "80"], capsys)
    assert code == 0
    assert found["fits"]
    assert found["largest_micro_batch"] == 16
    assert sum(found["parts_gb"].values()) == pytest.approx(found["total_gb"], abs=0.01)


@pytest.mark.parametrize(("recipe", "flag"), [("emoji-cdm", "--disk"), ("finetune", "--ram")])
def test_too_little_main_memory_or_disk_names_how_many_prompts_would_do(tiny_model, capsys, recipe, flag):
    arguments = [recipe, "--teacher", str(tiny_model), "--prompt-count", "10000000"]
    code, found = command([*arguments, flag, "1"], capsys)
    assert code == 1
    count = found["shortages"][0].split("at most ")[1].split()[0]
    code, found = command([*arguments[:-1], count, flag, "1"], capsys)
    assert (code, found["shortages"]) == (0, [])
    code, found = command(["emoji-cdm", "--teacher", str(tiny_model), "--ram", "0.00001"], capsys)
    assert "fewer processes a machine" in found["shortages"][0]


@pytest.mark.parametrize(
    ("arguments", "present", "absent"),
    [
        (["finetune"], {"student: float32 masters", "autoencoder"}, {"fake teacher: float32 masters"}),
        (["emoji-finetune-student"], {"old student: weights", "fake teacher: float32 masters"}, set()),
        (["emoji-finetune-student", "--keep-weight", "0"], set(), {"old student: weights"}),
    ],
)
def test_fine_tuning_is_planned_with_its_own_networks(tiny_model, capsys, arguments, present, absent):
    code, found = command([*arguments, "--teacher", str(tiny_model), "--micro-batch", "1"], capsys)
    assert code == 0
    assert present <= found["parts_gb"].keys()
    assert not absent & found["parts_gb"].keys()
    rollout = "rollout" in found["tflop"]
    assert rollout == (arguments[0] != "finetune")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nothing"], "there is no recipe 'nothing'; recipes: sd3-cdm"),
        (["emoji-cdm"], "no teacher of its own; name its folder with --teacher"),
        (["sd3-cdm", "--gpus", "3"], "--batch=128 cannot be divided among 3 GPUs"),
        (["sd3-cdm", "--gpu", "abacus"], "--gpu=abacus is not known; known: b200"),
        (["sd3-consistency", "--weight-ca", "2"], "--weight-ca is no setting of sd3-consistency"),
    ],
)
def test_what_cannot_be_planned_is_said(arguments, message, capsys):
    code, found = command(arguments, capsys)
    assert code == 2
    assert message in found["error"]


def test_resolution_variant_and_ranks_are_planned_as_they_are_trained(tiny_model, capsys):
    base = ["emoji-cdm", "--teacher", str(tiny_model)]
    plain = Memory(parsed(base).setup())
    small = Memory(parsed([*base, "--resolution", "32"]).setup())
    assert small.phases["rollout"]["pass without gradient"] < plain.phases["rollout"]["pass without gradient"]
    code, found = command([*base, "--resolution", "24"], capsys)
    assert (code, "multiples of 16" in found["error"]) == (2, True)
    parity = Memory(parsed([*base, "--variant", "parity"]).setup()).passes
    assert (parity.rollout, parity.student) == (4.5, 3)
    assert Memory(parsed([*base, "--variant", "dmd2"]).setup()).passes.student == 1
    code, found = command(["emoji-consistency", *base[1:], "--variant", "dmd2"], capsys)
    assert (code, "--variant is no setting" in found["error"]) == (2, True)
    code, found = command([*base, "--student-rank", "4096", "--fake-rank", "4096"], capsys)
    assert (code, "is more than the layer" in found["error"]) == (2, True)
    code, found = command([*base, "--cooldown", "2000"], capsys)
    assert (code, "cooldown=2000 is longer than steps=500" in found["error"]) == (2, True)


def test_every_recipe_can_be_planned():
    recipes = ("training.recipes:", "training.recipes_tuning:")
    of_training = {name for name, each in COMMANDS.items() if each.settings.startswith(recipes)}
    assert of_training <= set(RECIPES)
    assert all(not teacher or teacher in plan_model.BUILT_IN for _, teacher in RECIPES.values())
    assert all(gpu.bfloat16 > gpu.float32 and math.isfinite(gpu.bandwidth) for gpu in GPUS.values())


def test_what_sharding_refuses_is_refused_and_not_advised(tiny_model, cache, capsys):
    arguments = ["--teacher", str(tiny_model), "--gpus", "2", "--parallel", "fsdp"]
    code, found = command(["emoji-cdm", *arguments, "--optimizer", "adamw8bit"], capsys)
    assert (code, "cannot be sharded" in found["error"]) == (2, True)
    code, found = command(["emoji-consistency", *arguments, "--tangent-step", "0"], capsys)
    assert (code, "forward-mode derivatives" in found["error"]) == (2, True)
    setup = parsed(["emoji-cdm", "--teacher", str(tiny_model), "--gpus", "2"]).setup()
    small = round(Memory(setup, cache).total * 0.3)
    flags = [change.flags for change in Advisor(setup, small, SPEED, cache).together()]
    assert not {"--parallel fsdp", "--optimizer adamw8bit"} <= set(flags)


def test_sharded_processes_walk_every_rollout_to_its_end(tiny_model, cache):
    setup = tiny_setup(tiny_model, dtype="bfloat16", n_max=5, batch=2, gpus=2)
    sharded = replace(setup, machine=MachineConfig(parallel="fsdp"))
    assert longest(Memory(sharded, cache)) == 3
    assert longest(Memory(setup, cache)) < 3


def test_the_derivative_of_consistency_costs_its_own_pass(tiny_model, cache):
    def student_flops(**changes):
        memory = Memory(
            parsed(["emoji-consistency", "--teacher", str(tiny_model), *changes.get("flags", [])]).setup(),
            cache,
        )
        assert "student step: derivative" in memory.phases
        return next(part.flops for part in iteration(memory) if part.name == "student step"), memory

    exact, memory = student_flops(flags=["--tangent-step", "0"])
    differences, _ = student_flops(flags=["--tangent-step", "0.02"])
    forward = memory.plain.no_gradient.forward_flops * memory.setup.share
    derivative = memory.student.traces.derivative(0.0).forward_flops / memory.plain.no_gradient.forward_flops
    assert (
        2 < derivative < 4
    )  # values and tangents: 2 products of each that depends on x, more of attention's
    assert exact - differences == pytest.approx((derivative - 2) * forward)


def test_consistency_has_no_fake_teacher(tiny_model, capsys):
    code, found = command(["emoji-consistency", "--teacher", str(tiny_model)], capsys)
    assert code == 0
    assert not [name for name in found["parts_gb"] if "fake" in name]
