"""Device-resident latents beside a Triton server, on a double of the CUDA runtime and with a server that is one.

What is real: the client package's own code for CUDA regions, the requests, and ONNX Runtime, which reads its inputs
from and writes its outputs to the "device" memory that a request names.
"""

from __future__ import annotations

import base64
import ctypes
from collections.abc import Iterator, Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

pytest.importorskip("cuda.bindings.runtime")

from cuda.bindings import runtime as real
from tritonclient.grpc import InferInput, InferRequestedOutput, InferResult, service_pb2
from tritonclient.utils import InferenceServerException, cuda_shared_memory, triton_to_np_dtype
from tritonclient.utils.cuda_shared_memory import _utils

from engines import triton_server
from engines.base import EngineOptions, GraphEngine, load_engine
from engines.bundle import Bundle
from engines.errors import ExecutionError, RuntimeUnavailable
from engines.triton_cuda import TritonCudaEngine
from engines.triton_memory import FOLDER
from engines.triton_repository.config import model_config, model_name
from engines.triton_repository.settings import RepositorySettings
from tests.engines.fake_cuda import FakeCuda
from tests.engines.pictures import Job, draw, starting_noise, worst

JOBS = [Job("red apple", 1, 4), Job("woman firefighter", 2, 2), Job("", 3, 8), Job("Face", 4, 1)]
ODD = Job("green apple", 6, 3, size=(6, 10))
SETTINGS = RepositorySettings(device="gpu", dynamic_batching=False, max_batch=4)
URL = "127.0.0.1:8001"


class Cuda(FakeCuda):
    """`FakeCuda` with what the client package calls besides: a handle for another process holds the address."""

    cudaError_t = real.cudaError_t
    CUDA_IPC_HANDLE_SIZE = real.CUDA_IPC_HANDLE_SIZE

    def cudaGetDevice(self) -> Any:
        return self._called("cudaGetDevice", (), 0)

    def cudaIpcGetMemHandle(self, pointer: int) -> Any:
        buffer = ctypes.create_string_buffer(int(pointer).to_bytes(8, "little"), self.CUDA_IPC_HANDLE_SIZE)
        handle = SimpleNamespace(buffer=buffer, getPtr=lambda: ctypes.addressof(buffer))
        return self._called("cudaIpcGetMemHandle", (pointer,), handle)


