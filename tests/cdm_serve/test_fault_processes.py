"""Faults that only a process can have: signals, a kill, a full disk. What its clients see is what they really saw."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.server import free_port
from tests.cdm_serve.helpers import PATIENCE_S, wait_until
from tests.cdm_serve.processes import Process, assert_picture, crowd, generate_head, process, slow_costs
from tests.cdm_serve.troubled import HANG, RUN_TROUBLED

CROWD = 30
FAKE = ("--engine", "fake", "--max-batch", "4")


def half_asked(server: Process) -> socket.socket:
    """A connection on which the head of a request and half of its body have been sent."""
    connection = socket.create_connection(("127.0.0.1", server.port), timeout=PATIENCE_S)
    body = b'{"prompt": "cat"}'
    connection.sendall(generate_head(body) + body[:8])
    return connection


def rest_of(connection: socket.socket) -> bytes:
    """Send the other half, and read until the server closes."""
    connection.sendall(b'{"prompt": "cat"}'[8:])
    answer = bytearray()
    while data := connection.recv(65536):
        answer += data
    return bytes(answer)


@pytest.mark.slow
def test_sigterm_under_load_answers_all_that_was_accepted_and_refuses_newcomers(tmp_path: Path) -> None:
    flags = (*FAKE, "--fake-costs", str(slow_costs(tmp_path, 0.1)))
    with process(tmp_path, *flags) as server, half_asked(server) as half:
        with crowd(server, CROWD, steps=2) as asked:
            server.popen.send_signal(signal.SIGTERM)
            wait_until(lambda: "stopping: finishing" in server.log())
            assert "stopping: finishing 0" not in server.log()
            server.popen.send_signal(signal.SIGTERM)  # a second one changes nothing
            answer = rest_of(half)  # after which the server closed the connection
            assert answer.startswith(b"HTTP/1.1 503 ")
            assert b'"code": "unavailable"' in answer
            wait_until(lambda: server.status("/readyz") in (0, 503))
            wait_until(lambda: server.status("/readyz") == 0)  # nobody listens any more
            assert server.popen.poll() is None
            for seed, request in enumerate(asked):
                assert_picture(request.result(), seed)
        assert server.popen.wait(PATIENCE_S) == 0
        assert "Traceback" not in server.log()


def test_sigterm_during_the_warm_up_ends_it(tmp_path: Path) -> None:
    flags = (*FAKE, "--fake-costs", str(slow_costs(tmp_path, 0.5)))
    with process(tmp_path, *flags, ready=False) as server:
        wait_until(lambda: server.status("/livez") == 200)
        assert server.status("/readyz") == 503
        server.popen.send_signal(signal.SIGTERM)
        assert server.popen.wait(PATIENCE_S) == 0


def test_what_the_drain_has_no_time_for_is_answered_503(tmp_path: Path) -> None:
    flags = (*FAKE, "--fake-costs", str(slow_costs(tmp_path, 0.4)), "--drain-timeout-s", "1")
    with process(tmp_path, *flags) as server:
        with crowd(server, CROWD, steps=2) as asked:
            server.popen.send_signal(signal.SIGTERM)
            answers = [request.result() for request in asked]
        refused = [answer for answer in answers if answer.status_code == 503]
        assert len(refused) >= CROWD // 2  # eight at most per second
        for seed, answer in enumerate(answers):
            if answer in refused:
                assert answer.json()["error"]["code"] == "unavailable"
                assert "send it again elsewhere" in answer.json()["error"]["message"]
            else:
                assert_picture(answer, seed)
        assert server.popen.wait(PATIENCE_S) == 0


def test_second_ctrl_c_answers_all_at_once_and_leaves(tmp_path: Path) -> None:
    flags = ("--engine", "fake", "--max-batch", "1", "--fake-costs", str(slow_costs(tmp_path, 1.0)))
    with process(tmp_path, *flags, "--drain-timeout-s", "600") as server:
        with crowd(server, CROWD, steps=8) as asked:
            server.popen.send_signal(signal.SIGINT)
            wait_until(lambda: "stopping: finishing" in server.log())
            assert not any(request.done() for request in asked)
            server.popen.send_signal(signal.SIGINT)
            for request in asked:
                answer = request.result()
                assert (answer.status_code, answer.json()["error"]["code"]) == (503, "unavailable")
        assert server.popen.wait(PATIENCE_S) == 130


def test_sigterm_ends_a_server_whose_engine_hangs(tmp_path: Path) -> None:
    flags = (*FAKE, "--drain-timeout-s", "0.5")
    with process(tmp_path, *flags, run=("-c", RUN_TROUBLED)) as server:
        with crowd(server, 3, prompt=HANG) as asked:
            server.popen.send_signal(signal.SIGTERM)
            for request in asked:
                answer = request.result()
                assert (answer.status_code, answer.json()["error"]["code"]) == (503, "unavailable")
        assert server.popen.wait(PATIENCE_S) == 1
        assert "does not return; stopping without it" in server.log()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="/dev/full is Linux's")
def test_log_that_cannot_be_written_stops_nobody(tmp_path: Path) -> None:
    with process(tmp_path, *FAKE, port=free_port(), stderr=Path("/dev/full")) as server:
        assert_picture(server.draw(seed=3), 3)
        server.popen.send_signal(signal.SIGTERM)
        server.popen.wait(PATIENCE_S)


def test_taken_port_is_told_before_anything_slow(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        command = [sys.executable, "-m", "cdm_serve.main", "--bundle", str(tmp_path / "none"), "--port", port]
        done = subprocess.run(
            command, cwd=Path(__file__).parents[2], capture_output=True, text=True, check=False, timeout=60
        )
    assert done.returncode == 2
    assert f"--port={port}" in done.stderr
    assert "Traceback" not in done.stderr
