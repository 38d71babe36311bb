"""What only a GPU can prove, asked of the TensorRT runtime on doubles of CUDA and TensorRT: true of it as it is, and
found out where a double lies."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cuda.bindings import runtime as real

from benchmarks.acceptance_claims import JOBS, Claims
from benchmarks.acceptance_contenders import CONTENDERS
from benchmarks.acceptance_copies import Recorder
from benchmarks.acceptance_engine import EngineOperations
from benchmarks.acceptance_parity import Examined
from benchmarks.acceptance_report import Acceptance
from benchmarks.acceptance_runtimes import Examination
from benchmarks.acceptance_worker import Worker
from engines.base import EngineOptions, GraphEngine, load_engine
from engines.bundle import Bundle, Manifest, Size, load_bundle
from engines.cuda import Cuda
from engines.export.tolerance import Tolerance
from engines.noise import noise
from engines.tensorrt import TensorRTRTXEngine
from tests.engines.fake_cuda import FakeCuda
from tests.engines.fake_tensorrt import FakeTensorRT

EMOJI = Path(__file__).resolve().parents[2] / "cdm_serve" / "bundles" / "emoji"
SIZE = [64, 64]
UNSUPPORTED = real.cudaError_t.cudaErrorStreamCaptureUnsupported


def small(bundle: Bundle) -> Bundle:
    """The same model, for pictures that take little."""
    sizes = (Size(width=64, height=64),)
    manifest = bundle.manifest.model_copy(update={"sizes": sizes, "default_size": sizes[0]})
    return Bundle(bundle.root, manifest, bundle.sha256)


class StrictCuda(FakeCuda):
    """Allocates nothing while a stream is captured, as CUDA does in the mode that we capture in."""

    def cudaMalloc(self, nbytes: int) -> Any:
        if self.capturing:
            return UNSUPPORTED, None
        return super().cudaMalloc(nbytes)


class ForgetfulGraphs(StrictCuda):
    """Its graphs run, but not on what was put into them last."""

    def cudaGraphLaunch(self, graph: Any, stream: Any) -> Any:
        queued, self._queue = self._queue, []
        result = super().cudaGraphLaunch(graph, stream)
        self._queue += queued
        return result


class ReadingEngine(TensorRTRTXEngine):
    """Looks at a latent in every step, on the host."""

    def denoise(self, samples: Any, *arguments: Any) -> Any:
        self._cuda.download(samples[0].pointer, samples[0].shape, np.dtype(np.float32))
        return super().denoise(samples, *arguments)


class CompanyEngine(TensorRTRTXEngine):
    """Lets rows know each other: the second of a batch gets the first one's noise."""

    def denoise(self, samples: Any, *arguments: Any) -> Any:
        return super().denoise([samples[0], *samples[:-1]], *arguments)


class Doubles:
    """An operator with engines of `kind` on `cuda`, whose calls are recorded, and the claims about them."""

    def __init__(self, folder: Path, kind: type[TensorRTRTXEngine], cuda: Callable[[], FakeCuda]) -> None:
        self.report = Acceptance(folder / "report", rehearsal=False)
        self.options = {
            "runtime": "tensorrt-rtx",
            "precision": "f32",
            "max_batch": 4,
            "cache_dir": str(folder / "c"),
        }
        self._kind, self._cuda = kind, cuda
        self.operations = EngineOperations(self._open)
        self.worker = Worker(self.operations)
        who = Examined("tensorrt-rtx f32", "tensorrt-rtx", "f32", own_weights=False)
        self.claims = Claims(self.report, who, folder / "pictures", Tolerance())

    def _open(self, bundle: Bundle, options: EngineOptions, recorder: Recorder | None) -> TensorRTRTXEngine:
        cuda = self._cuda()
        if recorder is not None:
            recorder._runtime = cuda
        return self._kind(small(bundle), options, trt=FakeTensorRT(cuda), runtime=recorder or cuda)

    def load(self, **how: Any) -> dict[str, Any]:
        options = {**self.options, **how.pop("options", {})}
        return {"bundle": str(EMOJI), "options": options, "device": "cpu", **how}

    @property
    def results(self) -> list[str]:
        return [row["result"] for row in self.report.parts["claims"]]


Make = Callable[..., Doubles]


@pytest.fixture
def make(tmp_path: Path) -> Any:
    made: list[Doubles] = []

    def make(
        kind: type[TensorRTRTXEngine] = TensorRTRTXEngine, cuda: Callable[[], FakeCuda] = StrictCuda
    ) -> Doubles:
        made.append(Doubles(tmp_path / str(len(made)), kind, cuda))
        made[-1].worker.call("load", **made[-1].load(record=True))
        return made[-1]

    yield make
    for doubles in made:
        doubles.worker.close()


