"""A real Triton server that waits for more requests, hangs, is killed, and comes back."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterator

import pytest
from tritonclient.grpc import InferenceServerClient, InferRequestedOutput

from benchmarks.tritonserver import TritonServer, why_not
from engines import triton_memory
from engines.base import Engine, EngineOptions, load_engine
from engines.bundle import Bundle
from engines.errors import ExecutionError, RuntimeUnavailable
from engines.triton import TritonEngine
from engines.triton_memory import plain_input
from engines.triton_repository.repository import write_repository
from engines.triton_repository.settings import RepositorySettings
from tests.engines.pictures import draw, starting_noise, worst
from tests.engines.triton_helpers import JOBS, options, regions

pytestmark = pytest.mark.skipif(bool(why_not()), reason=why_not() or "a server runs here")

DELAY_US = 100_000


@pytest.fixture(scope="module")
def reference(bundle: Bundle) -> Engine:
    return load_engine(bundle, EngineOptions("onnxruntime", threads=1))


@pytest.fixture(scope="module")
def batching(bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TritonServer]:
    """A server that waits for more requests, and that tests may kill."""
    out = tmp_path_factory.mktemp("triton") / "repository"
    write_repository(bundle, out, RepositorySettings(backend="python", threads=1, queue_delay_us=DELAY_US))
    with TritonServer(out) as started:
        yield started


def test_triton_joins_the_requests_of_several_clients(
    bundle: Bundle, batching: TritonServer, reference: Engine
) -> None:
    name = f"{bundle.manifest.name}-decoder"
    latents = [starting_noise(reference, job)[None] for job in JOBS]
    wanted = [reference.run("decoder", {"x": x})["image"] for x in latents]  # type: ignore[attr-defined]
    pictures: list[object] = [None] * len(latents)

    def ask(row: int) -> None:
        with InferenceServerClient(batching.url) as client:
            result = client.infer(
                name, [plain_input("x", latents[row])], outputs=[InferRequestedOutput("image")]
            )
            pictures[row] = result.as_numpy("image")

    with InferenceServerClient(batching.url) as client:
        before = client.get_inference_statistics(name).model_stats[0]
        clients = [threading.Thread(target=ask, args=(row,)) for row in range(len(latents))]
        for thread in clients:
            thread.start()
        for thread in clients:
            thread.join()
        deadline = time.monotonic() + 10  # Triton counts a request a moment after it has answered
        while (after := client.get_inference_statistics(name).model_stats[0]).inference_count < (
            before.inference_count + len(latents)
        ) and time.monotonic() < deadline:
            time.sleep(0.05)
    assert after.inference_count - before.inference_count == len(latents)
    assert after.execution_count - before.execution_count < len(latents)
    for picture, expected in zip(pictures, wanted, strict=True):
        assert worst(picture, expected) <= 1  # type: ignore[arg-type]


def test_a_server_that_waits_is_told_of_and_cannot_promise_equal_bytes(
    bundle: Bundle, batching: TritonServer, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, logger="engines.triton"):
        TritonEngine(bundle, options(batching)).close()
    assert f"-denoiser wait up to {DELAY_US} µs" in caplog.text
    with pytest.raises(RuntimeUnavailable, match=r"invariant_batch=2 cannot hold: .* may join requests"):
        TritonEngine(bundle, options(batching, invariant_batch=2))


# a server that goes


def test_a_call_that_takes_too_long_fails_and_its_memory_is_not_used_again(
    bundle: Bundle, batching: TritonServer, reference: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(triton_memory, "SMALL_BYTES", 0)
    engine = TritonEngine(
        bundle, options(batching), timeout_s=DELAY_US / 1e6 / 4
    )  # it will wait for others first
    region = engine._region
    with pytest.raises(
        ExecutionError, match=r"triton failed in text_encoder at batch 1: .*Deadline Exceeded"
    ):
        engine.encode([engine.tokenize("red apple")])
    engine._timeout_s = 60.0
    assert worst(draw(engine, JOBS), draw(reference, JOBS)) == 0
    assert engine._region is not None
    assert engine._region is not region
    engine.close()


@pytest.mark.parametrize("shared_memory", [True, False])
def test_a_killed_server_fails_calls_until_it_is_back(
    bundle: Bundle,
    batching: TritonServer,
    reference: Engine,
    shared_memory: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(triton_memory, "SMALL_BYTES", 0)
    engine = TritonEngine(bundle, options(batching), shared_memory=shared_memory)
    wanted = draw(reference, JOBS[:2])
    conditioning = engine.encode([engine.tokenize(job.prompt) for job in JOBS[:2]])
    noise = [starting_noise(engine, job) for job in JOBS[:2]]
    # In the middle of a call: the dynamic batcher holds it while it waits for more.
    killer = threading.Timer(DELAY_US / 1e6 / 2, batching.kill)
    killer.start()
    with pytest.raises(ExecutionError, match=r"triton failed in denoiser at batch 2"):
        engine.denoise(noise, [1.0, 1.0], [0.5, 0.5], conditioning)
    killer.join()
    with pytest.raises(ExecutionError, match=r"no Triton server answers gRPC"):
        engine.decode(noise)
    batching.start()
    assert worst(draw(engine, JOBS[:2]), wanted) == 0
    if shared_memory:  # restarted between two calls: nobody fails
        assert len(regions(batching)) == 1
        batching.kill()
        batching.start()
        assert worst(draw(engine, JOBS[:2]), wanted) == 0
        assert len(regions(batching)) == 1
    engine.close()


def test_a_server_that_comes_back_as_another_is_refused(
    bundle: Bundle, batching: TritonServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = TritonEngine(bundle, options(batching))
    engine._disconnect()
    write_repository(
        bundle, batching.repository, RepositorySettings(backend="python", threads=1, max_batch=2)
    )
    batching.kill()
    batching.start()
    with pytest.raises(
        ExecutionError, match=r"came back with f32 and batches of 2, not f32 and 8; restart cdm-serve"
    ):
        engine.encode([engine.tokenize("red apple")])
    engine.close()
