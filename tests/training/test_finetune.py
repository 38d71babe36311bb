"""Laws of fine-tuning by flow matching, on the real classes with random weights."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from engines.families.base import load_family
from tests.training.test_distill import interrupted, log_lines
from tests.training.test_pictures import GOOD, build
from tests.training.tiny_tuning import tiny_finetune
from training.errors import TrainingError
from training.main import main
from training.merge import with_lora
from training.rollout import family_shift

SMALL = ("--steps", "3", "--batch", "2", "--warmup", "1", "--lr-student", "0.01", "--sample-every", "0")


def test_the_loss_on_the_data_falls(tiny_model):
    work = tiny_finetune(tiny_model, steps=40, lr_student=3e-3, caption_dropout=0)

    def loss() -> float:
        with torch.no_grad():
            return float(
                np.mean([work.loss(1000 + n, range(4), np.array([0, 1, 2, 0])).item() for n in range(8)])
            )

    before = loss()
    for step in range(40):
        work.iterate(step)
    assert loss() < 0.8 * before


def test_the_loss_is_that_of_flow_matching_with_logit_normal_shifted_times(tiny_model):
    from training.draws import Draws
    from training.finetune import LEARN

    work = tiny_finetune(tiny_model, caption_dropout=0)
    draws = Draws(0, 7, LEARN, [0, 1], work.device)
    u = draws.normal(())
    draws.uniform()
    eps = draws.normal(work.latents_NCHW.shape[1:])
    s = torch.sigmoid(u)
    sigma = 3 * s / (1 + 2 * s)  # the tiny model's shift is 3
    x0 = work.latents_NCHW[[2, 0]]
    at = sigma[:, None, None, None]
    v = work.family.velocity(
        work.roles.student.net, (1 - at) * x0 + at * eps, sigma, work.table.rows(np.array([2, 0]))
    )
    expected = (v - (eps - x0)).square().mean().item()
    assert work.loss(7, [0, 1], np.array([2, 0])).item() == pytest.approx(expected, rel=1e-5)


def test_the_shift_is_the_familys(tiny_model):
    assert family_shift(load_family(tiny_model)) == pytest.approx(3.0, rel=1e-5)


def test_dropped_captions_are_the_empty_prompt(tiny_model):
    work = tiny_finetune(tiny_model)
    cond = work.conditioning(np.array([1, 2]), torch.tensor([True, False]))
    captions, empty = work.table.rows(np.array([1, 2])), work.table.empty
    for name, value in cond.items():
        assert torch.equal(value[0], empty[name][0])
        assert torch.equal(value[1], captions[name][1])


def test_micro_batches_learn_what_the_whole_batch_would(tiny_model):
    whole, divided = tiny_finetune(tiny_model), tiny_finetune(tiny_model, micro_batch=3)
    assert whole.iterate(0) == pytest.approx(divided.iterate(0), rel=1e-4)


def test_a_killed_and_resumed_run_equals_an_uninterrupted_one_bit_for_bit(tiny_model, tmp_path):
    whole = tiny_finetune(tiny_model)
    interrupted(whole, tmp_path / "whole")
    killed = tiny_finetune(tiny_model)
    loss = killed.loss

    def dying(step, *arguments):
        if step == 3:
            raise KeyboardInterrupt
        return loss(step, *arguments)

    killed.loss = dying
    with pytest.raises(KeyboardInterrupt):
        interrupted(killed, tmp_path / "killed")
    resumed = tiny_finetune(tiny_model)
    interrupted(resumed, tmp_path / "killed")
    assert log_lines(tmp_path / "killed") == log_lines(tmp_path / "whole")
    for name, value in whole.roles.student_weights().items():
        assert torch.equal(value, resumed.roles.student_weights()[name]), name


def test_the_command_writes_a_model_that_any_recipe_distils(tiny_model, tmp_path):
    pictures, out = build(tmp_path / "p", GOOD), tmp_path / "run"
    common = ["--embeddings", str(tmp_path / "embeddings"), "--tracker", "none"]
    given = [
        "finetune",
        "--teacher",
        str(tiny_model),
        "--pictures",
        str(pictures),
        "--out",
        str(out),
        *SMALL,
        *common,
    ]
    assert main(given) == 0
    a, b = (
        dict(load_family(folder).transformer.named_parameters()) for folder in (out / "model", tiny_model)
    )
    assert any(not torch.equal(a[name], b[name]) for name in a)
    assert json.loads((out / "model" / "provenance.json").read_text())["recipe"] == "finetune"
    text = tmp_path / "prompts.txt"
    text.write_text("red apple\ngreen apple\n")
    distil = [
        "emoji-cdm",
        "--teacher",
        str(out / "model"),
        "--prompts",
        str(text),
        "--out",
        str(tmp_path / "cdm"),
    ]
    assert main([*distil, *SMALL, *common, "--n-max", "2"]) == 0
    assert (tmp_path / "cdm" / "student" / "model_index.json").is_file()


def test_a_score_is_refused_at_once_for_there_is_no_teacher_to_near(tiny_model, tmp_path, capsys):
    pictures = build(tmp_path / "p", GOOD)
    given = [
        "finetune",
        "--teacher",
        str(tiny_model),
        "--pictures",
        str(pictures),
        "--out",
        str(tmp_path / "run"),
    ]
    assert main([*given, *SMALL, "--score-every", "2"]) == 2
    assert "--score-every=2 compares a few-step student with its teacher" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_its_grid_is_guided_and_its_report_has_the_models_record(tiny_model, tmp_path):
    pictures, out = build(tmp_path / "p", GOOD), tmp_path / "run"
    given = ["finetune", "--teacher", str(tiny_model), "--pictures", str(pictures), "--out", str(out), *SMALL]
    more = ["--embeddings", str(tmp_path / "e"), "--tracker", "none", "--sample-every", "1"]
    assert main([*given, *more]) == 0
    assert json.loads((out / "samples" / "prompts.json").read_text())["rows_are_steps"] == [28]
    provenance = json.loads((out / "model" / "provenance.json").read_text())
    page = (out / "report.html").read_text()
    assert provenance["config_sha256"][:12] in page
    assert str(pictures) in page


def test_other_pictures_are_another_run(tiny_model, tmp_path, capsys):
    pictures = build(tmp_path / "p", GOOD)
    given = [
        "finetune", "--teacher", str(tiny_model), "--pictures", str(pictures), "--out", str(tmp_path / "run"), *SMALL,
        "--embeddings", str(tmp_path / "embeddings"), "--tracker", "none",
    ]  # fmt: skip
    assert main(given) == 0
    (pictures / "a.png").write_bytes((pictures / "b.png").read_bytes())
    assert main([*given, "--steps", "4"]) == 2
    assert "pictures_sha256" in capsys.readouterr().err


def test_a_lora_of_pictures_is_merged_into_the_teacher_that_is_distilled(tiny_model, tmp_path):
    pictures, out = build(tmp_path / "p", GOOD), tmp_path / "run"
    common = ["--embeddings", str(tmp_path / "embeddings"), "--tracker", "none"]
    given = [
        "finetune",
        "--teacher",
        str(tiny_model),
        "--pictures",
        str(pictures),
        "--out",
        str(out),
        *SMALL,
        *common,
    ]
    assert main([*given, "--student-rank", "4", "--student-alpha", "8"]) == 0
    merged = with_lora(tiny_model, out / "adapter", tmp_path / "merged")
    a, b = (dict(load_family(folder).transformer.named_parameters()) for folder in (out / "model", merged))
    for name, value in a.items():
        torch.testing.assert_close(value, b[name], rtol=0, atol=1e-6)
    text = tmp_path / "prompts.txt"
    text.write_text("red apple\ngreen apple\n")
    distil = [
        "emoji-cdm",
        "--teacher",
        str(tiny_model),
        "--teacher-lora",
        str(out / "adapter"),
        "--n-max",
        "2",
    ]
    assert main([*distil, "--prompts", str(text), "--out", str(tmp_path / "cdm"), *SMALL, *common]) == 0
    kept = dict(load_family(tmp_path / "cdm" / "teacher").transformer.named_parameters())
    assert all(torch.equal(value, kept[name]) for name, value in b.items())


def test_a_lora_of_another_base_is_refused(tiny_model, tmp_path):
    from tests.tiny_sd3 import build_tiny_sd3

    out = tmp_path / "run"
    given = ["finetune", "--teacher", str(tiny_model), "--pictures", str(build(tmp_path / "p", GOOD)), *SMALL]
    rest = [
        "--out",
        str(out),
        "--student-rank",
        "2",
        "--embeddings",
        str(tmp_path / "e"),
        "--tracker",
        "none",
    ]
    assert main([*given, *rest]) == 0
    with pytest.raises(TrainingError, match="LoRA of another base"):
        with_lora(build_tiny_sd3(tmp_path / "other", seed=3), out / "adapter", tmp_path / "merged")
