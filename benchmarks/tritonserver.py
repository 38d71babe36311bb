"""A real Triton Inference Server process on loopback ports, without docker: for tests, benchmarks and trying it out.

    with TritonServer(Path("triton/emoji")) as server:
        load_engine(bundle, EngineOptions("triton", triton_url=server.url))

    python -m benchmarks.tritonserver triton/emoji --grpc-port 8001      # until Ctrl-C

The server comes from the wheel nvidia-pytriton in an environment of its own (`make triton`; `CDM_TRITON_VENV` names
another), because the wheel wants numpy 1. It brings the Python backend and no other. That runs models in this process's
Python: the stub that embeds it is chosen by version, needs `libpythonX.Y.so`, and finds this environment because its
`python3` is the first on the path.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import secrets
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from types import FrameType, TracebackType
from typing import IO, Self

from tritonclient.grpc import InferenceServerClient, InferenceServerException

from benchmarks.held import held_signals
from benchmarks.server import ServerError, free_port

ROOT = Path(__file__).resolve().parent.parent
VARIABLE = "CDM_TRITON_VENV"
VENV = Path(os.environ.get(VARIABLE) or ROOT / ".venv-triton")
START_S = 120.0
STOP_S = 20.0
POLL_S = 0.05
SHARED = Path("/dev/shm")


def site_packages() -> Path | None:
    """Where nvidia-pytriton is installed; none if it is nowhere."""
    return next((path.parent for path in VENV.glob("lib/python3.*/site-packages/pytriton")), None)


def _stub(packages: Path) -> Path:
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    return packages / "pytriton/tritonserver/python_backend_stubs" / version / "triton_python_backend_stub"


def _environment(packages: Path) -> dict[str, str]:
    """The server's libraries and Python's own where they are found, and this environment's `python3` before any other.

    The stub ignores `PYTHONPATH`; it looks for `python3` on the path and for `pyvenv.cfg` beside it.
    """
    libraries = [str(packages / "nvidia_pytriton.libs"), str(sysconfig.get_config_var("LIBDIR"))]
    libraries.append(f"{sys.base_prefix}/lib")
    return {
        **os.environ,
        "LD_LIBRARY_PATH": os.pathsep.join(libraries),
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)]),
    }


def why_not() -> str:
    """Why no server can run here, and what to do about it; empty if one can."""
    packages = site_packages()
    if packages is None:
        return f"nvidia-pytriton is not installed; run `make triton`, or name its environment in {VARIABLE}"
    stub = _stub(packages)
    if not stub.exists():
        there = ", ".join(sorted(path.parent.name for path in stub.parent.parent.glob("*/*")))
        return f"nvidia-pytriton has Python backends for {there}, not for {stub.parent.name}"
    listed = subprocess.run(
        ["ldd", stub], env=_environment(packages), capture_output=True, text=True, check=False
    )
    missing = [line.strip() for line in (listed.stdout + listed.stderr).splitlines() if "not found" in line]
    if missing:
        debian = f"apt-get install libpython{stub.parent.name}"
        return f"Triton's Python backend lacks a library: {missing[0]} (Debian: {debian})"
    return ""


class TritonServer:
    """Starts `tritonserver` over `repository` on entry, waits until every model is ready, ends it on exit.

    `flags` are added to its own. `url` is where it answers gRPC. `kill` and `start` are for tests of what a client does
    when the server goes and comes back at the same address.
    """

    def __init__(self, repository: Path, flags: Sequence[str] = (), *, grpc_port: int = 0) -> None:
        self.repository = repository
        self.port = grpc_port or free_port()
        self.url = f"127.0.0.1:{self.port}"
        self._flags = flags
        self._prefix = f"cdm_triton_{secrets.token_hex(4)}_"
        self._folder = tempfile.TemporaryDirectory(prefix="triton-")
        self._output: IO[bytes] = (Path(self._folder.name) / "log").open("w+b")
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        try:
            self.start()
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end(signal.SIGTERM)
        self._output.close()
        self._folder.cleanup()

    @property
    def log(self) -> str:
        """All that it has printed."""
        self._output.seek(0)
        return self._output.read().decode(errors="replace")

    def start(self) -> None:
        """Start the process and wait until its models are ready.

        Raises:
            ServerError: there is no server here, it ended, or it was not ready in time.
        """
        if reason := why_not():
            raise ServerError(reason)
        packages = site_packages()
        assert packages is not None
        server = packages / "pytriton/tritonserver"
        backends = Path(self._folder.name) / "backends"
        if not backends.exists():  # the stub must lie beside the backend
            shutil.copytree(server / "backends", backends)
            shutil.copy(_stub(packages), backends / "python")
        command = [
            str(server / "bin/tritonserver"),
            f"--model-repository={self.repository}",
            f"--backend-directory={backends}",
            f"--backend-config=python,shm-region-prefix-name={self._prefix}",
            "--allow-http=false",
            "--allow-metrics=false",
            "--grpc-address=127.0.0.1",
            f"--grpc-port={self.port}",
            "--exit-timeout-secs=10",
            "--disable-auto-complete-config",  # our models' are complete, and asking costs a process for each
            *self._flags,
        ]
        # A session of its own: the stubs are its children, and a killed server leaves them behind.
        with held_signals():
            self._process = subprocess.Popen(
                command,
                env=_environment(packages),
                stdin=subprocess.DEVNULL,
                stdout=self._output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self._wait()

    def _wait(self) -> None:
        assert self._process is not None
        deadline = time.monotonic() + START_S
        with InferenceServerClient(self.url) as client:
            while time.monotonic() < deadline:
                if self._process.poll() is not None:
                    code = self._process.returncode
                    raise ServerError(f"tritonserver ended with exit code {code}: {self._errors()}")
                try:
                    if client.is_server_ready(client_timeout=5):
                        return
                except InferenceServerException:  # not listening yet
                    pass
                time.sleep(POLL_S)
        raise ServerError(f"tritonserver was not ready within {START_S:g} s: {self._errors()}")

    def _errors(self) -> str:
        """What it says went wrong: "E1122 …" and "error: …"; else the last that it said."""
        lines = self.log.splitlines()
        return "\n".join([line for line in lines if re.match(r"E\d{4} |error:", line)] or lines[-20:])

    def wait(self) -> None:
        """Wait until it ends by itself, which is a `ServerError`."""
        assert self._process is not None
        raise ServerError(f"tritonserver ended with exit code {self._process.wait()}: {self._errors()}")

    def kill(self) -> None:
        """End it at once, in the middle of whatever it does."""
        self._end(signal.SIGKILL)

    def _end(self, number: signal.Signals) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        process.send_signal(number)
        try:
            process.wait(timeout=STOP_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        with contextlib.suppress(ProcessLookupError):  # none of its stubs is left
            os.killpg(process.pid, signal.SIGKILL)
        for region in SHARED.glob(f"{self._prefix}*"):
            region.unlink(missing_ok=True)


def main(argv: Sequence[str] | None = None) -> int:
    """Serve until interrupted: 0; 1 where there is no server, or it ends by itself, with what it says."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tritonserver", description=__doc__)
    parser.add_argument("repository", type=Path)
    parser.add_argument("--grpc-port", type=int, default=8001)
    arguments = parser.parse_args(argv)
    signal.signal(signal.SIGTERM, _end)
    try:
        with TritonServer(arguments.repository, grpc_port=arguments.grpc_port) as server:
            print(f"Triton answers gRPC at {server.url}; Ctrl-C ends it", flush=True)
            server.wait()
    except ServerError as error:
        print(error, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        pass
    return 0


def _end(number: int, frame: FrameType | None) -> None:
    del number, frame
    raise KeyboardInterrupt


if __name__ == "__main__":
    raise SystemExit(main())
