"""`cdm-bench http` and `cdm-bench coldstart`, run against a real server process with the fake engine."""

from __future__ import annotations

import asyncio
import base64
import io
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from fastapi.testclient import TestClient
from PIL import Image

from benchmarks.bare import create_app
from benchmarks.main import main
from benchmarks.overhead import Sample, measure, parse_server_timing, row
from benchmarks.report import percentiles, table
from benchmarks.server import Server, ServerError
from cdm_serve.images import encode_image
from engines.bundle import Bundle


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with Server(["--engine", "fake"]) as server:
        yield server


def timed(wall: float, **stages: float) -> Sample:
    told = {"queue": 0.0, "others": 0.0, "encode": 1.0, "denoise": 2.0, "decode": 3.0, "image_encode": 1.5}
    return Sample(wall, told | stages)


def test_overhead_is_what_the_engine_is_not_answerable_for() -> None:
    assert timed(10.0).engine == 6.0
    assert timed(10.0).overhead == 4.0
    assert timed(110.0, queue=100.0, others=100.0).overhead == 4.0  # the engine had others
    paused = timed(
        110.0, queue=101.0, others=100.0
    )  # the engine did nothing for a millisecond of its waiting
    assert (paused.overhead, paused.without_waiting) == (4.0, 3.0)


def test_a_row_has_the_medians_and_image_encoding_apart() -> None:
    made = row([timed(10.0), timed(11.0), timed(20.0, image_encode=9.0)])
    assert (made["wall"], made["overhead"], made["overhead p95"], made["n"]) == (11.0, 5.0, None, 3)
    assert made["of it image_encode"] == 1.5
    assert made["without image_encode"] == 3.5  # of 2.5, 3.5 and 5
    assert row([timed(10.0 + i) for i in range(21)])["overhead p95"] == 23.0


@pytest.mark.parametrize("concurrency", [1, 3])
def test_real_servers_times_contain_each_other(server: Server, concurrency: int) -> None:
    address = ("127.0.0.1", server.port)
    samples = asyncio.run(measure(address, {"steps": 2}, concurrency, warmup=2, requests=4))
    assert len(samples) == 4
    for sample in samples:
        assert 0 < sample.engine < sample.stages["total"] < sample.wall
        assert 0 < sample.overhead < sample.wall


@pytest.mark.parametrize("flags", [["--engine", "fake"], ["--bundle", "a-folder"]])
def test_running_server_cannot_be_given_an_engine(
    flags: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["http", "--url", "http://127.0.0.1:9", *flags]) == 2
    error = capsys.readouterr().err
    assert "=".join(flags) in error
    assert "--url=http://127.0.0.1:9" in error
    assert "leave one of them out" in error


def test_a_header_without_the_engines_stages_is_refused() -> None:
    with pytest.raises(ServerError, match="lacks encode, decode, others"):
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
    flags = ["--requests", "20", "--warmup", "0", "--concurrency", "1,2"]
    assert main(["http", "--url", server.url, *flags]) == 0
    *lines, line = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("| p50, ms")
    result = json.loads(line)
    assert [(entry["concurrency"], entry["n"]) for entry in result["rows"]] == [(1, 20), (2, 20)]
    assert result["served"][0]["engine"]["runtime"] == "fake"
    assert result["surface"] == []


@pytest.mark.slow
def test_surface_is_compared_with_bare_routes_of_the_same_bytes(capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--engine", "fake", "--concurrency", "2", "--requests", "2", "--warmup", "0"]
    assert main(["http", *flags, "--format", "jpeg", "--rounds", "2", "--round-s", "0.1"]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    names = [entry["surface"] for entry in result["surface"]]
    assert names == ["bare", "bare, encoding", "cdm-serve, prepared", "cdm-serve, fake"]
    for entry in result["surface"]:
        assert entry["requests/s"] > 0
        assert entry["of bare"] == pytest.approx(
            entry["requests/s"] / result["surface"][0]["requests/s"], abs=0.01
        )
        assert entry["rounds"] == 2


def test_bare_routes_answer_with_the_same_bytes(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (16, 16, 3), np.uint8)
    data = encode_image(pixels, "png", {"prompt": "red apple", "seed": 1})
    (tmp_path / "a.png").write_bytes(data)
    with TestClient(create_app(tmp_path / "a.png")) as client:
        for path in ("/generate", "/encode"):
            response = client.post(path, json={"prompt": "red apple"})
            assert (response.content, response.headers["content-type"]) == (data, "image/png")
            assert client.post(path, json={"prompt": 1}).status_code == 422


def test_the_prepared_engine_makes_no_call_of_the_fake_one() -> None:
    with Server(["--engine", "fake"], module="benchmarks.prepared") as server:
        ask = [{"prompt": "red apple", "seed": seed, "response_format": "json"} for seed in (1, 2)]
        first, second = (json.loads(server.fetch("/generate", json.dumps(body).encode())) for body in ask)
    pixels = [
        Image.open(io.BytesIO(base64.b64decode(made["images"][0]["b64_json"]))) for made in (first, second)
    ]
    assert pixels[0].size == (first["width"], first["height"])
    assert pixels[0].tobytes() == pixels[1].tobytes()  # whatever the seed: nothing is painted


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