def test_graphs_on_and_off_give_the_same_bytes_and_failed_captures_are_survived(make: Make) -> None:
    capture = Cuda.capture
    doubles = make()
    doubles.claims.mixed(doubles.worker, JOBS, SIZE)
    doubles.claims.graphs_are_used(doubles.worker)
    doubles.claims.graphs_change_nothing(doubles.worker, doubles.load(spoil_captures=True), SIZE)
    assert doubles.results == ["ok"] * 3
    assert doubles.report.parts["claims"][-1]["shapes without a graph"] == 7, (
        "of four components, the denoiser's four"
    )
    doubles.claims.graphs_are_used(doubles.worker)
    assert doubles.results[-1].startswith("failed: 7 shapes could not be captured: text_encoder at ")
    doubles.worker.close()
    assert Cuda.capture is capture


def test_graphs_that_compute_something_else_are_found(make: Make) -> None:
    doubles = make(cuda=ForgetfulGraphs)
    doubles.claims.mixed(doubles.worker, JOBS[:2], SIZE)
    doubles.claims.graphs_change_nothing(doubles.worker, doubles.load(spoil_captures=True), SIZE)
    assert doubles.results[-1] == "failed: pictures differ in their bytes with CUDA graphs and without"


def test_captures_that_do_not_fail_prove_nothing(make: Make) -> None:
    doubles = make(cuda=FakeCuda)  # which lets anybody allocate
    doubles.claims.mixed(doubles.worker, JOBS[:1], SIZE)
    doubles.claims.graphs_change_nothing(doubles.worker, doubles.load(spoil_captures=True), SIZE)
    assert "captures were meant to fail and did not" in doubles.results[-1]


def test_no_step_copies_a_latent_to_or_from_the_host(make: Make) -> None:
    for kind, result in (
        (TensorRTRTXEngine, "ok"),
        (ReadingEngine, f"failed: {4 * 8 * 8 * 8} bytes came down to the host in a step; none may"),
    ):
        doubles = make(kind)
        doubles.claims.host_copies(doubles.worker, "tensorrt-rtx", 4, SIZE)
        assert doubles.results == ["skipped: torch for CUDA, whose profiler tells, is not installed", result]
        assert doubles.report.parts["claims"][-1]["bytes"]["up"] == 2 * 4 * 4, "σ and σ′ of four pictures"


def test_runtimes_on_the_host_promise_nothing_about_copies(make: Make) -> None:
    doubles = make()
    doubles.claims.host_copies(doubles.worker, "onnxruntime", 4, SIZE)
    assert doubles.results == []


def test_invariant_batches_are_asked_for_their_bytes(make: Make) -> None:
    for kind, result in (
        (TensorRTRTXEngine, "ok"),
        (CompanyEngine, r"failed: pictures \[.*\] differ in their bytes with what shares their batch"),
    ):
        doubles = make(kind)
        load = doubles.load(options={"invariant_batch": 2})
        doubles.claims.invariant(doubles.worker, load, JOBS, SIZE)
        (found,) = doubles.results
        assert re.fullmatch(result, found)


def test_pictures_of_one_batch_that_are_mixed_up_are_found(make: Make, tmp_path: Path) -> None:
    doubles = make(CompanyEngine)
    doubles.claims.mixed(doubles.worker, JOBS, SIZE)
    assert doubles.results[0].startswith("failed: picture 1 ")
    who = Examined("low", "tensorrt-rtx", "bf16", own_weights=False)  # of which no PSNR is asked
    low = Claims(doubles.report, who, tmp_path / "low", Tolerance())
    low.mixed(doubles.worker, JOBS, SIZE)
    assert re.match(
        "failed: picture [123] is nearer to picture [0123] than to itself alone", doubles.results[1]
    )


def test_a_second_process_must_draw_the_same_and_compile_nothing(make: Make) -> None:
    doubles = make()
    doubles.claims.mixed(doubles.worker, JOBS[:2], SIZE)
    doubles.worker.call("load", **doubles.load())
    doubles.claims.same_pictures(doubles.worker, JOBS[:2], SIZE)
    assert doubles.results == ["ok", "ok"]
    assert doubles.report.parts["claims"][-1]["equal bytes"] == 2
    doubles.claims.same_pictures(doubles.worker, JOBS[1:3], SIZE)
    assert doubles.results[-1].startswith("failed: picture 0 ")
    kept = {"a.blob": "1", "b.blob": "2"}
    doubles.claims.cache_was_used(kept, kept)
    doubles.claims.cache_was_used(kept, {**kept, "b.blob": "3"})
    doubles.claims.cache_was_used(kept, {**kept, "c.blob": "3"})
    doubles.claims.cache_was_used({}, kept)
    assert doubles.results[-4:] == [
        "ok",
        "failed: the second process compiled anew: b.blob",
        "failed: the second process compiled anew: c.blob",
        "failed: the first process has kept nothing",
    ]


