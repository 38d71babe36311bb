"""Torch makes the pictures that ONNX Runtime makes of a bundle, eager and compiled; rows stay on the device."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import threading
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch._inductor.config
from numpy.typing import NDArray

from engines import torch_device
from engines.base import EngineOptions, load_engine, runtime_class
from engines.bundle import Bundle
from engines.errors import ExecutionError, RuntimeUnavailable
from engines.torch_device import choose_kernels, choose_precision
from engines.torch_engine import TorchEngine
from engines.torch_rows import TorchRows
from tests.engines.pictures import Job, draw, starting_noise, worst
from tests.engines.weights import with_weights

ROOT = Path(__file__).resolve().parents[2]

JOBS = [
    Job("red apple", 1, 4),
    Job("woman firefighter with tears and a flag of japan", 2, 2),
    Job("", 3, 5),
    Job("Face", 4, 1),
    Job("🍎", 5, 4),
]
ODD = Job("green apple", 6, 3, size=(6, 10))

# Of 255, as in test_runtimes.py; the graphs' float16 weights are part of the first.
FROM_ONNXRUNTIME = {"f32": 2, "bf16": 40}
ALONE_OR_BATCHED = {"f32": 1, "bf16": 20}

GPU = torch.device("cuda", 0)


@pytest.fixture(scope="module")
def bundle(bundle: Bundle, student: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return with_weights(bundle, student, tmp_path_factory.mktemp("weights") / "tiny")


@pytest.fixture(scope="module")
def reference(bundle: Bundle) -> list[NDArray[np.uint8]]:
    """What ONNX Runtime draws of `JOBS` and of `ODD`."""
    engine = load_engine(bundle, EngineOptions("onnxruntime", "f32", threads=1))
    return [draw(engine, [job])[0] for job in (*JOBS, ODD)]


@pytest.fixture(scope="module", params=["f32", "bf16"])
def engine(request: pytest.FixtureRequest, bundle: Bundle) -> Iterator[TorchRows]:
    loaded = load_engine(bundle, EngineOptions("torch", request.param, threads=1))
    assert isinstance(loaded, TorchRows)
    yield loaded
    loaded.close()


def test_picture_equals_onnxruntimes(engine: TorchRows, reference: list[NDArray[np.uint8]]) -> None:
    for job, theirs in zip((*JOBS, ODD), reference, strict=True):
        mine = draw(engine, [job])[0]
        assert theirs.std() > 20
        assert mine.shape == (8 * job.size[0], 8 * job.size[1], 3)
        assert worst(mine, theirs) <= FROM_ONNXRUNTIME[engine.info.precision], job


def test_same_request_alone_or_in_a_batch_of_mixed_steps_is_the_same_picture(engine: TorchRows) -> None:
    together = draw(engine, JOBS)
    for row, job in enumerate(JOBS):
        assert worst(draw(engine, [job])[0], together[row]) <= ALONE_OR_BATCHED[engine.info.precision], job


@pytest.mark.parametrize("group", [1, 2, 3])
@pytest.mark.parametrize("precision", ["f32", "bf16"])
def test_invariant_batches_give_the_same_bytes_in_any_company(
    bundle: Bundle, precision: str, group: int
) -> None:
    engine = load_engine(bundle, EngineOptions("torch", precision, threads=1, invariant_batch=group))
    together = draw(engine, JOBS)
    for row, job in enumerate(JOBS):
        assert np.array_equal(draw(engine, [job])[0], together[row]), job
    reversed_ = draw(engine, JOBS[::-1])[::-1]
    assert all(np.array_equal(mine, theirs) for mine, theirs in zip(reversed_, together, strict=True))


def test_every_graph_is_the_bundles(engine: TorchRows, bundle: Bundle) -> None:
    """`run`, which the export compares, on what ONNX Runtime is run on."""
    theirs: Any = load_engine(bundle, EngineOptions("onnxruntime", "f32", threads=1))
    generator = np.random.default_rng(0)
    dims = {**bundle.manifest.text_lengths, "batch": 3, "height": 6, "width": 10}
    for name, component in bundle.manifest.components.items():
        inputs: dict[str, NDArray[Any]] = {}
        for key, spec in component.inputs.items():
            shape = [dims[dim] if isinstance(dim, str) else dim for dim in spec.shape]
            ids = spec.dtype == "int64"
            inputs[key] = generator.integers(0, 200, shape) if ids else generator.random(shape, np.float32)
        wanted, found = theirs.run(name, inputs), engine.run(name, inputs)
        assert set(found) == set(wanted)
        for key, array in wanted.items():
            assert found[key].dtype == array.dtype
            error = np.linalg.norm(found[key].astype(float) - array) / np.linalg.norm(array.astype(float))
            assert error < {"f32": 3e-3, "bf16": 2e-2}[engine.info.precision], (name, key)


def test_rows_are_tensors_and_embeddings_do_not_keep_their_batch_alive(engine: TorchRows) -> None:
    conditioning = engine.encode([engine.tokenize(job.prompt) for job in JOBS[:3]])
    assert all(tensor.untyped_storage().nbytes() == tensor.nbytes for row in conditioning for tensor in row)
    noise = starting_noise(engine, JOBS[0])
    sample = engine.put(noise)
    noise[:] = 0  # the caller's
    moved, preview = engine.denoise([sample], [1.0], [0.5], conditioning[:1])
    assert all(isinstance(row, torch.Tensor) for row in (sample, *moved, *preview))
    assert float(sample.std()) > 0.5


def test_last_step_lands_on_the_preview(engine: TorchRows) -> None:
    conditioning = engine.encode([engine.tokenize("red apple")])
    x, x0 = engine.denoise([engine.put(starting_noise(engine, JOBS[0]))], [0.5], [0.0], conditioning)
    torch.testing.assert_close(x[0], x0[0], atol=1e-6, rtol=0)


def test_close_sigmas_are_different_times_in_any_precision(engine: TorchRows) -> None:
    conditioning = engine.encode([engine.tokenize("red apple")]) * 2
    x = [engine.put(starting_noise(engine, JOBS[0]))] * 2
    _, x0 = engine.denoise(x, [0.9, 0.9015], [0.5, 0.5], conditioning)
    early, late = [(x[0] - x0[row]) / sigma for row, sigma in enumerate((0.9, 0.9015))]
    assert float((early - late).norm() / early.norm()) > 1e-3


@pytest.mark.parametrize("shape", [(3, 8, 8), (8, 8), (8, 7, 7)])
def test_wrong_latent_is_an_execution_error_and_the_next_call_works(
    engine: TorchRows, shape: tuple[int, ...]
) -> None:
    conditioning = engine.encode([engine.tokenize("red apple")])
    with pytest.raises(ExecutionError, match="denoiser takes"):
        engine.denoise([engine.put(np.zeros(shape, np.float32))], [1.0], [0.5], conditioning)
    assert draw(engine, JOBS[:1]).shape == (1, 64, 64, 3)


def test_two_sizes_in_one_batch_are_an_execution_error(engine: TorchRows) -> None:
    conditioning = engine.encode([engine.tokenize("red apple")]) * 2
    samples = [engine.put(starting_noise(engine, job)) for job in (JOBS[0], ODD)]
    with pytest.raises(ExecutionError, match=r"torch failed in denoiser at batch 2: .*equal size"):
        engine.denoise(samples, [1.0, 1.0], [0.5, 0.5], conditioning)


def test_what_fails_on_the_device_is_told_in_one_line(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = TorchEngine(bundle, EngineOptions("torch", "f32", threads=1))

    def full(*_: object) -> None:
        raise torch.OutOfMemoryError(
            "CUDA out of memory. Tried to allocate 2 GiB.\nOf the allocated memory …"
        )

    monkeypatch.setitem(engine._calls, "decoder", full)
    with pytest.raises(ExecutionError) as caught:
        engine.decode([engine.put(starting_noise(engine, JOBS[0]))])
    assert str(caught.value) == (
        "torch failed in decoder at batch 1: CUDA out of memory. Tried to allocate 2 GiB."
    )


def test_info_says_what_runs(engine: TorchRows, bundle: Bundle) -> None:
    assert (engine.info.runtime, engine.info.version) == ("torch", torch.__version__)
    assert engine.info.device
    assert (engine.info.threads, engine.info.max_batch) == (1, 8)
    assert (
        engine.info.precision in runtime_class("torch").precisions(bundle) or engine.info.precision == "bf16"
    )


def test_threads_are_those_asked_for_on_whichever_thread_calls(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = TorchEngine(bundle, EngineOptions("torch", "f32", threads=2))
    decode, seen = engine._calls["decoder"], []

    def watched(*inputs: torch.Tensor) -> Any:
        seen.append(torch.get_num_threads())
        return decode(*inputs)

    def work() -> None:
        torch.set_num_threads(1)  # this thread has a number of its own from now on
        engine.decode([engine.put(starting_noise(engine, JOBS[0]))])

    monkeypatch.setitem(engine._calls, "decoder", watched)
    try:
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
        assert seen == [2]
    finally:
        torch.set_num_threads(1)


def test_close_frees_the_weights(bundle: Bundle) -> None:
    engine: Any = load_engine(bundle, EngineOptions("torch", "f32", threads=1))
    weights = [weakref.ref(next(call.parameters())) for call in engine._calls.values()]
    assert draw(engine, JOBS[:1]).any()
    engine.close()
    engine.close()
    gc.collect()
    assert [reference() for reference in weights] == [None] * len(bundle.manifest.components)


# refusals


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"precision": "int3"}, r"precision='int3' is not one of torch's: auto, f32, bf16"),
        ({"cache_dir": Path("compiled")}, r"cache_dir=compiled means nothing to torch.*use the aotinductor"),
        ({"fused_kernels": True}, r"fused_kernels need an NVIDIA GPU .* or leave them off"),
    ],
)
def test_what_means_nothing_here_is_refused(bundle: Bundle, options: dict[str, Any], message: str) -> None:
    with pytest.raises(RuntimeUnavailable, match=message):
        load_engine(bundle, EngineOptions(**{"runtime": "torch", **options}))


def test_bundle_without_weights_is_refused_with_the_remedy(bundle: Bundle) -> None:
    bare = Bundle(bundle.root, bundle.manifest.model_copy(update={"model": ()}), bundle.sha256)
    with pytest.raises(RuntimeUnavailable, match=r"lacks the model's own weights.*--weights"):
        load_engine(bare, EngineOptions("torch"))


def test_model_that_these_packages_cannot_load_is_refused(bundle: Bundle, tmp_path: Path) -> None:
    gone = Bundle(tmp_path, bundle.manifest, bundle.sha256)
    for tokenizer in {spec.file.file for spec in bundle.manifest.tokenizers}:
        (tmp_path / tokenizer).write_bytes((bundle.root / tokenizer).read_bytes())
    with pytest.raises(RuntimeUnavailable, match=r"cannot be loaded here: .*model_index\.json"):
        load_engine(gone, EngineOptions("torch"))


# a GPU, as far as it can be told without one


@pytest.mark.parametrize(
    ("capability", "cuda", "on"), [((9, 0), "13.0", True), ((7, 5), "13.0", False), ((9, 0), None, False)]
)
def test_kernels_run_where_they_are_compiled_for(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], cuda: str | None, on: bool
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA T")
    monkeypatch.setattr(torch.version, "cuda", cuda)
    assert choose_kernels(None, GPU) is on
    assert choose_kernels(False, GPU) is False
    if on:
        assert choose_kernels(True, GPU) is True
    else:
        with pytest.raises(
            RuntimeUnavailable, match=r"compute capability 8\.0 or more, and there is NVIDIA T"
        ):
            choose_kernels(True, GPU)
    monkeypatch.setattr(torch_device, "find_spec", lambda _: None)
    assert choose_kernels(None, GPU) is False
    with pytest.raises(RuntimeUnavailable, match="'triton', which is not installed"):
        choose_kernels(True, GPU)


@pytest.mark.parametrize(("native", "precision"), [(True, "bf16"), (False, "f32")])
def test_auto_precision_is_bf16_only_where_the_device_has_it(
    monkeypatch: pytest.MonkeyPatch, native: bool, precision: str
) -> None:
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: native)
    monkeypatch.setattr("engines.processor.has_bf16", lambda: native)
    for device in (GPU, torch.device("cpu")):
        assert choose_precision("auto", device, "torch") == precision
        assert choose_precision("f32", device, "torch") == "f32"


def test_every_call_waits_for_the_gpu(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a CPU in the place of the GPU."""
    waits: list[object] = []
    monkeypatch.setattr(TorchRows, "_on_gpu", True)
    monkeypatch.setattr(torch.cuda, "synchronize", waits.append)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: waits.append("emptied"))
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    with pytest.raises(RuntimeUnavailable, match="threads=1 means nothing to torch on a GPU"):
        TorchEngine(bundle, EngineOptions("torch", "f32", threads=1))
    engine = TorchEngine(bundle, EngineOptions("torch", "f32"))
    assert torch.backends.cudnn.allow_tf32 is False
    conditioning = engine.encode([engine.tokenize("red apple")])
    assert len(waits) == len(bundle.manifest.text_encoders)
    x, _ = engine.denoise([engine.put(starting_noise(engine, JOBS[0]))], [1.0], [0.0], conditioning)
    engine.decode(x)
    assert len(waits) == len(bundle.manifest.text_encoders) + 3
    engine.close()
    assert waits[-1] == "emptied"


