"""Server processes that tests may signal, kill, restart and starve, and many clients of one."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx
from prometheus_client.parser import text_string_to_metric_families

from cdm_serve.images import read_parameters
from tests.cdm_serve.helpers import PATIENCE_S, wait_until

ROOT = Path(__file__).resolve().parents[2]
LISTENING = re.compile(r"at (http://127\.0\.0\.1:\d+)")


class Process:
    """A running `cdm-serve`; standard error goes to a file in `folder`, or to `stderr`."""

    def __init__(
        self,
        folder: Path,
        *flags: str,
        port: int = 0,
        run: Sequence[str] = ("-m", "cdm_serve.main"),
        wrapper: Sequence[str] = (),
        stderr: Path | None = None,
        ready: bool = True,
    ) -> None:
        self._log = stderr or folder / "stderr.txt"
        command = [*wrapper, sys.executable, *run, "--host", "127.0.0.1", "--port", str(port), *flags]
        environment = {name: value for name, value in os.environ.items() if not name.startswith("CDM_")}
        with self._log.open("wb") as log:
            self.popen = subprocess.Popen(
                command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, stderr=log
            )
        self.client = httpx.Client(trust_env=False, timeout=PATIENCE_S)
        self.url = f"http://127.0.0.1:{port}"
        try:
            if port == 0:
                wait_until(lambda: self._ended() or LISTENING.search(self.log()) is not None)
                found = LISTENING.search(self.log())
                assert found, self.log()
                self.url = found[1]
            if ready:
                wait_until(lambda: self._ended() or self.status("/readyz") == 200)
        except BaseException:
            self.close()
            raise

    def _ended(self) -> bool:
        assert self.popen.poll() is None, f"it ended with {self.popen.returncode}: {self.log()}"
        return False

    @property
    def port(self) -> int:
        return int(self.url.rpartition(":")[2])

    def log(self) -> str:
        return self._log.read_text(encoding="utf-8", errors="replace")

    def status(self, path: str) -> int:
        """Of a GET; 0: nobody answers."""
        try:
            return self.client.get(self.url + path).status_code
        except httpx.TransportError:
            return 0

    def metric(self, name: str, **labels: str) -> float:
        """The sum of all samples of that name that have `labels`."""
        text = self.client.get(f"{self.url}/metrics").text
        samples = [sample for family in text_string_to_metric_families(text) for sample in family.samples]
        return sum(s.value for s in samples if s.name == name and labels.items() <= s.labels.items())

    def wait_accepted(self, pictures: int) -> None:
        """Return once so many pictures have been accepted since the start."""
        wait_until(
            lambda: self.metric("cdm_queue_depth") + self.metric("cdm_queue_time_seconds_count") >= pictures
        )

    def draw(self, prompt: str = "cat", **fields: Any) -> httpx.Response:
        """`POST /generate` over a connection of its own."""
        with httpx.Client(trust_env=False, timeout=4 * PATIENCE_S) as client:
            return client.post(f"{self.url}/generate", json={"prompt": prompt, **fields})

    def close(self) -> None:
        self.client.close()
        with suppress(ProcessLookupError):
            self.popen.kill()
        self.popen.wait()


@contextmanager
def process(folder: Path, *flags: str, **options: Any) -> Iterator[Process]:
    """A server process, killed at the end if it still runs."""
    started = Process(folder, *flags, **options)
    try:
        yield started
    finally:
        started.close()


@contextmanager
def crowd(server: Process, size: int, **fields: Any) -> Iterator[list[Future[httpx.Response]]]:
    """So many requests for a picture each, seeds from 0 on, all of them accepted by the server when the body begins."""
    with ThreadPoolExecutor(size) as pool:
        asked = [pool.submit(server.draw, seed=seed, **fields) for seed in range(size)]
        try:
            server.wait_accepted(size)
            yield asked
        finally:
            if any(not request.done() for request in asked) and server.popen.poll() is not None:
                server.client.close()


def generate_head(body: bytes) -> bytes:
    """Of a `POST /generate` with `body`, for clients that do not speak HTTP as they should."""
    lines = (
        "POST /generate HTTP/1.1",
        "host: x",
        "content-type: application/json",
        f"content-length: {len(body)}",
    )
    return "\r\n".join((*lines, "", "")).encode()


def assert_picture(response: httpx.Response, seed: int) -> None:
    assert response.status_code == 200, response.text
    assert read_parameters(response.content)["seed"] == seed


def slow_costs(folder: Path, denoise_s: float) -> Path:
    """A cost table for `--fake-costs`: a denoising call takes so long, whatever its batch; the rest hardly anything."""
    size = {"width": 64, "height": 64}
    rows: list[dict[str, Any]] = [
        {"stage": "encode", "batch": 1, "seconds": 0.001},
        *({"stage": "denoise", **size, "batch": batch, "seconds": denoise_s} for batch in (1, 64)),
        *({"stage": "decode", **size, "batch": batch, "seconds": 0.001} for batch in (1, 64)),
    ]
    path = folder / "costs.json"
    path.write_text(json.dumps({"name": "slow", "source": "given", "rows": rows}), encoding="utf-8")
    return path
