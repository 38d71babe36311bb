"""Several processes, one cache: one builds, the others wait for it and read its result, whatever becomes of it."""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from multiprocessing.context import SpawnProcess
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from engines import cache_lock
from engines.base import EngineOptions
from engines.bundle import load_bundle
from engines.cache import CompiledCache
from engines.cache_lock import LOCK, only_builder

SPAWN = multiprocessing.get_context("spawn")
PATIENCE_S = 60
EMOJI = Path(__file__).resolve().parents[2] / "cdm_serve" / "bundles" / "emoji"


class Event(NamedTuple):
    """`multiprocessing.Event` as a file: that one cannot be set any more once a process that waits for it is killed."""

    path: Path

    def set(self) -> None:
        self.path.touch()

    def wait(self) -> None:
        ends = time.monotonic() + PATIENCE_S
        while not self.path.exists():
            assert time.monotonic() < ends, self.path.name
            time.sleep(0.02)


class Signals(logging.Handler):
    """Sets an event once the cache says that it waits for another process."""

    def __init__(self, waiting: Event) -> None:
        super().__init__()
        self._waiting = waiting

    def emit(self, record: logging.LogRecord) -> None:
        if "waiting for its" in record.getMessage():
            self._waiting.set()


def tell_of_waiting(waiting: Event) -> None:
    """Have `waiting` set in this process as it begins to wait."""
    log = logging.getLogger("engines.cache")
    log.setLevel(logging.INFO)
    log.addHandler(Signals(waiting))


def obtain(
    root: Path, who: str, building: Event, waiting: Event, go: Event, results: Any, fails: bool = False
) -> None:
    """In a process of its own: a build says that it has begun, and takes until `go`."""
    tell_of_waiting(waiting)
    builds = 0

    def build() -> tuple[bytes, bytes]:
        nonlocal builds
        builds += 1
        building.set()
        go.wait()
        if fails:
            raise RuntimeError("no such operator")
        body = f"built by {who}".encode()
        return body, body

    cache = CompiledCache.open(root, "fake", model="a")
    try:
        body = cache.obtain("denoiser", bytes, build)
    except RuntimeError as error:
        body = str(error).encode()
    results.put((who, body, builds))


class Race:
    """Two processes that want the same model: the second is started once the first builds."""

    def __init__(self, root: Path, target: Callable[..., None], fails: bool = False) -> None:
        self.root, self.target = root, target
        self.building, self.waiting, self.go = (Event(root / name) for name in ("building", "waiting", "go"))
        self.results: Any = SPAWN.Queue()
        self.processes: list[SpawnProcess] = []
        self.start("first", fails)
        self.building.wait()
        self.start("second")
        self.waiting.wait()

    def start(self, who: str, fails: bool = False) -> None:
        signals = (self.building, self.waiting, self.go)
        process = SPAWN.Process(
            target=self.target, args=(self.root, who, *signals, self.results, fails), daemon=True
        )
        process.start()
        self.processes.append(process)

    def ends(self, count: int = 2) -> list[Any]:
        found = sorted(self.results.get(timeout=PATIENCE_S) for _ in range(count))
        for process in self.processes:
            process.join(PATIENCE_S)
        return found


@pytest.fixture
def race(tmp_path: Path) -> Iterator[Callable[..., Race]]:
    races: list[Race] = []

    def start(target: Callable[..., None] = obtain, **given: Any) -> Race:
        races.append(Race(tmp_path, target, **given))
        return races[-1]

    yield start
    for each in races:
        for process in each.processes:
            process.kill()
            process.join(PATIENCE_S)


def test_second_process_waits_and_reads_what_the_first_has_built(race: Callable[..., Race]) -> None:
    two = race()
    two.go.set()
    assert two.ends() == [("first", b"built by first", 1), ("second", b"built by first", 0)]


def test_first_process_killed_as_it_builds_leaves_the_second_to_build(race: Callable[..., Race]) -> None:
    two = race()
    first = two.processes[0]
    assert first.pid is not None
    os.kill(first.pid, signal.SIGKILL)
    two.go.set()
    assert two.ends(1) == [("second", b"built by second", 1)]
    two.start("third")
    assert two.ends(1) == [("third", b"built by second", 0)]