class Server:
    """Stands for the server's process and its client: ONNX Runtime over the memory that a request names."""

    def __init__(self, bundle: Bundle, cuda: Cuda) -> None:
        self.bundle = bundle
        self.cuda = cuda
        graphs = load_engine(bundle, EngineOptions("onnxruntime", threads=1))
        assert isinstance(graphs, GraphEngine)
        self.graphs = graphs
        self.regions: dict[str, int] = {}
        self.host: dict[str, str] | None = None
        """System shared memory that it has open, by name; it takes none while this is None."""
        self.opened: list[str] = []
        # Of every call the component, and those inputs and outputs that are named instead of sent.
        self.requests: list[tuple[str, list[str], list[str]]] = []
        self.batches: list[int] = []
        self.failures: list[Exception] = []

    def __call__(self, url: str, channel_args: object) -> Server:
        assert url == URL
        return self

    def is_server_live(self, **_: object) -> bool:
        return True

    def is_model_ready(self, name: str, **_: object) -> bool:
        return True

    def get_server_metadata(self, **_: object) -> Any:
        return SimpleNamespace(name="triton", version="9.9")

    def get_model_metadata(self, name: str, **_: object) -> Any:
        return SimpleNamespace(versions=["1"])

    def get_model_config(self, name: str, **_: object) -> Any:
        return SimpleNamespace(config=model_config(self.bundle.manifest, self._component(name), SETTINGS))

    def register_system_shared_memory(self, name: str, key: str, size: int, **_: object) -> None:
        if self.host is None:
            raise InferenceServerException("no system shared memory in this double")
        self.host[name] = key
        self.opened.append(key)

    def unregister_system_shared_memory(self, name: str, **_: object) -> None:
        assert self.host is not None
        self.host.pop(name, None)

    def register_cuda_shared_memory(
        self, name: str, handle: bytes, device: int, size: int, **_: object
    ) -> None:
        if self.failures:
            raise self.failures.pop()
        assert device == 0
        self.regions[name] = int.from_bytes(base64.b64decode(handle)[:8], "little")
        self.cuda.view(self.regions[name], size)

    def unregister_cuda_shared_memory(self, name: str, **_: object) -> None:
        self.regions.pop(name, None)  # an unknown name is no error to Triton

    def get_cuda_shared_memory_status(self, **_: object) -> Any:
        return SimpleNamespace(regions=dict(self.regions))

    def close(self) -> None:
        pass

    def infer(
        self,
        name: str,
        inputs: Sequence[InferInput],
        outputs: Sequence[InferRequestedOutput],
        client_timeout: float,
    ) -> InferResult:
        if self.failures:
            raise self.failures.pop()
        component = self._component(name)
        result = self.graphs.run(
            component, {tensor.name(): self._array(component, tensor) for tensor in inputs}
        )
        response = service_pb2.ModelInferResponse(model_name=name)
        for output in outputs:
            array = np.ascontiguousarray(result[output.name()])
            response.outputs.add(name=output.name(), datatype=DATATYPES[array.dtype.name], shape=array.shape)
            place = output._get_tensor().parameters
            response.raw_output_contents.append(b"" if place else array.tobytes())
            if place:
                self._memory(place)[:] = np.frombuffer(array.tobytes(), np.uint8)
        self.batches.append(inputs[0].shape()[0])
        self.requests.append(
            (
                component,
                [each.name() for each in inputs if each._get_content() is None],
                [each.name() for each in outputs if each._get_tensor().parameters],
            )
        )
        return InferResult(response)

    def _component(self, name: str) -> str:
        manifest = self.bundle.manifest
        return next(each for each in manifest.components if model_name(manifest, each) == name)

    def _array(self, component: str, tensor: InferInput) -> np.ndarray[Any, Any]:
        content = tensor._get_content()
        data = self._memory(tensor._get_tensor().parameters).tobytes() if content is None else content
        array = np.frombuffer(data, triton_to_np_dtype(tensor.datatype()))
        rank = len(self.bundle.manifest.components[component].inputs[tensor.name()].shape)
        return array.reshape(list(tensor.shape())[:rank])  # as Triton does where the configuration says so

    def _memory(self, place: Mapping[str, Any]) -> np.ndarray[Any, Any]:
        name = place["shared_memory_region"].string_param
        if name not in self.regions:
            raise InferenceServerException(
                f"Unable to find shared memory region: '{name}'", "StatusCode.NOT_FOUND"
            )
        offset = place["shared_memory_offset"].int64_param if "shared_memory_offset" in place else 0
        return self.cuda.view(self.regions[name] + offset, place["shared_memory_byte_size"].int64_param)


DATATYPES = {"float32": "FP32", "uint8": "UINT8"}


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> Cuda:
    double = Cuda()
    for module in (cuda_shared_memory, _utils):
        monkeypatch.setattr(module, "cudart", double)
    monkeypatch.setattr(_utils, "maybe_set_device", lambda device: None)
    monkeypatch.setattr(cuda_shared_memory, "maybe_set_device", lambda device: None)
    return double


@pytest.fixture
def server(bundle: Bundle, cuda: Cuda, monkeypatch: pytest.MonkeyPatch) -> Server:
    double = Server(bundle, cuda)
    monkeypatch.setattr(triton_server, "InferenceServerClient", double)
    return double


@pytest.fixture
def engine(bundle: Bundle, cuda: Cuda, server: Server) -> Iterator[TritonCudaEngine]:
    loaded = open_engine(bundle, cuda)
    yield loaded
    loaded.close()


