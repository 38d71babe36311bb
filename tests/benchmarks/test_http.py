"""`cdm-bench http` and `cdm-bench coldstart`, run against a real server process with the fake engine."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from benchmarks.http import ENGINE_STAGES, HttpBenchSettings, Sample, measure, parse_server_timing
from benchmarks.main import main
from benchmarks.report import percentiles, table
from benchmarks.server import Server, ServerError


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with Server(["--engine", "fake"]) as server:
        yield server


def test_overhead_is_what_the_engine_did_not_take(server: Server) -> None:
    settings = HttpBenchSettings(requests=3, warmup=2, steps=2)
    with httpx.Client(base_url=server.url, trust_env=False) as client:
        samples = measure(client, settings)
    assert len(samples) == 3
    for sample in samples:
        assert sample.overhead == pytest.approx(
            sample.wall - sum(sample.stages[name] for name in ENGINE_STAGES)
        )
        assert 0 < sample.engine < sample.stages["total"] < sample.wall


def test_overhead_never_counts_queueing_as_engine() -> None:
    stages = {"queue": 100.0, "encode": 1.0, "denoise": 2.0, "decode": 3.0, "total": 110.0}
    assert Sample(111.0, stages).overhead == 105.0


def test_a_header_without_the_engines_stages_is_refused() -> None:
    with pytest.raises(ServerError, match="lacks encode, decode"):
        parse_server_timing("denoise;dur=1.5, total;dur=2")


def test_a_refused_request_is_told_in_the_servers_words(
    server: Server, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["http", "--url", server.url, "--steps", "999"]) == 2
    assert "steps=999 is not offered" in capsys.readouterr().err


def test_a_server_that_cannot_start_is_told_in_its_words(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["http", "--bundle", "no-such-folder"]) == 2
    assert "no-such-folder is not a bundle" in capsys.readouterr().err


def test_http_prints_a_table_then_one_json_line(server: Server, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["http", "--url", server.url, "--requests", "2", "--warmup", "0"]) == 0
    *rows, line = capsys.readouterr().out.splitlines()
    assert rows[0].startswith("| part, ms")
    result = json.loads(line)
    assert [row["part, ms"] for row in result["rows"][:3]] == ["wall", "engine", "overhead"]
    assert result["engine"]["runtime"] == "fake"
    assert all(row["n"] == 2 for row in result["rows"])


def test_coldstart_makes_a_picture_per_run_and_cache(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["coldstart", "--engine", "fake", "--runs", "1"]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert [row["first picture, s"] for row in result["rows"]] == ["cold cache", "warm cache"]
    assert all(row["p50"] > 0 for row in result["rows"])


def test_the_servers_settings_are_its_flags_alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CDM_SERVE_BUNDLE", str(tmp_path))
    with Server(["--engine", "fake"]) as server:
        assert json.loads(server.fetch("/info"))["engine"]["runtime"] == "fake"


def test_percentiles_of_one_value_are_that_value() -> None:
    assert percentiles([2.5]) == {"p50": 2.5, "p95": 2.5, "n": 1}


def test_a_table_has_every_rows_columns() -> None:
    assert table([{"a": 1}, {"b": 2.0}]).splitlines() == [
        "| a | b    |",
        "| - | ---- |",
        "| 1 |      |",
        "|   | 2.00 |",
    ]
