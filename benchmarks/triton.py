"""`cdm-bench triton`: what a call costs through a Triton server on this machine, beside the same call in this process.

Both run ONNX Runtime in float32 with as many threads; Triton's Python backend runs it with the very `model.py` that
`cdm-export --to triton` writes. The server is a real one (`benchmarks/tritonserver.py`). First an identity of tensors
of several sizes, which costs nothing but its way, then the bundle's components. Contenders take turns in every round.

    cdm-bench triton --bundle bundles/emoji --threads 1
"""

from __future__ import annotations

import random
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from google.protobuf import text_format
from pydantic import Field
from tritonclient.grpc import InferenceServerClient, InferRequestedOutput

import engines.triton_repository
from benchmarks.report import percentiles, show
from benchmarks.tritonserver import TritonServer
from engines import triton_memory
from engines.base import EngineOptions, GraphEngine, load_engine
from engines.bundle import Bundle, Size, load_bundle
from engines.cli import CommandSettings
from engines.rows import Array
from engines.triton import TritonEngine
from engines.triton_memory import SharedRegion, layouts_of, plain_input
from engines.triton_repository.config import known_dims, model_config
from engines.triton_repository.repository import write_repository
from engines.triton_repository.settings import RepositorySettings

IDENTITY = "identity"
Call = Callable[[], object]


class TritonBenchSettings(CommandSettings, env_prefix="CDM_BENCH_TRITON_"):
    """Time calls through a real Triton server, in requests and in shared memory, and in this process."""

    bundle: Path = Field(description="bundle folder")
    batches: list[int] = Field([1, 8], min_length=1, description="batch sizes of the bundle's components")
    kib: list[int] = Field(
        [1, 32, 128, 256, 1024, 4096], min_length=1, description="sizes of the identity's tensor"
    )
    rounds: int = Field(30, ge=1, description="measured rounds; every contender runs once in each")
    threads: int = Field(1, ge=0, description="threads of ONNX Runtime, here and there; 0 lets it choose")
    seed: int = Field(0, ge=0, description="seed of the contenders' order")


def run(settings: TritonBenchSettings) -> None:
    """Measure, print the table and the JSON line.

    Raises:
        ServerError: no Triton server can run here, with what to do about it.
    """
    bundle = load_bundle(settings.bundle)
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        root = Path(folder)
        repository = RepositorySettings(
            backend="python",
            threads=settings.threads,
            max_batch=max(settings.batches),
            dynamic_batching=False,
        )
        write_repository(bundle, root / "bundle", repository)
        write_identity(root / "identity", bundle, repository)
        server = stack.enter_context(
            TritonServer(root / "bundle", [f"--model-repository={root / 'identity'}"])
        )
        calls = {
            **_identity_calls(settings, stack, server),
            **_component_calls(settings, stack, bundle, server),
        }
        times = _measure(calls, settings.rounds, settings.seed)
        rows = [_row(what, found) for what, found in times.items()]
        about = stack.enter_context(InferenceServerClient(server.url)).get_server_metadata()
    show(
        "triton",
        rows,
        server=f"{about.name} {about.version}",
        threads=settings.threads,
        bundle=bundle.manifest.name,
    )


def write_identity(out: Path, bundle: Bundle, settings: RepositorySettings) -> None:
    """A repository of one model that gives back its tensor `x`, `(batch, n)` float32, as `y`."""
    shape = ["batch", "n"]
    tensors = [onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, shape) for name in ("x", "y")]
    node = onnx.helper.make_node("Identity", ["x"], ["y"])
    graph = onnx.helper.make_graph([node], IDENTITY, tensors[:1], tensors[1:])
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 20)], ir_version=10)
    version = out / IDENTITY / "1"
    version.mkdir(parents=True)
    onnx.save_model(model, str(version / "model.onnx"))
    shutil.copy(Path(engines.triton_repository.__file__).with_name("model.py"), version)
    config = model_config(bundle.manifest, "decoder", settings)
    config.name = IDENTITY
    for field in ("input", "output", "model_warmup"):
        config.ClearField(field)
    config.input.add(name="x", data_type="TYPE_FP32", dims=[-1])
    config.output.add(name="y", data_type="TYPE_FP32", dims=[-1])
    (out / IDENTITY / "config.pbtxt").write_text(text_format.MessageToString(config), encoding="utf-8")