def test_first_process_that_cannot_build_leaves_the_second_to_try(race: Callable[..., Race]) -> None:
    two = race(fails=True)
    two.go.set()
    assert two.ends() == [("first", b"no such operator", 1), ("second", b"built by second", 1)]


def load_openvino(
    root: Path, who: str, building: Event, waiting: Event, go: Event, results: Any, _: bool
) -> None:
    """In a process of its own: the bundled model on OpenVINO; the first of its builds takes until `go`."""
    from engines.openvino import OpenVINOEngine

    tell_of_waiting(waiting)
    built: list[str] = []
    model = OpenVINOEngine._model

    def counted(engine: OpenVINOEngine, name: str, shape: Any) -> Any:
        built.append(f"{name} {shape}")
        building.set()
        go.wait()
        return model(engine, name, shape)

    OpenVINOEngine._model = counted  # type: ignore[method-assign]
    engine = OpenVINOEngine(load_bundle(EMOJI), EngineOptions("openvino", "f32", threads=1, cache_dir=root))
    states = engine.encode([engine.tokenize("red apple")])[0]
    results.put((who, tuple(built), tuple(array.tobytes() for array in states)))
    engine.close()


def test_two_servers_that_start_at_once_compile_every_model_once(
    race: Callable[..., Race], tmp_path: Path
) -> None:
    two = race(load_openvino)
    two.go.set()
    (_, first, mine), (_, second, theirs) = two.ends()
    blobs = list(tmp_path.rglob("*.blob"))
    assert len(first) + len(second) == len(set(first + second)) == len(blobs)
    assert mine == theirs


def test_threads_of_one_process_build_once(tmp_path: Path) -> None:
    cache = CompiledCache.open(tmp_path, "fake", model="a")
    builds, found = [], []
    together = threading.Barrier(4)

    def build() -> tuple[bytes, bytes]:
        builds.append(1)
        return b"blob", b"blob"

    def want() -> None:
        together.wait(PATIENCE_S)
        found.append(cache.obtain("denoiser", bytes, build))

    threads = [threading.Thread(target=want) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE_S)
    assert (found, len(builds)) == ([b"blob"] * 4, 1)


def test_lock_of_a_process_that_hangs_is_waited_for_so_long_and_no_longer(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    ran = []
    with only_builder(tmp_path, "denoiser"):
        with only_builder(tmp_path, "denoiser", patience_s=0.0):
            ran.append("all the same")
        assert f"another process has been compiling for {tmp_path} for over 0 s" in caplog.text
        caplog.clear()
        with only_builder(tmp_path, "decoder", patience_s=0.0):
            ran.append("again, for it was not taken from its owner")
        assert caplog.text
    caplog.clear()
    with only_builder(tmp_path, "denoiser", patience_s=0.0):
        ran.append("alone")
    assert caplog.text == ""
    assert len(ran) == 3


def test_lock_ends_though_a_forked_child_of_the_builder_lives_on(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with only_builder(tmp_path, "denoiser"):
        child = os.fork()
        if child == 0:
            signal.pause()
    try:
        with only_builder(tmp_path, "denoiser", patience_s=0.0):
            pass
        assert caplog.text == ""
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


@pytest.mark.parametrize(
    "why", ["no module", "no locks on this file system", "folder that cannot be written"]
)
def test_without_locks_nobody_waits_and_every_file_is_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, why: str
) -> None:
    caplog.set_level(logging.INFO)
    cache = CompiledCache.open(tmp_path, "fake", model="a")
    assert cache.folder is not None
    if why == "no module":
        monkeypatch.setattr(cache_lock, "fcntl", None)
    elif why == "folder that cannot be written":
        (cache.folder / LOCK).mkdir()  # root may write anywhere but into a folder's bytes
    else:

        def refused(*_: object) -> None:
            raise OSError(37, "No locks available")

        monkeypatch.setattr(cache_lock.fcntl, "flock", refused)
    with only_builder(cache.folder, "denoiser"):
        assert cache.obtain("denoiser", bytes, lambda: (b"blob", b"blob")) == b"blob"
    assert cache.load("denoiser") == b"blob"
    assert caplog.text == ""
