"""Laws of the watchdog: silent on healthy runs, in words on failing ones, and the same after a resume."""

from __future__ import annotations

import json
import re
from functools import cache

import pytest
import torch

from tests.training.toy_flow import PROMPTS, ToyFamily
from training.config import CDMConfig
from training.distill import Distillation
from training.embeddings import embed_in_memory
from training.prompts import Prompts
from training.roles import Roles
from training.watchdog import Verdict, Watchdog, WatchdogConfig

HEALTHY = {"n_max": 8, "guidance": 0.0, "steps": 300, "batch": 128, "lr_student": 2e-3, "lr_fake": 4e-3,
           "warmup": 20, "ema_decay": 0.98, "dtype": "float32"}  # fmt: skip


@cache
def toy_log(**changes: float) -> list[dict[str, float]]:
    """Logged values of a run on the toy flow."""
    config = CDMConfig(**{**HEALTHY, **changes})
    family = ToyFamily()
    prompts = Prompts.of([(prompt, 1.0) for prompt in PROMPTS], "toy")
    table = embed_in_memory(family, prompts.texts, torch.float32)
    work = Distillation(family, config, Roles(family.transformer, config), prompts, table)
    return [dict(work.iterate(step)) for step in range(config.steps)]


def verdicts(log: list[dict[str, float]], watchdog: Watchdog | None = None, start: int = 0) -> list[Verdict]:
    watchdog = watchdog or Watchdog(WatchdogConfig())
    return [watchdog.observe(start + at, values) for at, values in enumerate(log)]


HELD_OUT = range(11, 16)
"""Seeds that no limit was tuned with."""
SHORT = {"steps": 140, "batch": 64}


@pytest.mark.slow
@pytest.mark.parametrize("seed", HELD_OUT)
def test_healthy_runs_of_other_seeds_are_left_alone(seed):
    assert [v.diagnosis for v in verdicts(toy_log(seed=seed, **SHORT)) if v.level != "ok"] == []


@pytest.mark.slow
@pytest.mark.parametrize("seed", HELD_OUT)
@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"lr_student": 0.04}, "lr_student"),
        ({"guidance": 60.0}, "guidance"),
        ({"lr_fake": 1e-9}, "dm_gap is .*raise lr_fake"),
    ],
)
def test_broken_runs_of_other_seeds_are_all_found(seed, changes, words):
    said = [v.diagnosis for v in verdicts(toy_log(seed=seed, **SHORT, **changes)) if v.level != "ok"]
    assert any(re.search(words, text) for text in said), said


def test_latents_that_are_wrong_from_the_first_step_are_seen_against_the_teachers():
    wide, narrow = flat(80, x0_std=3.0, teacher_std=1.0), flat(80, x0_std=0.3, teacher_std=1.0)
    for log, word in ((wide, "wider"), (narrow, "narrower")):
        stopped = [v for v in verdicts(log) if v.level == "stop"]
        assert stopped
        assert f"{word} than the teacher's" in stopped[0].diagnosis
    assert {v.level for v in verdicts(flat(80, x0_std=1.3, teacher_std=1.0))} == {"ok"}


def flat(count: int, **values: float) -> list[dict[str, float]]:
    return [dict(values) for _ in range(count)]


def test_a_healthy_toy_run_is_left_alone():
    said = [verdict for verdict in verdicts(toy_log()) if verdict.level != "ok"]
    assert said == []


@pytest.mark.parametrize("changes", [{"lr_student": 0.04}, {"guidance": 60.0}])
def test_a_failing_toy_run_is_stopped_with_a_diagnosis(changes):
    stopped = [verdict for verdict in verdicts(toy_log(**changes)) if verdict.level == "stop"]
    assert stopped
    assert "lr_student" in stopped[0].diagnosis
    assert "limit" in stopped[0].diagnosis


@pytest.mark.parametrize(
    ("name", "before", "after", "words"),
    [
        ("x0_std", 1.0, 0.2, "collapse"),
        ("x0_std", 1.0, 3.0, "saturate"),
        ("fake", 0.2, 3.0, "fake teacher does not follow"),
        ("ca", 2.0, 90.0, "lower guidance"),
        ("student_norm", 1.0, 90.0, "erratic"),
    ],
)
def test_each_signal_stops_with_its_own_words_and_not_before_its_patience(name, before, after, words):
    log = flat(60, **{name: before}) + flat(200, **{name: after})
    levels = [verdict.level for verdict in verdicts(log)]
    assert levels[:60] == ["ok"] * 60
    assert levels.index("stop") >= 60 + WatchdogConfig().watchdog_patience
    assert words in verdicts(log)[levels.index("stop")].diagnosis


def test_an_episode_warns_once_and_says_when_it_is_over():
    config = WatchdogConfig(watchdog_smoothing=0.5)
    log = flat(60, ca=2.0) + flat(40, ca=8.0) + flat(40, ca=2.0)
    said = [v for v in verdicts(log, Watchdog(config)) if v.level != "ok"]
    assert [verdict.level for verdict in said] == ["warn", "warn"]
    assert "within its limits again" in said[1].diagnosis


def test_a_resumed_watchdog_judges_as_an_uninterrupted_one():
    log = toy_log(guidance=60.0)
    first, second = Watchdog(WatchdogConfig()), Watchdog(WatchdogConfig())
    before = verdicts(log[:130], first)
    second.restore(json.loads(json.dumps(first.counters())))
    assert before + verdicts(log[130:], second, 130) == verdicts(log)


def test_what_it_may_do_is_a_setting():
    log = flat(60, ca=2.0) + flat(200, ca=90.0)
    for allowed, expected in (("off", {"ok"}), ("warn", {"ok", "warn"}), ("stop", {"ok", "warn", "stop"})):
        assert {v.level for v in verdicts(log, Watchdog(WatchdogConfig(watchdog=allowed)))} == expected


def test_a_value_that_is_not_finite_stops_at_once():
    assert Watchdog(WatchdogConfig()).observe(0, {"fake": float("nan")}).level == "stop"
