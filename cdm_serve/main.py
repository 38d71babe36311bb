"""`cdm-serve`: load bundles, load their engines, listen."""

from __future__ import annotations

import asyncio
import errno
import ipaddress
import logging
import signal
import socket
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from types import FrameType

import uvicorn
from fastapi import FastAPI

from cdm_serve import logs
from cdm_serve.app import create_app
from cdm_serve.keys import KeyRing
from cdm_serve.models import Models
from cdm_serve.protocol import BoundedHttp
from cdm_serve.settings import ServeSettings, default_bundle
from engines.base import load_engine
from engines.bundle import Bundle, load_bundle
from engines.cli import UsageError, run_command
from engines.errors import BundleError

log = logging.getLogger("cdm_serve")

EXAMPLES = """
cdm-serve
cdm-serve --bundle bundles/mine --port 8080 --max-batch 16
cdm-serve --bundle bundles/mine --bundle bundles/other
cdm-serve --engine fake
curl --json '{"prompt": "red apple"}' localhost:8000/generate -o apple.png
"""

# What answering takes after the last picture: uvicorn's own limit must not cut the runner's shorter.
ANSWER_S = 5
INTERRUPTED = 130
KEEP_ALIVE_S = 75
"""Longer than proxies and clients keep a connection that is not used: who closes first loses no request."""


def main(argv: Sequence[str] | None = None) -> int:
    """The console script; returns the exit code."""
    return run_command(ServeSettings, serve, argv, prog="cdm-serve", epilog=EXAMPLES)


def serve(settings: ServeSettings) -> int:
    """Serve until told to stop.

    Raises:
        BundleError, RuntimeUnavailable: there is nothing to serve, or nothing to serve it with.
        UsageError: the address cannot be listened on.
    """
    logs.configure(settings.log_format, settings.log_level, settings.log_prompts)
    with listen(settings.host, settings.port) as listener:
        app = open_app(settings)
        models: Models = app.state.models
        info = models.default.engine.info
        where = f"{info.device} ({info.runtime} {info.precision})"
        names = ", ".join(service.name for service in models.services)
        log.info("serving %s on %s at http://%s", names, where, _address(listener))
        if settings.keys is None and not _is_loopback(listener):
            log.warning(
                "whoever reaches --host=%s may use%s this server; let it ask for a key with --keys",
                settings.host,
                " and administer" if settings.admin_open else "",
            )
        config = uvicorn.Config(
            app,
            log_config=None,
            access_log=False,
            server_header=False,
            http=BoundedHttp,
            limit_concurrency=settings.max_connections,
            timeout_keep_alive=KEEP_ALIVE_S,
            timeout_graceful_shutdown=int(settings.drain_timeout_s) + ANSWER_S,
        )
        server = Server(config, on_exit=models.drain_soon, on_force=models.give_up_soon)
        # By SystemExit some versions of uvicorn end a start that failed.
        with read_again_on_hangup(app.state.keys), suppress(SystemExit):
            server.run(sockets=[listener])
    if server.force_exit:
        return INTERRUPTED
    return 0 if server.started and models.ended else 1  # uvicorn has logged why the app could not start


def open_app(settings: ServeSettings) -> FastAPI:
    """The app around the engines of every bundle that is to be served; it closes them, or this does where it fails."""
    with ExitStack() as opened:
        engines = []
        with opened_bundles(settings) as bundles:
            for bundle in bundles:
                engines.append(load_engine(bundle, settings.engine_options()))
                opened.callback(engines[-1].close)
        app = create_app(settings, *engines)
        opened.pop_all()
    return app


def _address(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _is_loopback(listener: socket.socket) -> bool:
    return ipaddress.ip_address(listener.getsockname()[0].partition("%")[0]).is_loopback


@contextmanager
def read_again_on_hangup(keys: KeyRing | None) -> Iterator[None]:
    """SIGHUP, as long as the body takes: the keys are read again. Without keys it ends the process, as ever."""
    if keys is None:
        yield
        return

    def on_hangup(*_: object) -> None:
        with suppress(RuntimeError):  # the loop is not running yet, or no more
            asyncio.get_running_loop().call_soon_threadsafe(keys.reload)

    before = signal.signal(signal.SIGHUP, on_hangup)
    try:
        yield
    finally:
        signal.signal(signal.SIGHUP, before)


class Server(uvicorn.Server):
    """uvicorn, which tells us of a signal at once and ends with our exit code rather than by that signal."""

    def __init__(
        self, config: uvicorn.Config, on_exit: Callable[[], None], on_force: Callable[[], None]
    ) -> None:
        super().__init__(config)
        self._on_exit = on_exit
        self._on_force = on_force

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """First signal: drain. A second Ctrl-C: leave now."""
        if self.should_exit and sig == signal.SIGINT:
            if self.started and not self.force_exit:
                self._on_force()
            self.force_exit = True
        elif not self.should_exit:
            self.should_exit = True
            if self.started:
                self._on_exit()


@contextmanager
def opened_bundles(settings: ServeSettings) -> Iterator[list[Bundle]]:
    """The bundles to serve: the named ones, the bundled one, or for the fake engine one made up on the spot."""
    if settings.bundle or default_bundle().is_dir():
        yield [load_bundle(root) for root in settings.bundle or (default_bundle(),)]
        return
    if settings.engine != "fake":
        raise BundleError(
            "no model is bundled with this installation; name one with --bundle, or try --engine fake"
        )
    from engines.fake import fake_bundle

    with tempfile.TemporaryDirectory(prefix="cdm-fake-") as folder:
        yield [fake_bundle(Path(folder))]


def listen(host: str, port: int) -> socket.socket:
    """A listening socket, before anything slow: a taken port is told at once."""
    try:
        family, _, _, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        return socket.create_server(address[:2], family=family)
    except (OSError, UnicodeError) as error:
        reason = (error.strerror if isinstance(error, OSError) else None) or error
        raise UsageError(
            f"cannot listen on --host={host} --port={port}: {reason}; {_remedy(error, port)}"
        ) from error


def _remedy(error: OSError | UnicodeError, port: int) -> str:
    code = error.errno if isinstance(error, OSError) else None
    if isinstance(error, (socket.gaierror, UnicodeError)) or code in (
        errno.EADDRNOTAVAIL,
        errno.EAFNOSUPPORT,
    ):
        return "choose an address of this machine with --host (127.0.0.1: this machine only; 0.0.0.0: all)"
    if code == errno.EACCES and 0 < port < 1024:
        return "ports below 1024 are for privileged users; choose one from 1024 on with --port"
    return "choose another with --port"


if __name__ == "__main__":
    raise SystemExit(main())
