"""Laws of the runner: batches change nobody's picture, one failure is nobody else's, a stop leaves nobody waiting."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from queue import Queue
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from cdm_serve.embeddings import EmbeddingCache
from cdm_serve.errors import GenerationFailed, ServeError, Unavailable
from cdm_serve.metrics import Metrics
from cdm_serve.picture import Picture
from cdm_serve.runner import Runner
from cdm_serve.scheduler import Scheduler
from cdm_serve.stages import MEASURED, Stages
from engines.base import EngineOptions
from engines.bundle import Bundle
from engines.fake import FakeEngine
from tests.cdm_serve.helpers import PATIENCE_S, FixedCosts, Gate, wait_until

Outcome = NDArray[np.uint8] | ServeError


class Bench:
    """A runner with a gated engine, and what it replied."""

    def __init__(self, bundle: Bundle, max_batch: int, cache: int, overlap: bool = False) -> None:
        self.gate = Gate()
        self.engine = FakeEngine(
            bundle, EngineOptions(max_batch=max_batch), cost=self.gate.cost, sleep=lambda _: None,
            overlap=overlap,
        )  # fmt: skip
        self.metrics = Metrics()
        counts = self.metrics.of("fake")
        stages = Stages(self.engine, counts, FixedCosts(), EmbeddingCache(cache))
        self.runner = Runner(stages, Scheduler(stages.costs, max_batch), counts)
        self.replies: Queue[tuple[Picture, Outcome]] = Queue()

    def start(self) -> None:
        self.runner.start()
        assert self.runner.ready.wait(PATIENCE_S)
        self.engine.calls.clear()

    def picture(self, prompt: str, seed: int, steps: int, size: tuple[int, int] = (64, 64)) -> Picture:
        sigmas = self.engine.manifest.sigmas(steps)
        reply = lambda picture, outcome: self.replies.put((picture, outcome))  # noqa: E731
        return Picture(self.engine.tokenize(prompt), seed, sigmas, *size, reply=reply)

    def replied(self, count: int) -> dict[int, Outcome]:
        """The next `count` replies by seed."""
        got = [self.replies.get(timeout=PATIENCE_S) for _ in range(count)]
        return {picture.seed: outcome for picture, outcome in got}

    def pixels(self, *pictures: Picture) -> dict[int, bytes]:
        self.runner.submit(pictures)
        outcomes = self.replied(len(pictures))
        assert all(isinstance(outcome, np.ndarray) for outcome in outcomes.values())
        return {
            seed: outcome.tobytes() for seed, outcome in outcomes.items() if isinstance(outcome, np.ndarray)
        }

    def metric(self, name: str, **labels: str) -> float:
        return self.metrics.registry.get_sample_value(name, {"model": "fake", **labels}) or 0.0


@pytest.fixture
def bench(bundle: Bundle) -> Iterator[Callable[..., Bench]]:
    benches: list[Bench] = []

    def make(start: bool = True, max_batch: int = 4, cache: int = 8) -> Bench:
        bench = Bench(bundle, max_batch, cache)
        benches.append(bench)
        if start:
            bench.start()
        return bench

    yield make
    for bench in benches:
        bench.gate.open()
        if bench.runner._threads[0].is_alive():
            bench.runner.stop(PATIENCE_S)
            bench.runner.join()


def test_same_seed_same_picture_alone_or_in_a_batch_of_mixed_steps(bench: Callable[..., Bench]) -> None:
    b = bench()
    wishes: list[tuple[str, int, int]] = [
        ("cat", 1, 4),
        ("dog", 2, 1),
        ("cat", 3, 8),
        ("red apple", 4, 2),
        ("sun", 5, 3),
    ]
    alone = {wish[1]: b.pixels(b.picture(*wish))[wish[1]] for wish in wishes}
    b.engine.calls.clear()
    together = b.pixels(*(b.picture(*wish) for wish in wishes))
    assert together == alone
    assert ("denoise", 4) in b.engine.calls  # they did share calls


def test_picture_that_joins_midway_is_the_same_picture(bench: Callable[..., Bench]) -> None:
    b = bench()
    alone = {**b.pixels(b.picture("cat", 1, 4)), **b.pixels(b.picture("dog", 2, 4))}
    b.engine.calls.clear()
    b.gate.close()
    b.runner.submit([b.picture("cat", 1, 4)])
    b.gate.wait()  # in its first step
    b.runner.submit([b.picture("dog", 2, 4)])
    b.gate.open()
    outcomes = b.replied(2)
    assert {seed: np.asarray(outcome).tobytes() for seed, outcome in outcomes.items()} == alone
    denoise = [batch for component, batch in b.engine.calls if component == "denoise"]
    assert denoise == [1, 2, 2, 2, 1]


def test_shapes_never_share_a_call(bench: Callable[..., Bench]) -> None:
    b = bench()
    b.runner.submit([b.picture("cat", 1, 2, (64, 64)), b.picture("cat", 2, 2, (128, 64))])
    outcomes = b.replied(2)
    assert np.asarray(outcomes[1]).shape == (64, 64, 3)
    assert np.asarray(outcomes[2]).shape == (64, 128, 3)
    assert max(batch for component, batch in b.engine.calls if component != "encode") == 1


def test_equal_prompts_are_encoded_once_and_then_cached(bench: Callable[..., Bench]) -> None:
    b = bench()
    b.pixels(b.picture("cat", 1, 1), b.picture("cat", 2, 1), b.picture("dog", 3, 1))
    b.pixels(b.picture("cat", 4, 1), b.picture("dog", 5, 1))
    assert [batch for component, batch in b.engine.calls if component == "encode"] == [2]
    assert b.metric("cdm_cache_hits_total", cache="embedding") == 2
    assert b.metric("cdm_cache_misses_total", cache="embedding") == 3


@pytest.mark.parametrize(("cache", "encodes"), [(0, 3), (1, 3), (2, 2)])
def test_cache_keeps_as_many_as_it_is_told(bench: Callable[..., Bench], cache: int, encodes: int) -> None:
    b = bench(cache=cache)
    for seed, prompt in enumerate(("cat", "dog", "cat")):
        b.pixels(b.picture(prompt, seed, 1))
    assert Counter(component for component, _ in b.engine.calls)["encode"] == encodes


@pytest.mark.parametrize("component", ["denoise", "decode"])
def test_engine_failure_fails_its_batch_and_no_other(bench: Callable[..., Bench], component: str) -> None:
    b = bench(max_batch=2)
    b.engine.fail(component)
    b.runner.submit([b.picture("cat", seed, 1) for seed in range(4)])
    outcomes = b.replied(4)
    for seed in (0, 1):
        assert isinstance(outcomes[seed], GenerationFailed)
        assert component in str(outcomes[seed])
    assert all(isinstance(outcomes[seed], np.ndarray) for seed in (2, 3))
    assert b.metric("cdm_pictures_total", outcome="failed") == 2
    assert len(b.pixels(b.picture("cat", 9, 4))) == 1  # and it goes on


def test_failed_encoding_spares_those_already_encoded(bench: Callable[..., Bench]) -> None:
    b = bench()
    b.pixels(b.picture("cat", 0, 1))
    b.engine.fail("encode")
    b.runner.submit([b.picture("cat", 1, 2), b.picture("dog", 2, 2)])
    outcomes = b.replied(2)
    assert isinstance(outcomes[1], np.ndarray)
    assert isinstance(outcomes[2], GenerationFailed)


def test_foreign_exception_is_answered_too(
    bench: Callable[..., Bench], monkeypatch: pytest.MonkeyPatch
) -> None:
    b = bench()

    def broken(*_: Any) -> Any:
        raise MemoryError("no memory")

    with monkeypatch.context() as patch:
        patch.setattr(b.engine, "denoise", broken)
        b.runner.submit([b.picture("cat", 1, 2)])
        assert "no memory" in str(b.replied(1)[1])
    assert len(b.pixels(b.picture("cat", 2, 2))) == 1


def test_cancel_drops_at_the_next_step_edge(bench: Callable[..., Bench]) -> None:
    b = bench()
    stay, leave = b.picture("cat", 1, 4), b.picture("dog", 2, 8)
    b.gate.close()
    b.runner.submit([stay, leave])
    b.gate.wait()
    b.runner.cancel([leave])
    b.gate.open()
    assert set(b.replied(1)) == {1}
    assert [batch for component, batch in b.engine.calls if component == "denoise"] == [2, 1, 1, 1]
    assert b.metric("cdm_cancelled_steps_total") == 7
    assert 0 < b.metric("cdm_cancelled_compute_seconds_total") < PATIENCE_S
    assert b.metric("cdm_pictures_total", outcome="cancelled") == 1
    assert b.replies.empty()


def test_picture_cancelled_while_queued_costs_nothing(bench: Callable[..., Bench]) -> None:
    b = bench(max_batch=1)
    first, second = b.picture("cat", 1, 2), b.picture("dog", 2, 2)
    b.gate.close()
    b.runner.submit([first, second])
    b.gate.wait()
    assert b.metric("cdm_queue_depth") == 1
    b.runner.cancel([second])
    b.gate.open()
    assert set(b.replied(1)) == {1}
    b.pixels(b.picture("cat", 3, 1))
    assert b.metric("cdm_queue_depth") == 0
    assert Counter(component for component, _ in b.engine.calls)["encode"] == 1


def test_stop_answers_everything_that_was_accepted(bench: Callable[..., Bench]) -> None:
    b = bench(max_batch=2)
    b.gate.close()
    b.runner.submit([b.picture("cat", seed, 3) for seed in range(5)])
    b.gate.wait()
    b.runner.stop(PATIENCE_S)
    b.gate.open()
    b.runner.join()
    assert all(isinstance(outcome, np.ndarray) for outcome in b.replied(5).values())


def test_stop_out_of_time_answers_the_rest_unavailable(bench: Callable[..., Bench]) -> None:
    b = bench(max_batch=1)
    b.gate.close("decode")
    b.runner.submit([b.picture("cat", 1, 1), b.picture("cat", 2, 1)])
    b.gate.wait()
    b.runner.stop(0.0)
    b.gate.open()
    b.runner.join()
    outcomes = b.replied(2)
    assert isinstance(outcomes[1], np.ndarray)  # its call was running
    assert isinstance(outcomes[2], Unavailable)


def test_warm_up_runs_every_component_at_every_batch_and_size(bench: Callable[..., Bench]) -> None:
    b = bench(start=False, max_batch=3)
    b.runner.start()
    assert b.runner.ready.wait(PATIENCE_S)
    sizes = len(b.engine.manifest.sizes)
    each = 1 + MEASURED
    wanted = Counter({("encode", batch): each for batch in (1, 2, 3)})
    wanted += Counter(
        {(component, batch): each * sizes for component in ("denoise", "decode") for batch in (1, 2, 3)}
    )
    assert Counter(b.engine.calls) == wanted


def test_picture_asked_for_during_warm_up_does_not_wait_for_its_end(bench: Callable[..., Bench]) -> None:
    b = bench(start=False)
    b.gate.close("encode")
    b.runner.start()
    b.gate.wait()  # in the warm-up of batch 1
    b.runner.submit([b.picture("cat", 1, 2)])
    for _ in range(1 + MEASURED):  # the rest of batch 1
        b.gate.step()
        b.gate.wait()
    b.gate.step()  # the picture's own encoding: the next batch size is still held back
    assert set(b.replied(1)) == {1}
    assert not b.runner.ready.is_set()


def test_failed_warm_up_answers_instead_of_hanging(bench: Callable[..., Bench]) -> None:
    b = bench(start=False)
    b.runner.submit([b.picture("cat", 1, 2)])
    b.engine.fail("encode")
    b.runner.start()
    outcome = b.replied(1)[1]
    assert isinstance(outcome, Unavailable)
    assert b.runner.failure == str(outcome)
    assert not b.runner.ready.is_set()
    with pytest.raises(Unavailable, match="told to fail"):
        b.runner.submit([b.picture("cat", 2, 2)])


def test_failure_after_the_stop_was_taken_in_ends_the_thread(
    bench: Callable[..., Bench], monkeypatch: pytest.MonkeyPatch
) -> None:
    b = bench(max_batch=1)
    b.gate.close()
    b.runner.submit([b.picture("cat", 1, 2), b.picture("cat", 2, 2)])
    b.gate.wait()
    b.runner.stop(PATIENCE_S)

    def broken(*_: object) -> None:
        assert b.runner._stop_at is not None  # the stop is taken in at the next step edge
        raise RuntimeError("the policy broke")

    monkeypatch.setattr(b.runner._scheduler, "schedule", broken)
    b.gate.open()
    b.runner._threads[0].join(PATIENCE_S)
    assert not b.runner._threads[0].is_alive()
    assert all(isinstance(outcome, Unavailable) for outcome in b.replied(2).values())
    assert "the policy broke" in str(b.runner.failure)


def test_spans_are_real_and_add_up(bench: Callable[..., Bench]) -> None:
    b = bench()
    picture = b.picture("cat", 1, 4)
    b.pixels(picture)
    spans = picture.spans
    assert picture.step == 4
    assert min(spans.queue, spans.encode, spans.denoise, spans.decode) > 0
    assert spans.denoise == pytest.approx(b.metric("cdm_step_seconds_sum"))
    assert b.metric("cdm_step_seconds_count") == 4


def test_decoding_overlaps_denoising_where_the_runtime_allows(bundle: Bundle) -> None:
    b = Bench(bundle, max_batch=1, cache=8, overlap=True)
    b.start()
    b.gate.close("decode")
    b.runner.submit([b.picture("cat", 1, 1)])
    b.gate.wait()  # its decoding is held back
    b.runner.submit([b.picture("dog", 2, 3)])
    wait_until(lambda: b.engine.calls.count(("denoise", 1)) == 4)
    b.gate.open()
    assert set(b.replied(2)) == {1, 2}
    b.runner.stop(PATIENCE_S)
    b.runner.join()
