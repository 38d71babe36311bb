"""`auto` takes what measures fastest, says so, and remembers it for exactly this model and machine."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

import engines.choose
from engines.base import Engine, EngineOptions
from engines.bundle import Bundle
from engines.choose import choose
from engines.errors import RuntimeUnavailable
from engines.fake import FakeEngine, fake_bundle

MS = 0.001
Load = Callable[[str, Bundle, EngineOptions], Engine]


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Bundle, list[str], dict[str, float]]:
    """A bundle, the runtimes loaded so far, and what a call costs on each (seconds); none for a name: not installed.

    Time is counted, not waited for.
    """
    clock, loaded, costs = [0.0], [], {"slow": 9 * MS, "quick": 2 * MS}

    def sleep(seconds: float) -> None:
        clock[0] += seconds

    def load(name: str, bundle: Bundle, options: EngineOptions) -> Engine:
        if name not in costs:
            raise RuntimeUnavailable(f"runtime {name!r} needs the package {name!r}, which is not installed")
        label = f"{name} {options.threads}" if options.threads else name
        loaded.append(label)
        cost = costs.get(label, costs[name])
        engine = FakeEngine(bundle, EngineOptions(), cost=lambda *_: cost, sleep=sleep)
        if costs[name] < 0:
            engine.fail("denoise")
        engine.info = engine.info.__class__(**{**vars(engine.info), "runtime": name})
        return engine

    monkeypatch.setattr(engines.choose, "load_runtime", load)
    monkeypatch.setattr(engines.choose, "AUTO", ("slow", "quick", "absent"))
    monkeypatch.setattr(engines.choose, "AUTO_GPU", ("gpu",))
    monkeypatch.setattr(engines.choose.processor, "gpus", tuple)
    monkeypatch.setattr(engines.choose.processor, "available", lambda: 1)
    monkeypatch.setattr(engines.choose.time, "perf_counter", lambda: clock[0])
    return fake_bundle(tmp_path), loaded, costs


def test_the_fastest_is_taken_and_the_figures_are_told(
    machine: tuple[Bundle, list[str], dict[str, float]],
) -> None:
    bundle, loaded, _ = machine
    info = choose(bundle, EngineOptions()).info
    assert info.runtime == "quick"
    assert info.why == "quick float32 makes a picture of 4 steps in 12 ms, slow float32 in 54 ms"
    assert loaded == ["slow", "quick", "quick"]


def test_the_order_of_candidates_decides_nothing(
    machine: tuple[Bundle, list[str], dict[str, float]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engines.choose, "AUTO", ("quick", "slow"))
    assert choose(machine[0], EngineOptions()).info.runtime == "quick"


def test_verdict_is_remembered_until_something_changes(
    machine: tuple[Bundle, list[str], dict[str, float]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle, loaded, costs = machine
    options = EngineOptions(cache_dir=tmp_path / "cache")
    choose(bundle, options)
    loaded.clear()
    costs["slow"] = 1 * MS  # would win now
    info = choose(bundle, options).info
    assert (info.runtime, loaded) == ("quick", ["quick"])
    assert info.why.endswith("(measured at an earlier start)")
    assert choose(bundle, EngineOptions(cache_dir=tmp_path / "cache", threads=3)).info.runtime == "slow"
    assert choose(bundle, options).info.runtime == "quick"


@pytest.mark.parametrize(
    ("what", "now"),
    [
        ("processor.name", lambda: "another processor"),
        ("processor.available", lambda: 64),
        ("processor.gpus", lambda: ("a GPU",)),
        ("code_hash", lambda *_: "another cdm-serve"),
        ("_version", lambda _: "another version"),
    ],
)
def test_verdict_of_another_machine_or_version_is_measured_anew(
    machine: tuple[Bundle, list[str], dict[str, float]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    what: str,
    now: Callable[..., object],
) -> None:
    bundle, _, costs = machine
    options = EngineOptions(cache_dir=tmp_path / "cache")
    choose(bundle, options)
    costs["slow"] = 1 * MS
    monkeypatch.setattr(f"engines.choose.{what}", now)
    assert choose(bundle, options).info.runtime == "slow"


def test_runtimes_of_gpus_are_measured_where_there_is_one(
    machine: tuple[Bundle, list[str], dict[str, float]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And get no number of threads, which they refuse: neither then nor when the verdict is remembered."""
    bundle, loaded, costs = machine
    costs["gpu"] = 0.1 * MS
    options = EngineOptions(threads=3, cache_dir=tmp_path)
    assert choose(bundle, options).info.runtime == "quick"
    monkeypatch.setattr(engines.choose.processor, "gpus", lambda: ("a GPU",))
    monkeypatch.setattr(engines.choose.processor, "available", lambda: 8)
    loaded.clear()
    assert choose(bundle, options).info.runtime == "gpu"
    assert choose(bundle, options).info.runtime == "gpu"
    assert loaded == ["gpu", "slow 3", "quick 3", "gpu", "gpu"]