def write_references(engine: GraphEngine, folder: Path) -> None:
    """What ONNX Runtime answers, which the doubles compute with."""
    for component in engine.manifest.components:
        inputs = example_inputs(engine.manifest, component)
        answers = engine.run(component, inputs)
        named = {
            f"{weights}.{key}": array for weights in ("original", "stored") for key, array in answers.items()
        }
        np.savez(folder / f"{component}-00.npz", **{f"input.{key}": a for key, a in inputs.items()}, **named)
    x, ids = [
        np.stack([noise(seed, (8, 8, 8)) for seed in (1, 2)]),
        engine._text.batch([engine.tokenize("red")] * 2),
    ]
    conditioning = engine.encode([engine.tokenize("red")] * 2)
    image = engine.decode(engine.denoise(list(x), [1.0] * 2, [0.0] * 2, conditioning)[0])
    np.savez(folder / "picture-00.npz", noise=x, image=image, **{f"ids.{key}": a for key, a in ids.items()})


def example_inputs(manifest: Manifest, component: str) -> dict[str, Any]:
    random = np.random.default_rng(0)
    dims = {**manifest.text_lengths, "batch": 2, "height": 8, "width": 8}
    found = {}
    for name, spec in manifest.components[component].inputs.items():
        shape = [dims[dim] if isinstance(dim, str) else dim for dim in spec.shape]
        found[name] = (
            random.random(shape, np.float32) if spec.dtype == "float32" else random.integers(0, 9, shape)
        )
    return found


def test_a_whole_examination(make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the order and with the rows of a GPU machine."""
    doubles, work = make(), tmp_path / "work"
    (tmp_path / "references").mkdir()
    engine = load_engine(small(load_bundle(EMOJI)), EngineOptions("onnxruntime", "f32", threads=1))
    assert isinstance(engine, GraphEngine)
    write_references(engine, tmp_path / "references")
    engine.close()
    used = iter(range(0, 10**9, 10**6))
    monkeypatch.setattr("benchmarks.acceptance_runtimes.used_bytes", lambda: next(used))
    started: list[str] = []

    class Operator(Worker):
        def call(self, operation: str, **arguments: Any) -> Any:
            if operation == "precisions":  # asks the packages themselves
                return ["bf16", "f32"]
            return super().call(
                operation, **{**arguments, **({"device": "cpu"} if operation == "load" else {})}
            )

    def start(name: str, environment: Any) -> Operator:
        started.append(name)
        return Operator(EngineOperations(doubles._open))

    examination = Examination(
        report=doubles.report, start=start, work=work, bundle=EMOJI, references=tmp_path / "references",
        device="cuda", sizes=[SIZE], batches=[1, 4], steps=1, rounds=2, precisions=["f32"],
    )  # fmt: skip
    examination.run([CONTENDERS["tensorrt-rtx"], CONTENDERS["triton-cuda"]])
    report, label = doubles.report, "tensorrt-rtx f32"
    assert report.failed == []
    assert started == ["tensorrt-rtx", *[label] * 3]
    built, fused, again, triton = report.parts["runtimes"]
    assert [row["what"] for row in (built, fused, again)] == [
        f"{label}, built", f"{label}, fusion", f"{label}, in a second process",
    ]  # fmt: skip
    assert (built["GPU MB"], fused["scratch MB"], triton["result"]) == (
        1.0,
        0.0,
        "skipped: no --triton-url was given",
    )
    assert min(built["build s"], again["load s"], again["cache MB"]) > 0
    assert [row["what"] for row in report.parts["parity"]] == [
        *(f"{label}: {name}" for name in sorted(load_bundle(EMOJI).manifest.components)), f"{label}: pictures of 64x64",
    ]  # fmt: skip
    assert all(row["max abs"] <= 1e-5 for row in report.parts["parity"])
    claims = {row["what"].removeprefix(f"{label}: "): row["result"] for row in report.parts["claims"]}
    assert list(claims) == [
        "a row in a batch is what it is alone",
        "a batch of mixed schedules draws each picture's own",
        "no step copies a latent to or from the host (profiler)",
        "no step copies a latent to or from the host (our calls)",
        "every shape runs as a CUDA graph",
        "CUDA graphs on and off give the same bytes, and a failed capture is survived",
        "a second process draws the same pictures",
        "a second process compiles nothing anew",
        "invariant batches give the same bytes in any company",
    ]
    assert set(claims.values()) == {"ok", "skipped: torch for CUDA, whose profiler tells, is not installed"}
    assert [(row["batch"], row["n"]) for row in report.parts["times"]] == [(1, 2), (4, 2)]
    assert not list((work / "cache").iterdir()), "compiled models of every contender would fill a disk"


def test_an_engine_is_timed_at_every_shape_and_says_what_it_fused(make: Make) -> None:
    doubles = make()
    times = doubles.worker.call("turn", batch=2, size=SIZE, steps=4)
    assert (len(times["step ms"]), len(times["picture ms"])) == (3, 1)
    assert min(times["step ms"] + times["picture ms"]) > 0
    fusion = doubles.worker.call("fusion")
    assert (fusion["scratch_bytes"], "fell apart" in fusion) == (4096, False)