def open_engine(bundle: Bundle, cuda: Cuda, **given: Any) -> TritonCudaEngine:
    return TritonCudaEngine(bundle, EngineOptions("triton-cuda", triton_url=URL, **given), runtime=cuda)


@pytest.mark.parametrize("jobs", [JOBS[:1], JOBS, [ODD]], ids=["one", "mixed", "odd"])
def test_pictures_are_those_of_onnxruntime(engine: TritonCudaEngine, jobs: list[Job], server: Server) -> None:
    assert worst(draw(engine, jobs), draw(server.graphs, jobs)) == 0


def test_no_step_copies_a_latent_or_an_embedding_to_the_host(
    engine: TritonCudaEngine, cuda: Cuda, server: Server
) -> None:
    conditioning = engine.encode([engine.tokenize(job.prompt) for job in JOBS])
    samples = [engine.put(starting_noise(engine, job)) for job in JOBS]
    before = cuda.count()
    for sigma, sigma_next in ((1.0, 0.5), (0.5, 0.0)):
        samples, _ = engine.denoise(samples, [sigma] * 4, [sigma_next] * 4, conditioning)
    engine.decode(samples)
    moved = cuda.count() - before
    assert moved["DeviceToDevice"] > 0
    assert (moved["HostToDevice"], moved["DeviceToHost"]) == (0, 0)
    assert before["HostToDevice"] == len(JOBS)  # the noise, once
    steps = [request for request in server.requests if request[0] == "denoiser"]
    assert steps == [("denoiser", ["x", *engine.manifest.conditioning], ["x_next", "x0"])] * 2
    assert server.requests[-1] == ("decoder", ["x"], [])  # the picture comes in the answer


def test_rows_that_are_forgotten_are_used_again(engine: TritonCudaEngine, cuda: Cuda) -> None:
    draw(engine, JOBS)
    before = cuda.count()["cudaMalloc"]
    draw(engine, JOBS)
    assert cuda.count()["cudaMalloc"] == before


def test_close_frees_everything_and_the_server_forgets_the_region(
    bundle: Bundle, cuda: Cuda, server: Server
) -> None:
    engine = open_engine(bundle, cuda)
    kept = engine.put(starting_noise(engine, JOBS[0]))
    assert len(server.regions) == 1
    engine.close()
    assert (server.regions, cuda.held()) == ({}, 0)
    assert kept.shape == (8, 8, 8)  # a row that somebody still holds does no harm
    engine.close()


def test_invariant_batches_give_the_same_bytes_in_any_company(
    bundle: Bundle, cuda: Cuda, server: Server
) -> None:
    engine = open_engine(bundle, cuda, invariant_batch=3)
    together = draw(engine, JOBS)
    for row, job in enumerate(JOBS):
        assert np.array_equal(draw(engine, [job])[0], together[row])
    assert set(server.batches) == {3}
    engine.close()


def test_a_restarted_server_gets_the_region_anew_and_rows_survive(
    engine: TritonCudaEngine, cuda: Cuda, server: Server
) -> None:
    conditioning = engine.encode([engine.tokenize("red apple")])
    x = [engine.put(starting_noise(engine, JOBS[0]))]
    wanted = draw(engine, [Job("red apple", 1, 1)])
    (first,) = server.regions
    server.regions.clear()
    x, _ = engine.denoise(x, [1.0], [0.0], conditioning)
    assert worst(engine.decode(x), wanted) == 0
    (second,) = server.regions
    assert first != second


def test_a_late_call_keeps_its_memory_from_being_anothers(
    engine: TritonCudaEngine, cuda: Cuda, server: Server
) -> None:
    (late,) = server.regions.values()
    server.failures.append(InferenceServerException("Deadline Exceeded", "StatusCode.DEADLINE_EXCEEDED"))
    with pytest.raises(
        ExecutionError, match=r"triton-cuda failed in text_encoder at batch 1: Deadline Exceeded"
    ):
        engine.encode([engine.tokenize("red apple")])
    assert draw(engine, JOBS).shape == (4, 64, 64, 3)
    assert ("cudaFree", (late,)) not in cuda.calls
    assert len(server.regions) == 2
    engine.close()
    assert (server.regions, cuda.held()) == ({}, 0)
    engine.close()