def _identity_calls(
    settings: TritonBenchSettings, stack: ExitStack, server: TritonServer
) -> dict[str, dict[str, Call]]:
    client = stack.enter_context(InferenceServerClient(server.url))
    region = SharedRegion(client, 2 * max(settings.kib) * 1024 + 1024)
    stack.callback(region.destroy)
    stack.callback(region.unregister)

    def in_request(x: Array) -> object:
        return client.infer(IDENTITY, [plain_input("x", x)], outputs=[InferRequestedOutput("y")]).as_numpy(
            "y"
        )

    def shared(x: Array) -> object:
        with everything_shared():
            inputs, outputs = region.inputs({"x": x}), region.outputs({"y": (x.shape, x.dtype)})
        return region.read(client.infer(IDENTITY, inputs, outputs=outputs), "y")

    calls: dict[str, dict[str, Call]] = {}
    for kib in settings.kib:
        x = np.ones((1, kib * 256), np.float32)
        calls[f"{kib} KiB there and back"] = {
            "in request": partial(in_request, x),
            "shared": partial(shared, x),
        }
    return calls


@contextmanager
def everything_shared() -> Iterator[None]:
    """However small a tensor is, it goes through shared memory."""
    before, triton_memory.SMALL_BYTES = triton_memory.SMALL_BYTES, 0
    try:
        yield
    finally:
        triton_memory.SMALL_BYTES = before


def _component_calls(
    settings: TritonBenchSettings, stack: ExitStack, bundle: Bundle, server: TritonServer
) -> dict[str, dict[str, Call]]:
    most = max(settings.batches)
    options = EngineOptions("triton", max_batch=most, triton_url=server.url)
    here = load_engine(bundle, EngineOptions("onnxruntime", threads=settings.threads, max_batch=most))
    assert isinstance(here, GraphEngine)
    contenders: dict[str, GraphEngine] = {
        "in process": here,
        "in request": TritonEngine(bundle, options, shared_memory=False),
        "shared": TritonEngine(bundle, options),
    }
    for engine in contenders.values():
        stack.callback(engine.close)
    calls: dict[str, dict[str, Call]] = {}
    for component in bundle.manifest.components:
        for batch in settings.batches:
            inputs = example_inputs(bundle, component, batch, bundle.manifest.default_size)
            calls[f"{component}, batch {batch}"] = {
                name: partial(engine.run, component, inputs) for name, engine in contenders.items()
            }
    return calls


def example_inputs(bundle: Bundle, component: str, batch: int, size: Size) -> dict[str, Array]:
    """Inputs of the right shapes: noise, and the first ids of a vocabulary."""
    random = np.random.default_rng(0)
    layouts = layouts_of(
        bundle.manifest.components[component].inputs, batch, known_dims(bundle.manifest, size)
    )
    return {
        name: (random.standard_normal(shape) if dtype.kind == "f" else random.integers(0, 2, shape)).astype(
            dtype
        )
        for name, (shape, dtype) in layouts.items()
    }


def _measure(
    calls: Mapping[str, Mapping[str, Call]], rounds: int, seed: int
) -> dict[str, dict[str, list[float]]]:
    """Milliseconds by what is called and by contender."""
    order = random.Random(seed)
    turns = [(what, name, call) for what, named in calls.items() for name, call in named.items()]
    times: dict[str, dict[str, list[float]]] = {
        what: {name: [] for name in named} for what, named in calls.items()
    }
    for number in range(rounds + 1):
        order.shuffle(turns)
        for what, name, call in turns:
            started = time.perf_counter()
            call()
            if number:  # the first round warms up
                times[what][name].append(1e3 * (time.perf_counter() - started))
    return times


def _row(what: str, times: Mapping[str, list[float]]) -> Mapping[str, Any]:
    """Medians in milliseconds, and what the way through Triton adds to the call in this process."""
    medians = {name: percentiles(found)["p50"] for name, found in times.items()}
    row: dict[str, Any] = {"call": what, **{f"{name} ms": median for name, median in medians.items()}}
    base = medians.get("in process")
    if base is not None:
        for name in ("in request", "shared"):
            row[f"{name} adds"] = round((medians[name] or 0.0) - base, 2)
    row["n"] = len(next(iter(times.values())))
    return row
