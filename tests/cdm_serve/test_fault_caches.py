"""Faults of the caches, with the bundled model: they cost time, and nothing else."""

from __future__ import annotations

import hashlib
import shutil
import signal
import sys
from pathlib import Path

import httpx
import numpy as np
import pytest

from cdm_serve.settings import default_bundle
from engines.base import EngineOptions, load_engine
from engines.bundle import load_bundle
from engines.noise import noise
from tests.cdm_serve.helpers import PATIENCE_S
from tests.cdm_serve.processes import assert_picture, crowd, process

CROWD = 30
BUNDLED = ("--engine", "openvino", "--threads", "1", "--max-batch", "2")


@pytest.fixture(scope="module")
def warm_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the bundled model compiled, as `BUNDLED` servers look for it."""
    folder = tmp_path_factory.mktemp("compiled")
    load_engine(load_bundle(default_bundle()), EngineOptions("openvino", threads=1, cache_dir=folder)).close()
    assert list(folder.rglob("*.blob"))
    return folder


@pytest.mark.slow
def test_damaged_compiled_models_are_compiled_anew(
    tmp_path: Path, warm_cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cache = shutil.copytree(warm_cache, tmp_path / "cache")
    (folder,) = cache.iterdir()
    bundle, options = load_bundle(default_bundle()), EngineOptions("openvino", threads=1, cache_dir=cache)

    def picture() -> bytes:
        engine = load_engine(bundle, options)
        latent = engine.manifest.latent
        size = engine.manifest.default_size
        shape = (latent.channels, size.height // latent.downscale, size.width // latent.downscale)
        (code,) = engine.encode([engine.tokenize("red apple")])
        ((x,), _) = engine.denoise([engine.put(noise(7, shape))], [1.0], [0.0], [code])
        image = np.asarray(engine.decode([x]))
        engine.close()
        return image.tobytes()

    good = picture()
    assert caplog.text == ""
    truncated, flipped, foreign = (
        folder / f"{name}.blob" for name in ("text_encoder-1", "decoder-1x16x16", "time")
    )
    truncated.write_bytes(truncated.read_bytes()[:1000])
    data = bytearray(flipped.read_bytes())
    data[len(data) // 2] ^= 1
    flipped.write_bytes(data)
    # whole, by its hash, but nothing that this runtime can read: as a model compiled for another processor
    foreign.write_bytes(hashlib.sha256(b"nothing").digest() + b"nothing")
    harmed = {path: path.read_bytes() for path in (truncated, flipped, foreign)}
    assert picture() == good
    assert caplog.text.count("is damaged, its model is compiled anew") == 2
    assert "the stored time cannot be used, it is compiled anew" in caplog.text
    assert all(path.read_bytes() != bytes_ for path, bytes_ in harmed.items())
    caplog.clear()
    assert picture() == good
    assert caplog.text == ""


@pytest.mark.slow
def test_killed_server_is_back_on_its_port_and_cache(tmp_path: Path, warm_cache: Path) -> None:
    flags = (*BUNDLED, "--cache-dir", str(warm_cache))

    def compiled() -> dict[Path, int]:
        return {path: path.stat().st_mtime_ns for path in warm_cache.rglob("*.blob")}

    there = compiled()
    with process(tmp_path, *flags) as first:
        port = first.port
        before = first.draw("red apple", seed=7)
        assert_picture(before, 7)
        with crowd(first, CROWD, num_images=2, steps=4, response_format="json") as asked:
            first.popen.kill()
            assert first.popen.wait(PATIENCE_S) == -signal.SIGKILL
            failures = [request.exception() for request in asked]
        assert any(isinstance(failure, httpx.TransportError) for failure in failures)
        assert all(failure is None or isinstance(failure, httpx.TransportError) for failure in failures)
    left = compiled()
    assert there.items() <= left.items()  # and what other batches needed
    with process(tmp_path, *flags, port=port) as second:
        assert second.draw("red apple", seed=7).content == before.content
    assert left.items() <= compiled().items()


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="prlimit is Linux's")
def test_full_disk_costs_the_cache_and_nothing_else(tmp_path: Path) -> None:
    """No file may grow beyond 4 KiB: what a full disk does to a write, without one."""
    cache = tmp_path / "cache"
    limit = ("prlimit", "--fsize=4096")
    with process(tmp_path, *BUNDLED, "--cache-dir", str(cache), wrapper=limit) as server:
        assert_picture(server.draw("red apple", seed=7), 7)
        assert server.log().count("could not be written") >= 4
        server.popen.send_signal(signal.SIGTERM)
        assert server.popen.wait(PATIENCE_S) == 0
    assert not [path for path in cache.rglob("*") if path.suffix in (".blob", ".partial")]
