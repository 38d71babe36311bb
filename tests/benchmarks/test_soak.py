"""`cdm-bench soak`: its callers, its judge, and a short soak of a real server with the fake engine at given costs."""

from __future__ import annotations

import asyncio
import base64
import csv
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.answers import Answers
from benchmarks.balance import totals, trouble, unbalanced
from benchmarks.callers import GOOD, Callers
from benchmarks.cost_tables import FOLDER
from benchmarks.main import main
from benchmarks.server import Server
from benchmarks.vitals import Sign, Vitals, slope
from benchmarks.wire import Broken, Reply, Wire, get, post
from cdm_serve.images import encode_image

FAKE = ["--engine", "fake", "--fake-costs", str(FOLDER / "gpu-like.json")]
ASKED = {"prompt": "red apple", "seed": 7, "steps": 2, "width": 16, "height": 8}
PIXELS = np.random.default_rng(0).integers(0, 256, (8, 16, 3), np.uint8)


def picture(pixels: np.ndarray = PIXELS, **changes: Any) -> bytes:
    return encode_image(pixels, "png", {**ASKED, "model": "fake", **changes})


def reply(body: bytes, media: str = "image/png", status: int = 200, **headers: str) -> Reply:
    return Reply(
        status, {"content-type": media, **{k.replace("_", "-"): v for k, v in headers.items()}}, body
    )


def entry(data: bytes) -> dict[str, str]:
    return {"b64_json": base64.b64encode(data).decode()}


def events(*named: tuple[str, bytes]) -> Reply:
    text = "".join(f"event: {name}\ndata: {json.dumps(entry(data))}\n\n" for name, data in named)
    return reply(text.encode(), "text/event-stream")


# The judge.


@pytest.mark.parametrize(
    "answer",
    [
        reply(picture()),
        reply(json.dumps({"images": [entry(picture())]}).encode(), "application/json"),
        reply(json.dumps({"data": [entry(picture())]}).encode(), "application/json"),
        reply(
            b"{}" + len(picture()).to_bytes(4, "little") + picture(),
            "application/octet-stream",
            inference_header_content_length="2",
        ),
        events(("preview", picture(steps=1)), ("picture", picture())),
        events(("image_generation.completed", picture())),
    ],
)
def test_a_picture_as_asked_for_is_served_in_every_api(answer: Reply) -> None:
    assert Answers(exact=True).judge(ASKED, answer) == "served"


@pytest.mark.parametrize(
    ("answer", "told"),
    [
        (reply(picture()[:-200]), "no_picture"),
        (reply(picture()[:-12]), "cut off"),
        (reply(picture(PIXELS[:4])), "wrong_size"),
        (reply(picture(seed=8)), "made with seed=8, asked for 7"),
        (reply(picture(steps=3)), "made with steps=3, asked for 2"),
        (reply(picture(prompt="blue heart")), "made with prompt='blue heart'"),
        (reply(b"", status=500), "500"),
        (reply(b"", status=429), "429 with retry-after=''"),
        (reply(b"{}", "application/json"), "KeyError"),
        (events(("preview", picture())), "events"),
        (events(("picture", picture()), ("preview", picture())), "events"),
        (events(("picture", picture()), ("picture", picture())), "events"),
        (events(("picture", picture()), ("error", picture())), "events"),
        (reply(b"event: picture", "text/event-stream"), "the last event is not ended"),
        (reply(json.dumps({"images": [entry(picture())] * 2}).encode(), "application/json"), "2 pictures"),
    ],
)
def test_anything_else_is_wrong(answer: Reply, told: str) -> None:
    said = Answers(exact=True).judge(ASKED, answer)
    assert said.startswith("wrong: ")
    assert told in said


def test_refusals_are_no_mistakes_and_rejections_have_their_status() -> None:
    answers = Answers(exact=True)
    assert answers.judge(ASKED, reply(b"full", status=429, retry_after="2")) == "refused"
    assert answers.rejected(reply(b"why", status=422), 422) == "rejected"
    assert answers.rejected(reply(b"why", status=400), 422).startswith("wrong: 400 instead of 422")
    assert answers.rejected(reply(b"", status=422), 422).startswith("wrong")


