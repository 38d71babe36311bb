"""A real server process on a loopback port, for benchmarks and for the README's test.

with Server(["--engine", "fake"]) as server:
    httpx.post(f"{server.url}/generate", json={"prompt": "red apple"})
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from http import HTTPStatus
from types import TracebackType
from typing import IO, Self

from benchmarks.held import held_signals

POLL_S = 0.005
_DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # loopback never goes through a proxy


def flags_of(given: Mapping[str, object]) -> list[str]:
    """`{"max-batch": 8, "bundle": None}` as `["--max-batch", "8"]`: what is None is left out."""
    return [part for name, value in given.items() if value is not None for part in (f"--{name}", str(value))]


class ServerError(Exception):
    """The server did not come up, or answered something else than a picture. Carries what it printed last."""


def free_port() -> int:
    """A TCP port that was free on the loopback interface a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


class Server:
    """Starts `python -m MODULE FLAGS` on entry, waits for `/readyz` unless told not to, stops it on exit.

    `started` is `time.perf_counter()` just before the process was created; `exit_code` and `log`, all that it printed,
    are there when it has ended. The environment's `CDM_SERVE_*` are not passed on: the flags say all.
    """

    def __init__(
        self,
        flags: Sequence[str] = (),
        *,
        module: str = "cdm_serve.main",
        python: str = sys.executable,
        env: Mapping[str, str] | None = None,
        timeout_s: float = 60.0,
        wait_ready: bool = True,
    ) -> None:
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.timeout_s = timeout_s
        self.wait_ready = wait_ready
        self._command = [
            python,
            "-m",
            module,
            "--host",
            "127.0.0.1",
            "--port",
            str(self.port),
            *flags,
        ]
        kept = {
            name: value for name, value in os.environ.items() if not name.upper().startswith("CDM_SERVE_")
        }
        self._env = {**kept, **(env or {})}
        self._output: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115  (closed in __exit__)
        self._process: subprocess.Popen[bytes] | None = None
        self.started = 0.0
        self.exit_code: int | None = None
        self.log = ""

    @property
    def pid(self) -> int:
        """The running process's."""
        assert self._process is not None
        return self._process.pid

    def __enter__(self) -> Self:
        self.started = time.perf_counter()
        try:
            with held_signals():
                self._process = subprocess.Popen(
                    self._command, env=self._env, stdout=self._output, stderr=subprocess.STDOUT
                )
            if self.wait_ready:
                self.fetch("/readyz")
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        process = self._process
        if process is not None:
            process.terminate()
            try:
                process.wait(timeout=self.timeout_s)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            self.exit_code = process.returncode
        self.log = self._read()
        self._output.close()

    def fetch(self, path: str, body: bytes | None = None) -> bytes:
        """GET `path`, or POST `body` as JSON, again and again until it is answered with 200.

        Raises:
            ServerError: the process ended, the request is refused, or `timeout_s` from the start have passed.
        """
        assert self._process is not None
        request = urllib.request.Request(self.url + path, body, {"content-type": "application/json"})
        while (left := self.started + self.timeout_s - time.perf_counter()) > 0:
            if self._process.poll() is not None:
                raise ServerError(
                    f"the server ended with exit code {self._process.returncode}: {self._printed()}"
                )
            try:
                with _DIRECT.open(request, timeout=left) as response:
                    answer: bytes = response.read()
                    return answer
            except urllib.error.HTTPError as error:
                with error:
                    if error.code != HTTPStatus.SERVICE_UNAVAILABLE:
                        raise ServerError(f"{path} answered {error.code}: {error.read()[:300]!r}") from error
            except OSError:  # not listening yet
                pass
            time.sleep(POLL_S)
        raise ServerError(f"{path} was not answered within {self.timeout_s:g} s: {self._printed()}")

    def _printed(self) -> str:
        return self._read()[-2000:].strip()

    def _read(self) -> str:
        self._output.seek(0)
        return self._output.read().decode(errors="replace")
