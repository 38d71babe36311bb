"""`cdm-bench serve`: a short sweep over real server processes with the fake engine at given costs."""

from __future__ import annotations

import csv
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from benchmarks.cost_tables import FOLDER
from benchmarks.main import main
from benchmarks.server import Server

FAKE = ["--engine", "fake", "--fake-costs", str(FOLDER / "gpu-like.json")]
# More than two at a time can be served at: 2 / 55 ms. The queue takes no third, so some are refused on any machine.
SWEEP = [*FAKE, "--queue-limit", "2", "--rates", "60", "--rounds", "2", "--duration", "1", "--warmup", "0.5"]
VARIANTS = ("request", "step+auto")

Rows = list[dict[str, str]]


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that a sweep leaves, with its standard output in `stdout`."""
    folder = tmp_path_factory.mktemp("sweep")
    with pytest.MonkeyPatch.context() as patch:
        printed: list[str] = []
        patch.setattr("builtins.print", lambda *parts, **_: printed.append(" ".join(map(str, parts))))
        assert main(["serve", *SWEEP, "--variants", ",".join(VARIANTS), "--out", str(folder)]) == 0
    (folder / "stdout").write_text("\n".join(printed), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def requests(sweep: Path) -> Rows:
    with (sweep / "requests.csv").open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def result(sweep: Path) -> dict[str, Any]:
    document: dict[str, Any] = json.loads((sweep / "stdout").read_text(encoding="utf-8").splitlines()[-1])
    return document


def of(requests: Rows, **wanted: str) -> Rows:
    return [row for row in requests if all(row[name] == value for name, value in wanted.items())]


@pytest.mark.slow
def test_variants_get_the_same_trace_and_rounds_different_ones(requests: Rows) -> None:
    times = {
        (number, variant): [row["scheduled_s"] for row in of(requests, round=number, variant=variant)]
        for number in ("0", "1")
        for variant in VARIANTS
    }
    assert (
        times["0", "request"] == times["0", "step+auto"] != times["1", "request"] == times["1", "step+auto"]
    )
    assert times["0", "request"] == sorted(times["0", "request"], key=float)


@pytest.mark.slow
def test_order_of_variants_rotates(requests: Rows) -> None:
    order = list(dict.fromkeys((row["round"], row["variant"]) for row in requests))
    assert order == [("0", "request"), ("0", "step+auto"), ("1", "step+auto"), ("1", "request")]


@pytest.mark.slow
def test_every_request_is_counted_once_and_refusals_apart(requests: Rows, result: dict[str, Any]) -> None:
    assert [row["variant"] for row in result["rows"]] == list(VARIANTS)
    for row in result["rows"]:
        measured = of(requests, variant=row["variant"], warmup="0")
        counts = Counter(request["status"] for request in measured)
        assert row["offered"] == len(measured)
        assert (row["served"], row["refused"], row["failed"]) == (counts["served"], counts["refused"], 0)
        assert row["refused"] > 0
    assert {row["http_status"] for row in of(requests, status="refused")} == {"429"}
    assert {row["code"] for row in of(requests, status="refused")} <= {"queue_full", "deadline_infeasible"}
    assert {row["http_status"] for row in of(requests, status="served")} == {"200"}


@pytest.mark.slow
def test_warm_up_is_left_out_and_published(requests: Rows, result: dict[str, Any]) -> None:
    assert {row["warmup"] for row in requests if float(row["scheduled_s"]) < 0.5} == {"1"}
    assert {row["warmup"] for row in requests if float(row["scheduled_s"]) >= 0.5} == {"0"}
    for detail in result["details"]:
        assert detail["warmup"]["offered"] == len(of(requests, variant=detail["variant"], warmup="1"))


@pytest.mark.slow
def test_latency_counts_from_the_schedule_and_covers_the_servers_time(requests: Rows) -> None:
    for row in of(requests, status="served"):
        assert float(row["lag_ms"]) >= 0
        assert float(row["latency_ms"]) >= float(row["server_total_ms"]) + float(row["lag_ms"]) - 0.01
        assert float(row["denoise_ms"]) >= 12 * int(row["steps_run"])  # the table's step of one picture


@pytest.mark.slow
def test_elastic_variant_asks_for_auto_with_the_first_slo(requests: Rows) -> None:
    assert {(row["steps_asked"], row["deadline_ms"]) for row in of(requests, variant="request")} == {
        ("4", "")
    }
    assert {(row["steps_asked"], row["deadline_ms"]) for row in of(requests, variant="step+auto")} == {
        ("auto", "250")
    }


@pytest.mark.slow
def test_goodput_has_three_slos_one_of_them_twice_the_unloaded_median(result: dict[str, Any]) -> None:
    slos = [name for name in result["rows"][0] if name.startswith("≤")]
    assert len(slos) == 3
    twice = {f"≤{2 * value:.0f} ms /s" for value in result["unloaded_p50_ms"].values()}
    assert set(result["unloaded_p50_ms"]) == {"request", "step"}
    low, high = sorted(int(name[1:].split()[0]) for name in twice) if len(twice) == 2 else (0, 10**6)
    assert any(low <= int(name[1:].split()[0]) <= high for name in set(slos) - {"≤250 ms /s", "≤1000 ms /s"})


@pytest.mark.slow
def test_batches_come_from_the_servers_counters(result: dict[str, Any]) -> None:
    for row, detail in zip(result["rows"], result["details"], strict=True):
        assert set(detail["batches"]) <= {"1", "2"}  # the queue takes no third picture
        assert 1 <= row["batch"] <= 2
        assert len(detail["by_round"]) == 2


@pytest.mark.slow
def test_files_are_left_for_whoever_doubts(sweep: Path, result: dict[str, Any]) -> None:
    assert json.loads((sweep / "serve.json").read_text(encoding="utf-8"))["rows"] == result["rows"]
    for name in ("goodput", "latency", "steps"):
        assert (sweep / f"{name}.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--url", "http://127.0.0.1:9"], "--variants=none is a policy that a server is started with"),
        (["--url", "http://127.0.0.1:9", "--max-batch", "4"], "--max-batch=4 is for servers to be started"),
        (["--url", "http://127.0.0.1:9", "--engine", "fake"], "--engine=fake is for servers to be started"),
        (["--url", "http://127.0.0.1:9", "--variants", "step"], "http://127.0.0.1:9/info is not answered"),
        (["--engine", "abacus", "--variants", "step"], "abacus"),
    ],
)
def test_mistakes_are_told_in_a_sentence(
    flags: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["serve", *flags, "--out", str(tmp_path)]) == 2
    assert message in capsys.readouterr().err


def test_running_server_is_driven_where_it_is_and_asked_only_for_what_it_offers(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    short = ["--variants", "step", "--rates", "10", "--rounds", "1", "--duration", "1", "--warmup", "0"]
    with Server([*FAKE, "--log-level", "warning"]) as server:
        target = ["serve", "--url", server.url, "--out", str(tmp_path), *short]
        assert main([*target, "--steps", "999"]) == 2
        assert "steps=999 is not offered by" in capsys.readouterr().err
        assert main([*target, "--sizes", "48x48"]) == 2
        assert "there are no pictures of 48x48 here; allowed: 128x128" in capsys.readouterr().err
        assert main([*target, "--steps", "1,2"]) == 0
    [row] = json.loads(capsys.readouterr().out.splitlines()[-1])["rows"]
    assert row["offered"] == row["served"]
    assert 1 <= row["steps"] <= 2
