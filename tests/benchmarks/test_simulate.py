"""`cdm-bench simulate`, and where its costs come from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.arrivals import Arrival
from benchmarks.cost_tables import (
    FOLDER,
    built_in,
    cost_model,
    costs_in,
    costs_of_server,
    find_costs,
    save_costs,
)
from benchmarks.load import VARIANTS
from benchmarks.main import main
from benchmarks.plots import plot_sweep
from benchmarks.server import Server, ServerError
from cdm_serve.costs import TEXT
from engines.call_costs import read_cost_table
from tests.benchmarks.traces import write_trace

SHORT = ["--duration", "3", "--warmup", "1"]


def simulated(capsys: pytest.CaptureFixture[str], *flags: str) -> dict[str, Any]:
    rates = [] if "--rates" in flags else ["--rates", "0.5x,1.5x"]
    assert main(["simulate", *SHORT, *rates, *flags]) == 0
    *lines, line = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("| variant")
    result: dict[str, Any] = json.loads(line)
    assert len(lines) == 2 + len(result["rows"])
    return result


def test_every_variant_gets_the_same_pictures(capsys: pytest.CaptureFixture[str]) -> None:
    result = simulated(capsys)
    assert [row["variant"] for row in result["rows"]] == [*VARIANTS] * 2
    for rate in {row["rate /s"] for row in result["rows"]}:
        rows = [row for row in result["rows"] if row["rate /s"] == rate]
        assert len({row["offered"] for row in rows}) == 1
        assert all(row["served"] + row["refused"] + row["failed"] == row["offered"] for row in rows)
    assert all(row["steps"] == 4.0 for row in result["rows"] if row["variant"] != "step+auto")
    assert min(row["steps"] for row in result["rows"]) < 4.0  # past saturation pictures are shortened
    assert all(0 < row["utilisation"] <= 1 for row in result["rows"])
    assert "network" in result["not_simulated"]
    assert result["costs"]["source"].startswith("given, not measured")


def test_equal_seeds_give_equal_figures_in_any_number_of_processes(
    capsys: pytest.CaptureFixture[str],
) -> None:
    flags = [
        "--replicas",
        "2",
        "--router",
        "two",
        "--jitter",
        "0.2",
        "--trace",
        "bursty",
        "--variants",
        "request,step",
    ]
    first, second = (simulated(capsys, *flags, "--jobs", jobs) for jobs in ("1", "2"))
    assert first["rows"] == second["rows"]
    assert first["details"] == second["details"]
    assert simulated(capsys, *flags, "--seed", "1")["rows"] != first["rows"]


def test_refusals_are_told_by_their_reason(capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--variants", "step", "--rates", "3x", "--deadline-ms", "200"]
    admitted = simulated(capsys, *flags)
    assert set(admitted["details"][0]["not_served"]) == {"deadline_infeasible"}
    everybody = simulated(capsys, *flags, "--no-admit", "--queue-limit", "5")
    assert set(everybody["details"][0]["not_served"]) == {"queue_full"}
    assert everybody["rows"][0]["≤250 ms /s"] < admitted["rows"][0]["≤250 ms /s"]


def test_what_became_of_accepted_deadlines_is_published(capsys: pytest.CaptureFixture[str]) -> None:
    result = simulated(capsys, "--variants", "step,step+auto", "--rates", "0.05x,1.5x")
    by = {(item["variant"], item["rate /s"] > 50): item for item in result["details"]}
    assert (
        "deadlines_accepted" not in by["step", True]
    )  # fixed steps have none unless --deadline-ms gives them one
    light, heavy = by["step+auto", False], by["step+auto", True]
    rows = [row for row in result["rows"] if row["variant"] == "step+auto"]
    assert [light["deadlines_accepted"], heavy["deadlines_accepted"]] == [row["served"] for row in rows]
    assert light["deadlines_broken"] == 0.0
    late = [round(row["served"] - row["≤250 ms /s"] * 3) for row in rows]  # three seconds are measured
    assert late[1] == round(heavy["deadlines_broken"] * heavy["deadlines_accepted"])
    # Predictions at arrival count the fewest steps; nearly alone a picture then takes all four of its own.
    assert light["real_by_predicted"]["p50"] > 1.5
    assert sorted(heavy["real_by_predicted"].values()) == list(heavy["real_by_predicted"].values())


def test_jitter_makes_predictions_wrong_both_ways(capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--variants", "none", "--rates", "0.02x", "--duration", "60", "--deadline-ms", "5000"]
    exact, shaken = (
        simulated(capsys, *flags, "--jitter", jitter)["details"][0]["real_by_predicted"]
        for jitter in ("0", "0.5")
    )
    assert exact["p5"] == exact["p50"] == 1.0
    assert shaken["p5"] < 1.0 < shaken["p95"]


def test_knees_are_those_of_the_shares_in_time(capsys: pytest.CaptureFixture[str]) -> None:
    result = simulated(capsys, "--rates", "0.3x,3x", "--variants", "request,step")
    assert result["knee_share"] == 0.95
    low, high = sorted({row["rate /s"] for row in result["rows"]})
    for variant, knees in result["knees"].items():
        assert low < knees["≤250 ms"] < high
        for row, detail in zip(result["rows"], result["details"], strict=True):
            if row["variant"] == variant:  # three seconds are measured
                assert detail["in_time"]["≤250 ms"] * row["offered"] == pytest.approx(
                    row["≤250 ms /s"] * 3, abs=0.01
                )


def test_recorded_trace_keeps_its_pictures_and_takes_a_rate(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "trace.csv"
    write_trace(path, [Arrival(0.5 * i, 1 + i % 2, 512, 512, priority=i % 3) for i in range(40)])
    flags = ["--trace", str(path), "--rates", "recorded,8", "--variants", "step"]
    recorded, faster = simulated(capsys, *flags)["rows"]
    assert recorded["rate /s"] == 2.0
    assert recorded["offered"] == 38  # two arrive in the first second
    assert faster["rate /s"] == 8.0
    assert faster["offered"] == 32
    assert recorded["steps"] == faster["steps"] == 1.5


def test_plots_are_pictures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    simulated(capsys, "--out", str(tmp_path / "plots"))
    files = sorted((tmp_path / "plots").iterdir())
    assert [file.name for file in files] == ["goodput.png", "latency.png", "steps.png"]
    assert all(file.read_bytes().startswith(b"\x89PNG") for file in files)


def test_variant_that_was_never_measured_there_leaves_a_gap(tmp_path: Path) -> None:
    row = {
        "rate /s": 1.0,
        "≤250 ms /s": 0.0,
        "p50 ms": None,
        "p95 ms": None,
        "p99 ms": None,
        "steps": None,
        "refused": 3,
    }
    assert len(plot_sweep([{"variant": "none", **row}], tmp_path, "nothing served")) == 3


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--rates", "fast"], "'fast' is no rate; write 20"),
        (["--rates", "0"], "'0' is no rate"),
        (["--rates", "recorded"], "--rates=recorded goes with a CSV file, but --trace=poisson"),
        (["--sizes", "big"], "'big' is no size; write width and height in pixels, as 512x512"),
        (["--sizes", "64x64"], "there are no pictures of 64x64 here; allowed: 512x512"),
        (["--slo-ms", "0"], "0 is no SLO"),
        (["--costs", "no-such.json"], "the cost table no-such.json cannot be read"),
        (["--trace", "no-such.csv"], "no-such.csv cannot be read as a trace"),
        (["--variants", "fifo"], "--variants"),
    ],
)
def test_mistakes_are_told_in_a_sentence(
    flags: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["simulate", *flags]) == 2
    assert message in capsys.readouterr().err


def test_trace_that_is_all_warm_up_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "trace.csv"
    write_trace(path, [Arrival(0.1 * i, 4, 512, 512) for i in range(10)])
    assert main(["simulate", "--trace", str(path), "--rates", "recorded", "--warmup", "60"]) == 2
    assert "the trace lasts 1.0 s, all of it warm-up; lower --warmup=60" in capsys.readouterr().err


def test_every_table_that_ships_can_be_read_and_says_where_it_is_from() -> None:
    assert {"gpu-like", "h200-scaling"} <= set(built_in())
    for name in built_in():
        table = find_costs(name)
        assert table == read_cost_table(FOLDER / f"{name}.json")
        assert table.name == name
        assert table.source.startswith(("given", "measured", "scaling"))
        assert cost_model(table).seconds("denoise", table.sizes[0], 1) > 0


def test_gpu_like_table_is_what_it_says() -> None:
    costs = cost_model(find_costs("gpu-like"))
    alone, eight, sixteen = (costs.seconds("denoise", (512, 512), batch) for batch in (1, 8, 16))
    assert eight < 1.5 * alone
    assert sixteen == pytest.approx(2 * eight)


def test_servers_own_costs_are_read_and_kept(tmp_path: Path) -> None:
    flags = ["--engine", "fake", "--max-batch", "2", "--fake-costs", str(FOLDER / "gpu-like.json")]
    with Server([*flags, "--log-level", "warning"]) as server:
        table = costs_of_server(server.url)
    assert "fake" in table.source
    assert {(row.stage, row.batch) for row in table.rows} == {
        (stage, batch) for stage in ("encode", "denoise", "decode") for batch in (1, 2)
    }
    given, measured = cost_model(find_costs("gpu-like")), cost_model(table)
    for stage, bucket, size in (("encode", TEXT, TEXT), ("denoise", (512, 512), table.sizes[0])):
        for batch in (1, 2):  # a call waits for what the table says, then paints
            assert measured.seconds(stage, size, batch) >= given.seconds(stage, bucket, batch)  # type: ignore[arg-type]
    save_costs(table, tmp_path / "kept.json")
    assert find_costs(str(tmp_path / "kept.json")) == table


def test_address_where_no_server_is_is_told() -> None:
    with pytest.raises(ServerError, match=r"http://127\.0\.0\.1:9 does not tell its costs"):
        find_costs("http://127.0.0.1:9/")


def test_metrics_without_costs_are_none() -> None:
    assert costs_in('# TYPE cdm_queue_depth gauge\ncdm_queue_depth{model="fake"} 0.0\n', "fake") == ()