INTERPRETED = """
import sys
from pathlib import Path
import numpy as np
import torch
from engines.base import EngineOptions, load_engine
from engines.bundle import load_bundle
from tests.engines.pictures import Job, draw

torch.set_num_threads(1)
options = EngineOptions("torch", "f32", fused_kernels=True)
engine = load_engine(load_bundle(Path(sys.argv[1])), options)
names = {type(module).__name__ for module in engine._calls["denoiser"].modules()}
assert "FusedJointTransformerBlock" in names, names
np.save(sys.argv[2], draw(engine, [Job("red apple", 1, 1)]))
"""


def test_pictures_are_the_same_with_the_kernels(bundle: Bundle, tmp_path: Path) -> None:
    """Triton's interpreter is the GPU; it has to be chosen before Triton is imported."""
    subprocess.run(
        [sys.executable, "-c", INTERPRETED, bundle.root, tmp_path / "fused.npy"],
        cwd=ROOT, env={**os.environ, "TRITON_INTERPRET": "1"}, check=True,
    )  # fmt: skip
    plain = TorchEngine(bundle, EngineOptions("torch", "f32", threads=1))
    assert worst(np.load(tmp_path / "fused.npy"), draw(plain, [Job("red apple", 1, 1)])) <= 1


# compiled


@pytest.mark.slow
def test_compiled_denoiser_is_the_same_and_compiled_once(
    bundle: Bundle, reference: list[NDArray[np.uint8]]
) -> None:
    engine: Any = load_engine(bundle, EngineOptions("torch", "f32", threads=1, torch_compile=True))
    with torch._dynamo.config.patch(error_on_recompile=True):  # for no batch and no size
        together = draw(engine, JOBS)
        for row, job in enumerate((*JOBS, ODD)):
            mine = draw(engine, [job])[0]
            assert worst(mine, reference[row]) <= FROM_ONNXRUNTIME["f32"], job
            assert row == len(JOBS) or worst(mine, together[row]) <= ALONE_OR_BATCHED["f32"]
    weights = weakref.ref(next(engine._calls["denoiser"].parameters()))
    engine.close()
    gc.collect()
    assert weights() is None


@pytest.mark.slow
def test_without_a_compiler_the_remedy_is_told(bundle: Bundle) -> None:
    torch._dynamo.reset()  # what other tests have compiled
    options = EngineOptions("torch", "f32", threads=1, torch_compile=True)
    with (
        torch._inductor.config.patch({"cpp.cxx": ("no-such-compiler",), "fx_graph_cache": False}),
        pytest.raises(RuntimeUnavailable, match=r"torch cannot compile the denoiser here: .*\(g\+\+\)"),
    ):
        load_engine(bundle, options)
