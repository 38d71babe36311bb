"""Laws of the planner: what can be counted exactly is, what it advises holds, and nothing is loaded."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from benchmarks.plan_saved import live_bytes, saved_bytes
from tests.tiny_longcat import build_tiny_longcat
from tests.training.plan_cases import bytes_of, tiny_setup
from tests.training.tiny_distillation import tiny_distillation
from training.cpu_kernels import cpu_kernels
from training.errors import TrainingError
from training.plan_memory import Memory
from training.plan_model import BUILT_IN, describe
from training.plan_trace import Compute, Traces
from training.requirements import stored_numbers


@pytest.fixture(scope="module")
def cache() -> dict:
    """Traces, which setups of one model share."""
    return {}


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
    for part in ("student: compute copies", "student: float32 masters", "student: average (EMA)"):
        assert sharded[part] == pytest.approx(plain.persistent[part] / 2, rel=0.05), part
    three, shared = parts(shared_forward=False), parts()
    asked = "student step: teachers asked"
    assert three.phases[asked]["activations"] == pytest.approx(
        1.5 * shared.phases[asked]["activations"], rel=0.02
    )
    kept = parts(gradient_checkpointing=True).phases[asked]["activations"]
    assert kept < 0.5 * shared.phases[asked]["activations"]
