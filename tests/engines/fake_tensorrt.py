"""A double of the package `tensorrt_rtx` (or `tensorrt`) whose engines run on a `FakeCuda`, with ONNX Runtime inside.

An "engine" is the path and the profile it was built with; queued, it reads its inputs at the addresses it was given and
writes its outputs at theirs. Whoever moves rows to the wrong place gets another picture than ONNX Runtime's own.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from enum import IntEnum
from functools import cache
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnxruntime as ort

from engines.tensorrt import TensorRTEngine
from tests.engines.fake_cuda import FakeCuda
from tests.engines.pictures import Job

DTYPES = {"tensor(float)": np.float32, "tensor(int64)": np.int64, "tensor(uint8)": np.uint8}
SCRATCH = 4096

JOBS = [Job("red apple", 1, 4), Job("woman firefighter", 2, 2), Job("", 3, 3), Job("Face", 4, 1)]
OBLONG = [Job("red apple", 1, 2, size=(6, 10)), Job("🍎", 5, 2, size=(6, 10))]
"""What tests draw: one batch of mixed steps, and one of another size."""

Load = Callable[..., TensorRTEngine]
"""What the fixture `load` gives: loads the engine on doubles."""


class Severity(IntEnum):
    INTERNAL_ERROR = 0
    ERROR = 1
    WARNING = 2
    INFO = 3
    VERBOSE = 4


@cache
def session(path: str) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    return ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])


class FakeTensorRT:
    """`calls` counts what was called; `settings` holds what each build was configured with, in order."""

    def __init__(self, cuda: FakeCuda, *, rtx: bool = True, version: str = "1.7.1.116") -> None:
        self.__version__ = version
        self.cuda = cuda
        self.rtx = rtx
        self.calls: Counter[str] = Counter()
        self.settings: list[SimpleNamespace] = []
        self.contexts: list[Any] = []
        self.capturable = True
        self.refused: set[str] = set()
        """Names of calls to answer with a no, or with nothing."""
        self.log = "Max Scratch Memory: 4096 bytes"

        class ILogger:
            INTERNAL_ERROR, ERROR, WARNING, INFO, VERBOSE = Severity

            def __init__(self) -> None:
                pass

        self.ILogger = ILogger
        self.NetworkDefinitionCreationFlag = SimpleNamespace(STRONGLY_TYPED=0)
        self.ProfilingVerbosity = SimpleNamespace(DETAILED="detailed")
        self.MemoryPoolType = SimpleNamespace(WORKSPACE="workspace")
        self.LayerType = SimpleNamespace(SOFTMAX="softmax", ATTENTION_INPUT="attention")
        self.ExecutionContextAllocationStrategy = SimpleNamespace(USER_MANAGED="ours")
        self.BuilderFlag = SimpleNamespace(TF32="TF32")
        if rtx:  # TensorRT has none of these: to ask for one is an error
            self.BuilderFlag.REQUIRE_USER_ALLOCATION = "REQUIRE_USER_ALLOCATION"
            self.ComputeCapability = SimpleNamespace(CURRENT=0, NONE=1, SM75=75, SM89=89, SM120=120)
            self.DynamicShapesKernelSpecializationStrategy = SimpleNamespace(EAGER="eager", LAZY="lazy")

    def Builder(self, logger: Any) -> Builder:
        return Builder(self, logger)

    def OnnxParser(self, network: Any, logger: Any) -> Parser:
        return Parser(self, network)

    def Runtime(self, logger: Any) -> Runtime:
        return Runtime(self, logger)

    def yes(self, name: str) -> bool:
        self.calls[name] += 1
        return name not in self.refused


class Builder:
    def __init__(self, trt: FakeTensorRT, logger: Any) -> None:
        self._trt = trt
        self._logger = logger

    def create_network(self, flags: int) -> SimpleNamespace:
        self._flags = flags
        return SimpleNamespace(path="", num_layers=0, num_inputs=0)

    def create_builder_config(self) -> Config:
        return Config(rtx=self._trt.rtx)

    def create_optimization_profile(self) -> Profile:
        return Profile()

    def build_serialized_network(self, network: Any, config: Config) -> bytes | None:
        config.settings.network_flags = self._flags
        config.settings.path = network.path
        config.settings.verbosity = config.profiling_verbosity
        self._trt.settings.append(config.settings)
        if not self._trt.yes("build_serialized_network"):
            self._logger.log(Severity.ERROR, "no tactics to implement the operation.\nmore of it")
            return None
        for line in self._trt.log.split("\n\n"):
            self._logger.log(Severity.INFO, line)
        (profile,) = config.settings.profiles
        return json.dumps({"path": network.path, "profile": profile}).encode()


class Profile:
    def __init__(self) -> None:
        self._shapes: dict[str, Any] = {}

    def set_shape(self, name: str, smallest: Any, usual: Any, largest: Any) -> None:
        self._shapes[name] = (smallest, usual, largest)


class Config:
    num_compute_capabilities = 0
    profiling_verbosity = "layer names"

    def __init__(self, *, rtx: bool) -> None:
        self.settings = SimpleNamespace(profiles=[], cleared=[], flags=[], pools={}, targets={})
        self._rtx = rtx

    def add_optimization_profile(self, profile: Profile) -> None:
        self.settings.profiles.append(profile._shapes)

    def clear_flag(self, flag: str) -> None:
        self.settings.cleared.append(flag)

    def set_flag(self, flag: str) -> None:
        self.settings.flags.append(flag)

    def set_memory_pool_limit(self, pool: str, limit: int) -> None:
        self.settings.pools[pool] = limit

    def set_compute_capability(self, capability: int, index: int) -> None:
        assert self._rtx
        assert index < self.num_compute_capabilities
        self.settings.targets[index] = capability


class Parser:
    def __init__(self, trt: FakeTensorRT, network: Any) -> None:
        self._trt = trt
        self._network = network

    def parse_from_file(self, path: str) -> bool:
        self._network.path = path
        return self._trt.yes("parse_from_file")

    def get_error(self, index: int) -> SimpleNamespace:
        return SimpleNamespace(desc=lambda: "Unsupported.", node_name=lambda: "", node_operator=lambda: "")


class Runtime:
    def __init__(self, trt: FakeTensorRT, logger: Any) -> None:
        self._trt = trt
        self._logger = logger

    def deserialize_cuda_engine(self, serialized: bytes) -> Engine | None:
        if self._trt.yes("deserialize_cuda_engine") and serialized.startswith(b'{"path"'):
            return Engine(self._trt, self._logger, **json.loads(serialized))
        self._logger.log(
            Severity.ERROR, "The engine plan file is not compatible with this version of TensorRT."
        )
        return None


class Engine:
    device_memory_size_v2 = SCRATCH

    def __init__(self, trt: FakeTensorRT, logger: Any, path: str, profile: dict[str, Any]) -> None:
        self.trt = trt
        self.logger = logger
        self.path = path
        self.profile = profile

    def get_tensor_profile_shape(self, name: str, profile_index: int) -> Any:
        return self.profile[name]

    def create_runtime_config(self) -> RuntimeConfig:
        assert self.trt.rtx
        return RuntimeConfig(self.trt)

    def create_execution_context(self, **kind: Any) -> Context | None:
        assert set(kind) == ({"runtime_config"} if self.trt.rtx else {"strategy"})
        if not self.trt.yes("create_execution_context"):
            return None
        context = Context(self, **kind)
        self.trt.contexts.append(context)
        return context


class RuntimeConfig:
    dynamic_shapes_kernel_specialization_strategy = "lazy"

    def __init__(self, trt: FakeTensorRT) -> None:
        self._trt = trt
        self.cache: RuntimeCache | None = None
        self.strategy = "static"

    def set_execution_context_allocation_strategy(self, strategy: str) -> None:
        self.strategy = strategy

    def create_runtime_cache(self) -> RuntimeCache:
        self._trt.calls["create_runtime_cache"] += 1
        return RuntimeCache(self._trt)

    def set_runtime_cache(self, cache: RuntimeCache) -> bool:
        self.cache = cache
        return True


class RuntimeCache:
    """Knows the shapes that were compiled."""

    def __init__(self, trt: FakeTensorRT) -> None:
        self._trt = trt
        self.known: set[str] = set()

    def serialize(self) -> bytes:
        return json.dumps(sorted(self.known)).encode()

    def deserialize(self, blob: bytes) -> bool:
        if self._trt.yes("deserialize"):
            self.known = set(json.loads(blob))
            return True
        return False


class Context:
    def __init__(self, engine: Engine, strategy: str = "", runtime_config: Any = None) -> None:
        self._engine = engine
        self._trt = engine.trt
        self._config = runtime_config
        assert (runtime_config.strategy if runtime_config else strategy) == "ours"
        self._session = session(engine.path)
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._addresses: dict[str, int] = {}
        self.scratch = (0, 0)
        self.warm = False

    def set_device_memory(self, memory: int, size: int) -> None:
        self._trt.cuda.view(memory, size)
        self.scratch = (memory, size)

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        smallest, _, largest = self._engine.profile[name]
        fits = all(low <= size <= high for low, size, high in zip(smallest, shape, largest, strict=True))
        if not fits:
            self._engine.logger.log(Severity.ERROR, f"Supplied {name} is out of the profile.")
        self._shapes[name] = tuple(shape)
        self.warm = False
        return fits

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        if name not in self._shapes:
            inputs = {
                node.name: np.zeros(self._shapes[node.name], DTYPES[node.type])
                for node in self._session.get_inputs()
            }
            outputs = self._session.run(None, inputs)
            for node, array in zip(self._session.get_outputs(), outputs, strict=True):
                self._shapes[node.name] = array.shape
        return self._shapes[name]

    def set_tensor_address(self, name: str, memory: int) -> bool:
        self._addresses[name] = memory
        return self._trt.yes("set_tensor_address")

    def is_stream_capturable(self, stream: int) -> bool:
        assert self._trt.rtx
        return self._trt.capturable

    def execute_async_v3(self, stream: int) -> bool:
        assert stream == int(self._trt.cuda.stream)
        assert self.scratch[1] >= SCRATCH, "no scratch memory"
        if not self._trt.yes("execute_async_v3"):
            return False
        if self._trt.cuda.capturing:
            assert self.warm, "captured before it ran once"
            self._trt.calls["captured"] += 1
        elif self._config is not None:
            key = f"{self._engine.path} {sorted(self._shapes.items())}"
            if key not in self._config.cache.known:
                self._trt.calls["compiled"] += 1
            assert self._config.dynamic_shapes_kernel_specialization_strategy == "eager"
            self._config.cache.known.add(key)
        self.warm = True
        self._trt.cuda.enqueue(self._compute)
        return True

    def _compute(self) -> None:
        inputs = {
            node.name: self._array(node.name, DTYPES[node.type]).copy() for node in self._session.get_inputs()
        }
        nodes = self._session.get_outputs()
        for node, array in zip(nodes, self._session.run(None, inputs), strict=True):
            self._array(node.name, DTYPES[node.type])[...] = array

    def _array(self, name: str, dtype: Any) -> np.ndarray[Any, Any]:
        shape = self.get_tensor_shape(name)
        nbytes = int(np.prod(shape)) * np.dtype(dtype).itemsize
        return self._trt.cuda.view(self._addresses[name], nbytes).view(dtype).reshape(shape)
