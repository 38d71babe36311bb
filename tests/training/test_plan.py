"""Laws of the planner: what can be counted exactly is, what it advises holds, and nothing is loaded."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
import torch

import training.plan_model as plan_model
from benchmarks.plan_saved import live_bytes, saved_bytes
from engines.cli import parse_settings, run_command
from tests.tiny_longcat import build_tiny_longcat
from tests.training.tiny_distillation import tiny_config, tiny_distillation
from training.config import CDMConfig, MachineConfig
from training.cpu_kernels import cpu_kernels
from training.errors import TrainingError
from training.main import COMMANDS
from training.plan import RECIPES, PlanSettings, plan
from training.plan_advice import Advisor
from training.plan_memory import Memory
from training.plan_model import BUILT_IN, describe, stored_numbers
from training.plan_setup import Passes, Setup
from training.plan_time import GPUS, Speed, iteration, longest, seconds
from training.plan_trace import Compute, Traces
from training.rollout import draw_schedule, rollout

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


@pytest.fixture(scope="module")
def cache() -> dict:
    """Traces, which setups of one model share."""
    return {}


def parsed(arguments) -> PlanSettings:
    return parse_settings(PlanSettings, arguments, "plan", "")[0]


def command(arguments, capsys) -> tuple[int, dict]:
    code = run_command(PlanSettings, plan, arguments, prog="plan", user_errors=ERRORS)
    output = capsys.readouterr()
    return code, json.loads(output.out.splitlines()[-1]) if output.out else {"error": output.err}


def bytes_of(tensors) -> int:
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


# models


@pytest.fixture(scope="module")
def tiny_longcat(tmp_path_factory):
    return build_tiny_longcat(tmp_path_factory.mktemp("longcat") / "tiny")


@pytest.mark.parametrize(
    ("name", "billions"), [("sd3-medium", 2.03), ("sd3.5-medium", 2.24), ("longcat-image", 6.27)]
)
def test_the_built_in_sizes_have_the_published_parameters(name, billions):
    net = BUILT_IN[name].transformer(torch.bfloat16)
    assert sum(p.numel() for p in net.parameters()) / 1e9 == pytest.approx(billions, rel=0.01)
    assert {p.device.type for p in net.parameters()} == {"meta"}


@pytest.mark.parametrize("name", ["sd3-medium", "longcat-image"])
def test_the_flops_of_a_pass_match_a_closed_form(name):
    traced = Traces(BUILT_IN[name], Compute()).no_gradient.forward_flops
    image, text = 64 * 64, BUILT_IN[name].text_tokens
    if name == "sd3-medium":
        d, blocks, tokens = 1536, 24, 64 * 64 + 333
        # Per token and block: q, k, v, out (4 d²) and feed-forward (8 d²); the last block's text stops at q, k, v.
        products = 12 * d * d * (blocks * image + (blocks - 1) * text) + 3 * d * d * text
        attention = 4 * d * tokens * (tokens * (blocks - 1) + tokens)
        modulation = d * d * (12 * (blocks - 1) + 8 + 2)
        ends = (256 + 2048 + 2 * d) * d + 4096 * d * text + 2 * 16 * 4 * d * image
    else:
        d, double, single, tokens = 3072, 10, 20, image + text
        products = 12 * d * d * (double + single) * tokens  # a single block: 3 d² + 4 d² in, 5 d² out
        attention = 4 * d * tokens * tokens * (double + single)
        modulation = d * d * (12 * double + 3 * single + 2)
        ends = (256 + d) * d + 3584 * d * text + 2 * 64 * d * image
    assert traced == pytest.approx(2 * (products + modulation + ends) + attention, rel=0.01)


def test_a_folder_is_described_by_its_files_alone(tiny_model, tiny_longcat):
    for folder, tokens, weight in ((tiny_model, 13, 12), (tiny_longcat, 512, 1)):
        model = describe(str(folder))
        assert (model.text_tokens, model.text_weight) == (tokens, weight)
        weights = stored_numbers(folder / "transformer")
        net = model.transformer(torch.float32)
        buffers = sum(b.numel() for name, b in net.named_buffers() if name in net.state_dict())
        assert sum(p.numel() for p in net.parameters()) + buffers == weights
        assert model.text_parameters > 0


def test_what_is_no_model_is_refused(tmp_path, tiny_model):
    with pytest.raises(TrainingError, match="built-in size; sizes: sd3-medium"):
        describe("no where")
    with pytest.raises(TrainingError, match=r"model_index.json cannot be read"):
        describe(str(tmp_path))


# memory


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_stays_equals_the_bytes_of_a_real_run(tiny_model, dtype):
    work = tiny_distillation(tiny_model, dtype=dtype)
    for step in range(2):
        work.iterate(step)
    roles = work.roles
    parts = Memory(tiny_setup(tiny_model, dtype=dtype, sample_grids=False)).persistent

    def module(net):
        return bytes_of([*net.parameters(), *net.buffers()])

    def moments(role):
        states = role.optimizer.state.values()
        return sum(state[name].nbytes for state in states for name in ("exp_avg", "exp_avg_sq"))

    assert parts["teacher: weights"] == module(roles.teacher.net)
    assert parts["student: average (EMA)"] == bytes_of(roles.ema.average.values())
    for name, role in (("student", roles.student), ("fake teacher", roles.fake)):
        masters = bytes_of(role.masters.values())
        assert parts[f"{name}: float32 masters"] == masters
        shared = masters if dtype == "float32" else 0
        assert parts[f"{name}: compute copies"] == module(role.net) - shared
        assert parts[f"{name}: AdamW moments"] == moments(role)
    assert len(parts) == 8


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("family", ["sd3", "longcat"])
def test_activations_equal_what_autograd_saves(tiny_model, tiny_longcat, family, checkpointing):
    model = replace(describe(str(tiny_model if family == "sd3" else tiny_longcat)), size=8)
    net = model.transformer(torch.bfloat16, "cpu")
    if checkpointing:
        net.enable_gradient_checkpointing()
    cond = model.embedding(4, torch.bfloat16, "cpu")
    x, sigma = torch.zeros(4, *model.latent), torch.full((4,), 0.5)
    known = [*net.parameters(), *net.buffers(), x, sigma, *cond.values()]

    def forward():
        return model.family().velocity(net, x, sigma, cond)

    predicted = Traces(model, Compute("bfloat16", checkpointing, kernels="cpu")).steps(1).saved(4)
    with cpu_kernels():
        live, saved = live_bytes(forward), saved_bytes(forward, known)
    # A plan also has x̂0 and its re-noised copy: three latents and the like.
    assert 0 <= predicted - live <= 5 * x.nbytes
    if not checkpointing:  # whose frames keep their inputs past the hooks
        assert saved == pytest.approx(live, rel=0.02, abs=3 * x.nbytes)


def test_a_gpu_stores_no_attention_probabilities(tiny_model):
    model = replace(describe(str(tiny_model)), size=24)
    on = {kind: Traces(model, Compute(kernels=kind)).steps(1).saved(2) for kind in ("gpu", "cpu")}
    layers, heads, tokens, keys = 2, 4, 144 + 13, 144 + 24
    probabilities = 2 * layers * heads * tokens * keys * 2
    # The last block's text asks nothing.
    assert on["cpu"] - on["gpu"] > 0.8 * probabilities


def test_memory_is_linear_in_the_batch_at_every_moment(tiny_model):
    traces = Traces(describe(str(tiny_model)), Compute(kernels="cpu"))
    timeline = traces.steps(2)
    assert timeline.saved(6) - timeline.saved(5) == timeline.saved(5) - timeline.saved(4) > 0
    learning = [p.numel() for i, p in enumerate(traces.net.parameters()) if i not in timeline.idle]
    assert timeline.gradients[-1] == sum(learning) * 2
    # The last block's text asks nothing: weight and bias of its query, and the norm of it, never learn.
    assert [n for i, n in enumerate(p.numel() for p in traces.net.parameters()) if i in timeline.idle] == [
        64 * 64, 64, 16
    ]  # fmt: skip
    assert traces.steps(2).saved(4) > 1.9 * traces.steps(1).saved(4)  # two forwards live at once


CHANGES = [
    {}, {"micro_batch": 1}, {"gradient_checkpointing": True}, {"gpus": 2}, {"gpus": 2, "parallel": "fsdp"},
    {"student_rank": 4, "fake_rank": 4, "student_alpha": 8.0, "fake_alpha": 8.0}, {"optimizer": "adamw8bit"},
    {"shared_forward": False}, {"weight_cdm": 0.0}, {"dtype": "bfloat16"},
]  # fmt: skip


@pytest.mark.parametrize("changes", CHANGES)
def test_parts_add_up_to_the_total(tiny_model, cache, changes):
    memory = Memory(tiny_setup(tiny_model, overhead=1000, fragmentation=0.1, **changes), cache)
    assert memory.total == sum(memory.parts.values())
    worst = sum(memory.phases[memory.worst].values())
    assert worst == max(sum(parts.values()) for parts in memory.phases.values())
    assert memory.total == sum(memory.persistent.values()) + worst + 1000 + round(0.1 * worst)
    assert all(value > 0 for value in memory.parts.values())


def test_every_saving_saves_what_it_is_for(tiny_model, cache):
    def parts(**changes):
        return Memory(tiny_setup(tiny_model, dtype="bfloat16", **changes), cache)

    plain, lora = parts(), parts(student_rank=4, fake_rank=4)
    assert lora.persistent["student: AdamW moments"] < plain.persistent["student: AdamW moments"] / 4
    assert (
        lora.persistent["teacher: weights"] == plain.persistent["teacher: weights"]
    )  # one base for all three
    eight = parts(optimizer="adamw8bit").persistent["student: AdamW moments"]
    assert eight < 0.6 * plain.persistent["student: AdamW moments"]
    sharded = parts(gpus=2, parallel="fsdp").persistent
    buffers = sum(buffer.nbytes for buffer in plain.plain.net.buffers())
    assert sharded["student: compute copies"] == buffers  # weights are gathered from the masters
    assert sharded["student: float32 masters"] == pytest.approx(
        plain.persistent["student: float32 masters"] / 2, rel=0.02
    )
    three, shared = parts(shared_forward=False), parts()
    asked = "student step: teachers asked"
    assert three.phases[asked]["activations"] == pytest.approx(
        1.5 * shared.phases[asked]["activations"], rel=0.02
    )
    kept = parts(gradient_checkpointing=True).phases[asked]["activations"]
    assert kept < 0.5 * shared.phases[asked]["activations"]


# time


def test_passes_are_those_of_the_loop():
    assert Passes.of(CDMConfig()) == Passes(7.75, 2, 4, 2)
    assert Passes.of(CDMConfig(truncated_rollout=False, shared_forward=False)) == Passes(14.5, 3, 4, 2)
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


def test_too_little_main_memory_or_disk_names_how_many_prompts_would_do(tiny_model, capsys):
    arguments = ["emoji-cdm", "--teacher", str(tiny_model), "--prompt-count", "1000000"]
    code, found = command([*arguments, "--ram", "1"], capsys)
    assert code == 1
    count = found["shortages"][0].split("at most ")[1].split()[0]
    code, found = command([*arguments[:-1], count, "--ram", "1"], capsys)
    assert (code, found["shortages"]) == (0, [])


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


def test_every_recipe_can_be_planned():
    of_training = {name for name, each in COMMANDS.items() if each.settings.startswith("training.recipes:")}
    assert of_training <= set(RECIPES)
    assert all(not teacher or teacher in plan_model.BUILT_IN for _, teacher in RECIPES.values())
    assert all(gpu.bfloat16 > gpu.float32 and math.isfinite(gpu.bandwidth) for gpu in GPUS.values())


def test_consistency_has_no_fake_teacher(tiny_model, capsys):
    code, found = command(["emoji-consistency", "--teacher", str(tiny_model)], capsys)
    assert code == 0
    assert not [name for name in found["parts_gb"] if "fake" in name]