@pytest.mark.parametrize(("exact", "far", "good"), [(True, 1, False), (False, 1, True), (False, 30, False)])
def test_same_question_same_picture(exact: bool, far: int, good: bool) -> None:
    answers = Answers(exact)
    first = np.full((8, 16, 3), 100, np.uint8)
    assert answers.judge(ASKED, reply(picture(first))) == "served"
    assert answers.judge(ASKED, reply(picture(first))) == "served"
    said = answers.judge(ASKED, reply(picture(first + np.uint8(far))))
    assert (said == "served") == good
    assert (answers.compared, answers.largest) == (2, far)


# The wire.


def serve_bytes(answer: bytes, ask: Callable[[Wire], Any]) -> Any:
    """What `ask` returns of a server that answers anything with `answer` and closes."""

    async def run() -> Any:
        async def on_connection(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await reader.readuntil(b"\r\n\r\n")
            writer.write(answer)
            writer.close()

        server = await asyncio.start_server(on_connection, "127.0.0.1", 0)
        async with server, Wire(server.sockets[0].getsockname()[:2]) as wire:
            return await ask(wire)

    return asyncio.run(run())


async def ask_slowly(wire: Wire) -> Reply:
    await wire.send(get("/"))
    return await wire.reply(piece=7, pause_s=0.001)


def test_an_answer_is_read_whole_however_it_comes() -> None:
    answer = (
        b"HTTP/1.1 200 OK\r\nX-Steps: 4\r\ntransfer-encoding: chunked\r\n\r\n3\r\nabc\r\n2\r\nde\r\n0\r\n\r\n"
    )
    for ask in (ask_slowly, lambda wire: wire.ask(get("/"))):
        found = serve_bytes(answer, ask)
        assert (found.status, found.headers["x-steps"], found.body) == (200, "4", b"abcde")


@pytest.mark.parametrize(
    ("answer", "told"),
    [
        (b"", "closed after any answer"),
        (b"HTTP/1.1 200 OK\r\ncontent-length: 9\r\n\r\nabc", "closed after 3 bytes of a body"),
        (b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n" * 2, "another answer follows"),
        (b"SSH-2.0-OpenSSH\r\n", "no HTTP"),
    ],
)
def test_half_an_answer_is_none_and_two_are_one_too_many(answer: bytes, told: str) -> None:
    with pytest.raises(Broken, match=told):
        serve_bytes(answer, lambda wire: wire.ask(get("/")))


def test_a_request_may_claim_another_length_than_it_has() -> None:
    assert b"content-length: 2\r\n" in post("/generate", b"{}")
    assert b"content-length: 9\r\n" in post("/generate", b"{}", length=9)


# Vital signs.


def test_vitals_are_those_of_the_process() -> None:
    vitals = Vitals(os.getpid())
    vitals.sample()
    with Path(os.devnull).open() as _:
        vitals.sample()
    before, after = vitals.signs
    assert after.files == before.files + 1
    assert before.threads >= 1
    assert before.rss_mb > 10
    assert after.cpu_s >= before.cpu_s > 0


def test_growth_compares_the_ends_and_its_slope_ignores_bursts() -> None:
    vitals = Vitals(os.getpid())
    rss = [100.0 + second / 60 for second in range(601)]
    rss[-1] = 900.0
    vitals.signs = [Sign(float(second), mb, 10, 5, 0.0) for second, mb in enumerate(rss)]
    growth = vitals.growth(window_s=60)
    assert (growth["first MB"], growth["last MB"], growth["most MB"]) == (100.5, 109.5, 900.0)
    assert growth["MB per hour"] == pytest.approx(60, abs=0.1)
    assert slope(np.array([0.0]), np.array([1.0])) == 0.0


# The balance.


def test_metrics_are_summed_over_models_and_kept_apart_by_outcome() -> None:
    text = (
        '# TYPE a counter\na_total{model="x",outcome="ok"} 1\na_total{model="y",outcome="ok"} 2\n'
        'a_total{model="y",outcome="failed"} 4\na_created{model="x",outcome="ok"} 1e9\n# TYPE b gauge\nb 7\n'
    )
    assert totals(text) == {"a_total ok": 3, "a_total failed": 4, "b": 7}


COUNTED = {
    "cdm_pictures_total finished": 12.0,
    "cdm_pictures_total cancelled": 3.0,
    "cdm_requests_total rejected": 6.0,
}


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({}, None),
        ({"cdm_pictures_total finished": 9.0}, "pictures"),  # more came than were made
        ({"cdm_pictures_total finished": 16.0}, "pictures"),  # made for nobody
        ({"cdm_requests_total rejected": 4.0}, "refusals"),
        ({"cdm_requests_total failed": 1.0}, "cdm_requests_total failed"),
        ({"cdm_pictures_total failed": 1.0}, "cdm_pictures_total failed"),
    ],
)
def test_server_and_callers_must_have_counted_the_same(
    changes: dict[str, float], problem: str | None
) -> None:
    found = unbalanced({**COUNTED, **changes}, served=10, left=5, refused=5)
    assert list(found) == ([] if problem is None else [problem])


