"""`cdm-bench http` and `cdm-bench coldstart`, run against a real server process with the fake engine."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from benchmarks.http import HttpBenchSettings, Sample, measure, parse_server_timing, rows
from benchmarks.main import main
from benchmarks.report import percentiles, table
from benchmarks.server import Server, ServerError
from engines.bundle import Bundle


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with Server(["--engine", "fake"]) as server:
        yield server


def test_wall_engine_and_overhead_are_those_of_a_server_of_known_times(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    walls = [500.0, 12.0, 20.0]  # ms per request; the first is the warm-up
    clock, seeds = [0.0], []

    def answer(request: httpx.Request) -> httpx.Response:
        clock[0] += walls[len(seeds)] / 1e3
        seeds.append(json.loads(request.content)["seed"])
        timing = f"queue;dur=1.5, encode;dur=2, denoise;dur={len(seeds)}, decode;dur=3.25, total;dur=11"
        return httpx.Response(200, headers={"content-type": "image/png", "server-timing": timing})

    monkeypatch.setattr("benchmarks.http.time.perf_counter", lambda: clock[0])
    with httpx.Client(base_url="http://known", transport=httpx.MockTransport(answer)) as client:
        samples = measure(client, HttpBenchSettings(requests=2, warmup=1))
    assert seeds == [0, 1, 2]
    assert [sample.wall for sample in samples] == pytest.approx([12.0, 20.0])
    assert [sample.engine for sample in samples] == [7.25, 8.25]
    assert [sample.overhead for sample in samples] == pytest.approx([4.75, 11.75])
    medians = {row["part, ms"]: row["p50"] for row in rows(samples)}
    assert medians["overhead"] == pytest.approx(8.25)
    assert medians["stage queue"] == 1.5


def test_real_servers_times_contain_each_other(server: Server) -> None:
    with httpx.Client(base_url=server.url, trust_env=False) as client:
        samples = measure(client, HttpBenchSettings(requests=3, warmup=2, steps=2))
    assert len(samples) == 3
    for sample in samples:
        assert 0 < sample.engine < sample.stages["total"] < sample.wall


@pytest.mark.parametrize("flags", [["--engine", "fake"], ["--bundle", "a-folder"]])
def test_running_server_cannot_be_given_an_engine(
    flags: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["http", "--url", "http://127.0.0.1:9", *flags]) == 2
    error = capsys.readouterr().err
    assert "=".join(flags) in error
    assert "--url=http://127.0.0.1:9" in error
    assert "leave one of them out" in error


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
    *lines, line = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("| part, ms")
    result = json.loads(line)
    assert [row["part, ms"] for row in result["rows"][:3]] == ["wall", "engine", "overhead"]
    assert result["engine"]["runtime"] == "fake"
    assert all(row["n"] == 2 for row in result["rows"])


def test_coldstart_makes_a_picture_per_run(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["coldstart", "--engine", "fake", "--runs", "1"]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert [row["first picture, s"] for row in result["rows"]] == ["no cache"]
    assert all(row["p50"] > 0 for row in result["rows"])


def test_coldstart_starts_cold_then_warm_where_models_are_kept(
    tiny_bundle: Bundle, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--engine", "openvino", "--bundle", str(tiny_bundle.root), "--runs", "1"]
    assert main(["coldstart", *flags]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert [row["first picture, s"] for row in result["rows"]] == ["cold cache", "warm cache"]


def test_the_servers_settings_are_its_flags_alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CDM_SERVE_BUNDLE", str(tmp_path))
    with Server(["--engine", "fake"]) as server:
        assert json.loads(server.fetch("/info"))["engine"]["runtime"] == "fake"


def test_percentiles_need_enough_values() -> None:
    assert percentiles([2.5]) == {"p50": 2.5, "p95": None, "n": 1}
    assert percentiles([1.0] * 19)["p95"] is None
    assert percentiles([float(i) for i in range(101)]) == {"p50": 50.0, "p95": 95.0, "n": 101}


def test_a_table_has_every_rows_columns() -> None:
    assert table([{"a": 1, "b": None}, {"b": 2.0}]).splitlines() == [
        "| a | b    |",
        "| - | ---- |",
        "| 1 |      |",
        "|   | 2.00 |",
    ]
