"""Consistency distillation: its derivative, its fixed point, its loop, and what it learns on the toy flow."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from engines.families.base import load_family
from tests.tiny_longcat import build_tiny_longcat
from tests.training.toy_flow import MEANS, PROMPTS, SPREAD, ToyFamily, sliced_wasserstein, true_samples
from training.config import ConsistencyConfig
from training.consistency import Consistency, consistency_loss, tangent, total_derivative
from training.cpu_kernels import cpu_kernels
from training.distill import ROLLOUT, distill
from training.draws import Draws
from training.embeddings import embed_in_memory
from training.errors import TrainingError
from training.parallel import Parallel
from training.prompts import Prompts
from training.roles import Roles
from training.run import Run
from training.sampling import sample, sample_renoise

CONFIG = ConsistencyConfig(
    n_max=8, guidance=1.0, steps=400, batch=128, lr_student=2e-3, warmup=20, tangent_warmup=100, ema_decay=0.98,
    dtype="float32",
)  # fmt: skip


def toy_work(**changes: Any) -> Consistency:
    config = CONFIG.model_copy(update=changes)
    family = ToyFamily()
    prompts = Prompts.of([(prompt, 1.0) for prompt in PROMPTS], "toy")
    table = embed_in_memory(family, prompts.texts, torch.float32)
    return Consistency(family, config, Roles(family.transformer, config), prompts, table)


def model_work(folder: Path, micro_batch: int = 0, pass_batch: int = 128, **changes: Any) -> Consistency:
    small = {
        "n_max": 3,
        "batch": 4,
        "lr_student": 1e-3,
        "dtype": "float32",
        "guidance": 3.0,
        "tangent_warmup": 2,
    }
    config = ConsistencyConfig(**{**small, **changes})
    family = load_family(folder)
    prompts = Prompts.of([("red apple", 1.0), ("apple", 1.0)], "test")
    table = embed_in_memory(family, prompts.texts, getattr(torch, config.dtype))
    roles = Roles(family.transformer, config)
    return Consistency(family, config, roles, prompts, table, pass_batch, micro_batch)


@pytest.fixture(scope="module")
def folders(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {"sd3": tiny_model, "longcat": build_tiny_longcat(tmp_path_factory.mktemp("longcat") / "tiny")}


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm() / b.norm())


def derivative_of(folder: Path, dtype: torch.dtype, step: float = 0.0) -> torch.Tensor:
    family = load_family(folder)
    net = torch.nn.Module.to(family.transformer, dtype)
    generator = torch.Generator().manual_seed(0)
    shape = (3, family.latent_channels, 8, 8)
    x, v = (torch.randn(shape, generator=generator) for _ in range(2))
    cond = {name: value.to(dtype) for name, value in family.encode(["red apple"] * 3).items()}
    with cpu_kernels():
        return total_derivative(
            lambda x, sigma: family.velocity(net, x, sigma, cond), x, torch.tensor([0.9, 0.5, 0.1]), v, step
        )


@pytest.mark.parametrize("name", ["sd3", "longcat"])
def test_the_exact_derivative_of_real_classes_equals_finite_differences(folders, name):
    exact = derivative_of(folders[name], torch.float32)
    assert exact.abs().max() > 0
    assert relative(derivative_of(folders[name], torch.float32, 1e-4), exact) < 1e-2


@pytest.mark.parametrize("name", ["sd3", "longcat"])
def test_in_bfloat16_only_the_exact_derivative_is_near_the_truth(folders, name):
    truth = derivative_of(folders[name], torch.float32)
    exact = relative(derivative_of(folders[name], torch.bfloat16).float(), truth)
    quotient = relative(derivative_of(folders[name], torch.bfloat16, 1e-4).float(), truth)
    assert exact < 0.1 < quotient


@pytest.mark.parametrize("sigma", [1.0, 0.7, 0.05])
def test_the_toys_derivative_equals_finite_differences(sigma):
    work = toy_work()
    torch.nn.init.normal_(work.roles.student.net.mlp[-1].weight, std=0.3)
    draws = Draws(0, 0, 0, range(16), work.device)
    x, v, cond = draws.normal((2, 1, 1)), draws.normal((2, 1, 1)), work.family.encode(["left"] * 16)
    at = torch.full((16,), sigma)

    def velocity(x, sigma):
        return work.family.velocity(work.roles.student.net, x, sigma, cond)

    exact, quotient = (total_derivative(velocity, x, at, v, step) for step in (0.0, 1e-3))
    assert relative(quotient, exact) < 1e-2


def test_a_known_consistency_function_has_no_tangent_and_no_gradient():
    """One Gaussian N(m, s²): (x − (1−σ)·m)/S_σ is kept along the ODE, S_σ² = (1−σ)²·s² + σ²."""
    work = toy_work()
    draws = Draws(0, 0, 0, range(64), work.device)
    x, sigma = draws.normal((2, 1, 1)), draws.uniform_between(0.1, 1.0)
    mean, cond = torch.tensor(MEANS["left"])[:, None, None], work.family.encode(["left"] * 64)
    v = work.teacher(x, sigma, cond)

    def answer(x, sigma):
        at = sigma[:, None, None, None]
        spread = ((1 - at) ** 2 * SPREAD**2 + at**2).sqrt()
        return (x - mean - SPREAD * (x - (1 - at) * mean) / spread) / at

    F = answer(x, sigma).requires_grad_()
    known = tangent(F.detach(), v, total_derivative(answer, x, sigma, v), sigma)
    assert known.abs().max() < 1e-4
    consistency_loss(F, known, 0.1)[0].backward()
    assert F.grad.abs().max() < 1e-5
    # The teacher itself, where distillation starts, is none.
    start = total_derivative(
        lambda x, s: work.family.velocity(work.roles.teacher.net, x, s, cond), x, sigma, v
    )
    assert tangent(v, v, start, sigma).abs().mean() > 0.1


def test_the_gradient_leads_against_the_normalised_tangent():
    F, g = torch.zeros(2, 1, 1, 2, requires_grad=True), torch.tensor([[3.0, 4.0], [0.0, 0.0]])[:, None, None]
    loss, info = consistency_loss(F, g, 0.5)
    loss.backward()
    norm = 5 / 2**0.5
    torch.testing.assert_close(F.grad, 2 / 4 * g / (norm + 0.5))
    assert info["tangent"] == pytest.approx(norm / 2)


def test_points_cover_all_times_and_lie_on_the_teachers_trajectories():
    work = toy_work(n_max=64)
    rows, found, errors = range(64), [], []
    mean = torch.tensor(MEANS["left"])[:, None, None]
    for step in range(30):
        cond, draws = work.family.encode(["left"] * 64), Draws(0, step, ROLLOUT, rows, work.device)
        time = work.schedule(step)
        assert (time[0], time[-1]) == (1, 0)
        assert (time.diff() < 0).all()
        x, sigma = work.points(time, cond, draws, step, rows)
        found.append(sigma)
        if len(time) > 40:
            draws = Draws(0, step, ROLLOUT, rows, work.device)
            draws.integers(len(time) - 1)
            noise, at = draws.normal((2, 1, 1)), sigma[:, None, None, None]
            exact = (1 - at) * mean + ((1 - at) ** 2 * SPREAD**2 + at**2).sqrt() * noise
            errors.append((x - exact).abs().mean())
    sigmas = torch.cat(found)
    assert sigmas.min() > 0
    assert sigmas.max() == 1
    assert (torch.histc(sigmas, 10, 0, 1) > 0.03 * len(sigmas)).all()
    assert errors
    assert max(errors) < 0.05


def test_the_shift_is_the_familys(tiny_model):
    work = model_work(tiny_model)
    torch.testing.assert_close(
        work.shifted(torch.linspace(1, 0, 5)), torch.tensor(work.family.sigmas(4)), rtol=0, atol=1e-5
    )


def test_iterations_log_and_depend_on_seed_and_step_alone(tiny_model):
    first = model_work(tiny_model).iterate(1)
    assert set(first) == {"loss", "tangent", "ratio", "student_norm", "x0_mean", "x0_std"}
    assert first["ratio"] == 0.5
    assert first == model_work(tiny_model).iterate(1)
    assert first != model_work(tiny_model).iterate(2) != model_work(tiny_model, seed=1).iterate(2)


@pytest.mark.parametrize("name", ["sd3", "longcat"])
def test_every_family_learns_in_bfloat16_with_recomputed_activations(folders, name):
    work = model_work(folders[name], dtype="bfloat16", batch=2)
    work.latent_shape = (work.family.latent_channels, 8, 8)  # LongCat's own is 128 × 128
    work.roles.student.net.enable_gradient_checkpointing()
    before = [value.detach().clone() for value in work.roles.student.mixed.parameters]
    with cpu_kernels():
        values = work.iterate(2)
    assert all(math.isfinite(value) for value in values.values())
    assert any(
        not torch.equal(a, b) for a, b in zip(before, work.roles.student.mixed.parameters, strict=True)
    )


def test_micro_batches_and_small_passes_learn_what_the_whole_batch_would(tiny_model):
    whole, divided = model_work(tiny_model), model_work(tiny_model, micro_batch=3, pass_batch=2)
    assert whole.iterate(3) == pytest.approx(divided.iterate(3), rel=1e-3, abs=1e-5)


def test_a_resumed_run_equals_an_uninterrupted_one_bit_for_bit(tiny_model, tmp_path):
    def run(folder: str, work: Consistency, most: int = 4) -> Consistency:
        def stop(done: int, values: dict[str, float]) -> None:
            if done == most:
                raise KeyboardInterrupt

        config = work.config.model_dump(mode="json")
        distill(
            work,
            Run(tmp_path / folder, config, 4, save_minutes=0),
            after=stop if most < 4 else lambda done, values: None,
        )
        return work

    whole = run("whole", model_work(tiny_model))
    with pytest.raises(KeyboardInterrupt):
        run("killed", model_work(tiny_model), most=2)
    resumed = run("killed", model_work(tiny_model))
    assert whole.roles.student.updates == resumed.roles.student.updates == 4
    for name, group in whole.roles.tensors().items():
        for key, value in resumed.roles.tensors()[name].items():
            assert torch.equal(value, group[key]), f"{name}/{key}"


def test_a_step_that_rounding_swallows_is_refused():
    with pytest.raises(ValidationError, match=r"tangent_step=0.0001 with dtype=bfloat16 .* at least 0.005"):
        ConsistencyConfig(tangent_step=1e-4)
    with pytest.raises(ValidationError, match="tangent_step"):
        ConsistencyConfig(tangent_step=0.5)
    assert ConsistencyConfig(tangent_step=1e-4, dtype="float32").tangent_step == 1e-4


def test_sharded_weights_have_no_exact_derivative():
    sharded = Parallel(torch.device("cpu"), world=2, fsdp=True)
    with pytest.raises(TrainingError, match="tangent_step=0"):
        Roles(torch.nn.Linear(2, 2), ConsistencyConfig(), sharded)


def error(family: ToyFamily, net: torch.nn.Module, steps: int, sampler=sample) -> float:
    family.transformer = net
    total = 0.0
    for prompt in PROMPTS:
        made = sampler(family, family.encode([prompt] * 1500), family.sigmas(steps), range(1500)).flatten(1)
        total += sliced_wasserstein(made, true_samples(prompt, 1500, seed=7)) / len(PROMPTS)
    return total


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Consistency:
    work = toy_work()
    folder = tmp_path_factory.mktemp("toy") / "run"
    distill(work, Run(folder, CONFIG.model_dump(mode="json"), CONFIG.steps, save_minutes=60))
    return work


def test_the_student_is_nearer_the_target_in_one_step_than_the_undistilled_sampler(trained):
    with trained.roles.averaged() as student:
        distilled = error(trained.family, student.net, 1)
    assert distilled < 0.4 * error(trained.family, trained.roles.teacher.net, 1)


def test_renoising_is_a_sampler_of_the_student_and_repeats_by_seed(trained):
    family = trained.family
    with trained.roles.averaged() as student:
        assert error(family, student.net, 2, sample_renoise) < 0.4 * error(
            family, trained.roles.teacher.net, 1
        )
        family.transformer = student.net
        cond, sigmas = family.encode(["left"] * 3), family.sigmas(4)
        made = sample_renoise(family, cond, sigmas, [3, 4, 3])
        one = sample(family, cond, family.sigmas(1), [3, 4, 3])
    torch.testing.assert_close(made[0], made[2])
    assert not torch.allclose(made[0], made[1])
    with trained.roles.averaged() as student:
        family.transformer = student.net
        torch.testing.assert_close(sample_renoise(family, cond, family.sigmas(1), [3, 4, 3]), one)