def test_remembered_runtime_that_is_gone_is_measured_anew(
    machine: tuple[Bundle, list[str], dict[str, float]], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    bundle, _, costs = machine
    options = EngineOptions(cache_dir=tmp_path / "cache")
    choose(bundle, options)
    del costs["quick"]
    info = choose(bundle, options).info
    assert info.runtime == "slow"
    assert info.why.startswith(
        "slow is the only runtime that works here: runtime 'quick' needs the package 'quick'"
    )
    assert "does not load any more" in caplog.text


def test_candidate_that_fails_is_left_out_with_its_reason(
    machine: tuple[Bundle, list[str], dict[str, float]],
) -> None:
    bundle, _, costs = machine
    costs["quick"] = -MS
    info = choose(bundle, EngineOptions()).info
    assert info.runtime == "slow"
    assert "quick fails: denoise call 1 was told to fail" in info.why


def test_nothing_that_works_is_an_error_with_every_reason(
    machine: tuple[Bundle, list[str], dict[str, float]],
) -> None:
    bundle, _, costs = machine
    costs.clear()
    with pytest.raises(
        RuntimeUnavailable, match=r"no runtime works here: runtime 'slow' .*; runtime 'quick'"
    ):
        choose(bundle, EngineOptions())


@pytest.mark.parametrize(("with_two", "taken"), [(1.5, 2), (1.96, 0), (3.0, 0)])
def test_half_the_processors_are_taken_where_they_are_clearly_faster(
    machine: tuple[Bundle, list[str], dict[str, float]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    with_two: float,
    taken: int,
) -> None:
    """The fastest runtime alone is measured so, and the number is remembered."""
    bundle, loaded, costs = machine
    monkeypatch.setattr(engines.choose.processor, "available", lambda: 4)
    costs["quick 2"] = with_two * MS
    options = EngineOptions(cache_dir=tmp_path / "cache")
    why = choose(bundle, options).info.why
    assert loaded == ["slow", "quick", "quick 2", "quick 2" if taken else "quick"]
    assert f"quick float32 with 2 threads {'makes' if taken else 'in'} " in why
    loaded.clear()
    choose(bundle, options)
    assert loaded == ["quick 2" if taken else "quick"]


def test_a_number_of_threads_that_was_asked_for_is_kept(
    machine: tuple[Bundle, list[str], dict[str, float]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle, loaded, costs = machine
    monkeypatch.setattr(engines.choose.processor, "available", lambda: 8)
    costs["quick 4"] = 0.1 * MS
    choose(bundle, EngineOptions(threads=3, cache_dir=tmp_path))
    assert loaded == ["slow 3", "quick 3", "quick 3"]
    choose(bundle, EngineOptions(threads=3, cache_dir=tmp_path))
    assert loaded == ["slow 3", "quick 3", "quick 3", "quick 3"]


def test_no_two_engines_are_in_memory_together(
    machine: tuple[Bundle, list[str], dict[str, float]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The fastest is loaded again at the end, for what it shall serve."""
    bundle, loaded, costs = machine
    costs["slow"], costs["quick"], costs["gpu"] = 2 * MS, 9 * MS, 3 * MS
    monkeypatch.setattr(engines.choose.processor, "gpus", lambda: ("a GPU",))
    alive, batches = [0], []
    load = engines.choose.load_runtime

    def counted(name: str, bundle: Bundle, options: EngineOptions) -> Engine:
        assert alive[0] == 0
        engine = load(name, bundle, options)
        alive[0] += 1
        batches.append(options.max_batch)
        close = engine.close

        def closed() -> None:
            alive[0] -= 1
            close()

        monkeypatch.setattr(engine, "close", closed)
        return engine

    monkeypatch.setattr(engines.choose, "load_runtime", counted)
    assert choose(bundle, EngineOptions(max_batch=6)).info.runtime == "slow"
    assert loaded == ["gpu", "slow", "quick", "slow"]
    assert batches == [6] * 4
    assert alive == [1]
