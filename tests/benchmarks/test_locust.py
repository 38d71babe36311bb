"""The Locust file, run headless as its users run it: in a process of its own, for gevent patches what it imports."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import count
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest

from benchmarks.arrivals import poisson
from benchmarks.server import Server
from tests.cdm_serve.test_main import ROOT, environment

LOCUSTFILE = ROOT / "benchmarks" / "locustfile.py"
SECONDS, RATE = 2.0, 5.0
Stats = dict[tuple[str, str], dict[str, str]]
"""(type, name) → a line of Locust's CSV."""


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with Server(["--engine", "fake", "--log-level", "warning"]) as server:
        yield server


def locust(folder: Path, url: str, *flags: str, key: str = "") -> tuple[int, Stats, str]:
    """Exit code, statistics and log of a headless run."""
    command = [
        sys.executable, "-m", "locust", "--locustfile", str(LOCUSTFILE), "--headless", "--host", url,
        "--csv", str(folder / "load"), "--html", str(folder / "load.html"), "--duration", str(SECONDS), *flags,
    ]  # fmt: skip
    done = subprocess.run(
        command, cwd=ROOT, env={**environment(), **({"CDM_API_KEY": key} if key else {})}, capture_output=True,
        text=True, timeout=120, check=False,
    )  # fmt: skip
    with (folder / "load_stats.csv").open(encoding="utf-8", newline="") as file:
        stats = {(row["Type"], row["Name"]): row for row in csv.DictReader(file)}
    return done.returncode, stats, done.stderr


def counted(stats: Stats, type: str, column: str = "Request Count") -> int:
    return sum(int(row[column]) for (kind, _), row in stats.items() if kind == type)


@pytest.mark.slow
def test_open_loop_sends_every_drawn_arrival_and_waits_for_every_answer(
    server: Server, tmp_path: Path
) -> None:
    flags = [
        "--mode",
        "open",
        "--rate",
        str(RATE),
        "--load-seed",
        "3",
        "--auto",
        "0.5",
        "--deadline-ms",
        "5000",
    ]
    code, stats, log = locust(tmp_path, server.url, *flags)
    assert code == 0, log
    drawn = len(poisson(RATE, SECONDS, np.random.default_rng([3, 0, 0, 1])))
    assert counted(stats, "POST") == counted(stats, "LAG") == drawn
    assert counted(stats, "POST", "Failure Count") == 0
    assert any("auto steps: ran" in name for _, name in stats)
    assert all(float(row["Min Response Time"]) >= 0 for row in stats.values())
    assert (tmp_path / "load.html").is_file()


@pytest.mark.slow
def test_closed_loop_asks_for_the_mix_and_fails_nothing(server: Server, tmp_path: Path) -> None:
    flags = ["--mode", "closed", "--most-users", "3", "--think-s", "0.1"]
    code, stats, log = locust(tmp_path, server.url, *flags, "--picture-steps", "1,2")
    assert code == 0, log
    names = {name for type, name in stats if type == "POST"}
    info = json.loads(server.fetch("/info"))
    sizes = {f"{size['width']}x{size['height']}" for size in info["sizes"]}
    assert names <= {f"/generate {size}, {steps} steps" for size in sizes for steps in (1, 2)}
    assert counted(stats, "POST") > 0
    assert counted(stats, "POST", "Failure Count") == 0
    assert counted(stats, "LAG") == 0


class Rogue(BaseHTTPRequestHandler):
    """A server that claims to be ours, refuses every other request and answers the rest with rubbish."""

    protocol_version = "HTTP/1.1"
    keys: ClassVar[set[str]] = set()
    numbers: ClassVar[Iterator[int]] = count()

    def do_GET(self) -> None:
        self._answer(200, json.dumps({"steps": [4], "sizes": [{"width": 64, "height": 64}]}).encode())

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["content-length"]))
        if next(self.numbers) % 2:
            self._answer(429, b'{"error": {"code": "queue_full"}}')
        else:
            self._answer(200, b"rubbish")

    def _answer(self, status: int, body: bytes) -> None:
        self.keys.add(self.headers.get("authorization", ""))
        self.send_response(status)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@pytest.mark.slow
def test_rubbish_fails_a_refusal_does_not_and_the_key_is_sent(tmp_path: Path) -> None:
    with ThreadingHTTPServer(("127.0.0.1", 0), Rogue) as rogue:
        thread = threading.Thread(target=rogue.serve_forever)
        thread.start()
        try:
            url = f"http://127.0.0.1:{rogue.server_address[1]}"
            code, stats, log = locust(tmp_path, url, "--mode", "open", "--rate", "10", key="cdm_secret")
        finally:
            rogue.shutdown()
            thread.join()
    assert code == 1, log
    served, refused = (stats["POST", f"/generate 64x64, 4 steps{tail}"] for tail in ("", ": refused (429)"))
    assert int(served["Failure Count"]) == int(served["Request Count"]) > 0
    assert int(refused["Failure Count"]) == 0 < int(refused["Request Count"])
    assert Rogue.keys == {"Bearer cdm_secret"}


@pytest.mark.slow
def test_no_server_ends_the_run_at_once(tmp_path: Path) -> None:
    code, stats, log = locust(tmp_path, "http://127.0.0.1:9", "--mode", "open", "--rate", "1")
    assert code == 1
    assert counted(stats, "POST") == 0
    assert "http://127.0.0.1:9/info answers 0; is this a cdm-serve" in log
