"""A benchmark that is ended leaves no server behind, which would disturb the next one's figures."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks.held import held_signals
from benchmarks.server import Server

PATIENCE_S = 60.0


def children(pid: int) -> list[int]:
    listed = Path(f"/proc/{pid}/task/{pid}/children").read_text(encoding="ascii").split()
    return [int(child) for child in listed]


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_ended_benchmark_stops_the_servers_that_it_started(number: int, tmp_path: Path) -> None:
    command = ["serve", "--engine", "fake", "--variants", "request,step", "--rates", "5", "--duration", "60"]
    process = subprocess.Popen(
        [sys.executable, "-m", "benchmarks.main", *command, "--out", str(tmp_path)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        # A shell's background jobs, and what they start, ignore it.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    try:
        until = time.monotonic() + PATIENCE_S
        while len(servers := children(process.pid)) < 2:
            assert process.poll() is None
            assert time.monotonic() < until
            time.sleep(0.05)
        process.send_signal(number)
        assert process.wait(PATIENCE_S) == 128 + number
        assert not any(Path(f"/proc/{pid}").exists() for pid in servers)
    finally:
        process.kill()
        process.wait()


def test_a_server_that_is_interrupted_while_it_starts_is_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    started = []

    class Interrupted(subprocess.Popen):  # the child is there, its Popen has not been returned
        def __init__(self, *arguments: object, **settings: object) -> None:
            super().__init__(*arguments, **settings)
            started.append(self)
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(subprocess, "Popen", Interrupted)
    with pytest.raises(KeyboardInterrupt), Server(["--engine", "fake"]):
        pass
    assert [process.returncode is not None for process in started] == [True]


def test_held_signals_come_at_the_end_and_ignored_ones_not_at_all() -> None:
    came, before = [], signal.signal(signal.SIGTERM, lambda number, frame: came.append(number))
    try:
        with held_signals():
            signal.raise_signal(signal.SIGTERM)
            assert not came
        assert came == [signal.SIGTERM]
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        with held_signals():
            assert signal.getsignal(signal.SIGTERM) is signal.SIG_IGN
            signal.raise_signal(signal.SIGTERM)
        assert came == [signal.SIGTERM]
    finally:
        signal.signal(signal.SIGTERM, before)
