"""`cdm-bench edges`: a row per policy and queue length."""

from __future__ import annotations

import json

import pytest

from benchmarks.main import main


def test_every_policy_is_timed_at_every_length(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["edges", "--waiting", "2,16", "--calls", "50"]) == 0
    rows = json.loads(capsys.readouterr().out.splitlines()[-1])["rows"]
    assert [(row["policy"], row["waiting"]) for row in rows] == [
        (policy, waiting) for waiting in (2, 16) for policy in ("request", "step, fixed", "step, auto")
    ]
    assert all(0 < row["p50 µs"] <= row["p99 µs"] for row in rows)