def test_a_late_call_s_memory_is_freed_where_the_server_never_came_back(
    engine: TritonCudaEngine, cuda: Cuda, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.failures.append(InferenceServerException("Deadline Exceeded", "StatusCode.DEADLINE_EXCEEDED"))
    with pytest.raises(ExecutionError, match="Deadline Exceeded"):
        engine.encode([engine.tokenize("red apple")])

    def gone(*_: object, **__: object) -> None:
        raise InferenceServerException("failed to connect", "StatusCode.UNAVAILABLE")

    monkeypatch.setattr(server, "unregister_cuda_shared_memory", gone)
    engine.close()
    assert cuda.held() == 0


def test_a_failed_copy_is_an_execution_error_and_the_next_call_works(
    engine: TritonCudaEngine, cuda: Cuda
) -> None:
    conditioning = engine.encode([engine.tokenize("red apple")])
    x = [engine.put(starting_noise(engine, JOBS[0]))]
    cuda.fail("cudaMemcpyAsync")
    with pytest.raises(
        ExecutionError, match=r"triton-cuda failed in denoiser at batch 1: CUDA could not copy"
    ):
        engine.denoise(x, [1.0], [0.5], conditioning)
    engine.denoise(x, [1.0], [0.5], conditioning)


def test_latents_of_another_size_are_refused(engine: TritonCudaEngine) -> None:
    with pytest.raises(ExecutionError, match=r"takes latents of .* not \(7, 7\)"):
        engine.put(np.zeros((8, 7, 7), np.float32))
    mixed = [engine.put(starting_noise(engine, job)) for job in (JOBS[0], ODD)]
    with pytest.raises(ExecutionError, match=r"decoder takes x of one shape in a batch"):
        engine.decode(mixed)


IPC = InferenceServerException("failed to open CUDA IPC handle")


def left(server: Server) -> list[str]:
    """What is still shared with the server, and what of it is still in this machine's memory."""
    return [*server.regions, *(server.host or {}), *(key for key in server.opened if (FOLDER / key).exists())]


def test_a_server_that_cannot_open_the_memory_is_unavailable_and_nothing_is_left(
    bundle: Bundle, cuda: Cuda, server: Server
) -> None:
    server.host = {}
    server.failures.append(IPC)
    with pytest.raises(
        RuntimeUnavailable, match=r"cannot share this process's GPU memory \(failed to open CUDA IPC"
    ):
        open_engine(bundle, cuda)
    assert len(server.opened) == 1
    assert (left(server), cuda.held()) == ([], 0)


def test_a_server_that_comes_back_without_the_gpu_leaves_nothing_however_often_it_is_asked(
    bundle: Bundle, cuda: Cuda, server: Server
) -> None:
    server.host = {}
    engine = open_engine(bundle, cuda)
    held = cuda.held()
    server.regions.clear()  # restarted
    server.failures.append(InferenceServerException("gone", "StatusCode.UNAVAILABLE"))
    for _ in range(3):
        with pytest.raises(ExecutionError):
            engine.encode([engine.tokenize("red apple")])
        assert (left(server), cuda.held()) == ([], held - 1)  # less the region
        server.failures.append(IPC)
    server.failures.clear()
    engine.encode([engine.tokenize("red apple")])
    engine.close()
    assert (len(server.opened), left(server), cuda.held()) == (4, [], 0)


def test_no_gpu_is_one_sentence(bundle: Bundle, cuda: Cuda, server: Server) -> None:
    cuda.fail("cudaGetDeviceCount", real.cudaError_t.cudaErrorNoDevice)
    with pytest.raises(RuntimeUnavailable, match=r"no usable CUDA device here: .*cudaErrorNoDevice"):
        open_engine(bundle, cuda)