def test_only_trouble_is_looked_for_in_a_log() -> None:
    fine = "2026-11-22 WARNING uvicorn.error: Invalid HTTP request received."
    bad = [
        "2026-11-22 ERROR cdm_serve.front: a request failed unforeseen",
        "Traceback (most recent call last):",
    ]
    assert trouble("\n".join([fine, *bad, fine])) == bad


# A real server.


@pytest.mark.slow
def test_every_kind_of_caller_is_answered_as_it_deserves() -> None:
    flags = [*FAKE, "--body-timeout-s", "0.5", "--log-level", "warning"]
    with Server(flags) as server:
        info = json.loads(server.fetch("/info"))
        callers = Callers(("127.0.0.1", server.port), info, 0, 0.5, 65536, exact=True)
        kinds = list(callers.kinds)

        async def call_all() -> list[tuple[str, str]]:
            return [await callers.call(kind) for kind in [*kinds, *["bad body"] * 20]]

        said = asyncio.run(call_all())
        callers.close()
    expected = {kind: "left" for kind in kinds if kind.startswith("leaves")}
    expected |= {"bad body": "rejected", "body never ends": "rejected"}
    assert said == [(kind, expected.get(kind, "served")) for kind, _ in said]
    assert callers.counts == {"served": 1 * 8 + 3 + 4 - 1, "left": 2}
    assert server.exit_code == 0
    assert trouble(server.log) == []


@pytest.fixture(scope="module")
def soaked(tmp_path_factory: pytest.TempPathFactory) -> tuple[int, Path]:
    """The exit code of a short soak, and the folder that it leaves."""
    folder = tmp_path_factory.mktemp("soak")
    short = ["--minutes", "0.15", "--capacity-s", "1", "--queue-limit", "8", "--load", "1.5"]
    return main(["soak", *FAKE, *short, "--out", str(folder)]), folder


@pytest.mark.slow
def test_a_server_that_is_asked_for_too_much_loses_nothing(soaked: tuple[int, Path]) -> None:
    code, folder = soaked
    result = json.loads((folder / "soak.json").read_text(encoding="utf-8"))
    assert result["problems"] == {}
    assert code == 0
    *kinds, everybody = result["rows"]
    for column in ("calls", *GOOD, "wrong"):
        assert everybody[column] == sum(row[column] for row in kinds)
    assert everybody["calls"] == sum(everybody[column] for column in GOOD)
    assert everybody["refused"] > 0
    assert everybody["left"] > 0
    assert everybody["rejected"] > 0
    assert result["server"]["cdm_pictures_total finished"] >= result["pictures_served"] > 0
    assert result["compared"] > 0


@pytest.mark.slow
def test_vitals_are_left_as_numbers_and_as_a_plot(soaked: tuple[int, Path]) -> None:
    _, folder = soaked
    with (folder / "vitals.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) >= 5
    assert {"at", "rss_mb", "files", "threads", "cpu_s"} == set(rows[0])
    assert (folder / "vitals.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_a_soak_that_finds_something_fails(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    short = ["--minutes", "0.05", "--capacity-s", "0.5", "--max-growth-mb", "0.000001"]
    assert main(["soak", *FAKE, *short, "--out", str(tmp_path)]) == 1
    assert "soak: memory: grew" in capsys.readouterr().err
