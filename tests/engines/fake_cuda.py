"""A double of `cuda.bindings.runtime` that records calls and keeps "device" memory on the host.

It is lazier than a GPU ever is: what is queued runs only when somebody waits for it, so a host buffer that is written
or read too early shows. Every address is checked: a copy must lie within one allocation of the right kind.
"""

from __future__ import annotations

import ctypes
from collections import Counter
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
from cuda.bindings import runtime as real

Work = Callable[[], None]

SUCCESS = real.cudaError_t.cudaSuccess
KINDS = real.cudaMemcpyKind
ON_DEVICE = {
    KINDS.cudaMemcpyDeviceToDevice: (True, True),
    KINDS.cudaMemcpyHostToDevice: (True, False),
    KINDS.cudaMemcpyDeviceToHost: (False, True),
}
"""Kind of copy → whether its target and its source are on the device."""


class FakeCuda:
    """One device of compute capability `capability`. `calls` holds (function, arguments) in order."""

    cudaMemcpyKind = real.cudaMemcpyKind
    cudaStreamCaptureMode = real.cudaStreamCaptureMode
    cudaStreamNonBlocking = real.cudaStreamNonBlocking
    cudaGetErrorName = staticmethod(real.cudaGetErrorName)
    cudaGetErrorString = staticmethod(real.cudaGetErrorString)

    def __init__(
        self,
        capability: tuple[int, int] = (8, 9),
        name: str = "NVIDIA Fake 4090",
        driver: int = 13010,
        free: int = 1 << 34,
    ) -> None:
        self.calls: list[tuple[str, tuple[Any, ...]]] = []
        self.stream = real.cudaStream_t(0x51)
        self._properties = SimpleNamespace(name=name.encode(), major=capability[0], minor=capability[1])
        self._driver = driver
        self._free = free
        self._memory: dict[int, tuple[np.ndarray[Any, Any], bool]] = {}
        self._queue: list[Work] = []
        self._captured: list[Work] | None = None
        self._graphs: dict[int, list[Work]] = {}
        self._failing: dict[str, Any] = {}

    def fail(self, function: str, error: Any = real.cudaError_t.cudaErrorIllegalAddress) -> None:
        """Let the next call of `function` fail."""
        self._failing[function] = error

    def count(self) -> Counter[str]:
        """Calls by function; copies by their kind too, as `HostToDevice`."""
        counts = Counter(name for name, _ in self.calls)
        counts.update(
            arguments[3].name.removeprefix("cudaMemcpy")
            for name, arguments in self.calls
            if name == "cudaMemcpyAsync"
        )
        return counts

    def held(self) -> int:
        """Allocations, host and device, that nobody has freed, and graphs that nobody has destroyed."""
        return len(self._memory) + len(self._graphs)

    def view(self, address: int, nbytes: int, on_device: bool = True) -> np.ndarray[Any, Any]:
        """Bytes at an address, which must lie within one allocation."""
        for start, (array, device) in self._memory.items():
            if start <= address and address + nbytes <= start + len(array):
                assert device == on_device, f"{address:#x} is {'device' if device else 'host'} memory"
                return array[address - start : address - start + nbytes]
        raise AssertionError(f"{nbytes} bytes at {address:#x} are in no allocation")

    def enqueue(self, work: Work) -> None:
        """Queue work of a kernel's."""
        (self._queue if self._captured is None else self._captured).append(work)

    @property
    def capturing(self) -> bool:
        return self._captured is not None

    @property
    def pending(self) -> int:
        """How much is queued that nobody has waited for."""
        return len(self._queue)

    # the functions, as the bindings have them: a status, then what they give

    def cudaGetDeviceCount(self) -> Any:
        return self._called("cudaGetDeviceCount", (), 1)

    def cudaSetDevice(self, device: int) -> Any:
        return self._called("cudaSetDevice", (device,))

    def cudaGetDeviceProperties(self, device: int) -> Any:
        return self._called("cudaGetDeviceProperties", (device,), self._properties)

    def cudaDriverGetVersion(self) -> Any:
        return self._called("cudaDriverGetVersion", (), self._driver)

    def cudaMemGetInfo(self) -> Any:
        return self._called("cudaMemGetInfo", (), self._free, 1 << 35)

    def cudaStreamCreateWithFlags(self, flags: int) -> Any:
        return self._called("cudaStreamCreateWithFlags", (flags,), self.stream)

    def cudaStreamDestroy(self, stream: Any) -> Any:
        return self._called("cudaStreamDestroy", (stream,))

    def cudaMalloc(self, nbytes: int) -> Any:
        return self._allocate("cudaMalloc", nbytes, True)

    def cudaMallocHost(self, nbytes: int) -> Any:
        return self._allocate("cudaMallocHost", nbytes, False)

    def cudaFree(self, pointer: int) -> Any:
        return self._release("cudaFree", pointer, True)

    def cudaFreeHost(self, pointer: int) -> Any:
        return self._release("cudaFreeHost", pointer, False)

    def cudaMemcpyAsync(self, target: int, source: int, nbytes: int, kind: Any, stream: Any) -> Any:
        to_device, from_device = ON_DEVICE[kind]
        self.view(target, nbytes, to_device)
        self.view(source, nbytes, from_device)
        assert int(stream) == int(self.stream)
        self.enqueue(lambda: ctypes.memmove(target, source, nbytes) and None)
        return self._called("cudaMemcpyAsync", (target, source, nbytes, kind, stream))

    def cudaStreamSynchronize(self, stream: Any) -> Any:
        assert self._captured is None, "a stream that is being captured cannot be waited for"
        queue, self._queue = self._queue, []
        if "cudaStreamSynchronize" not in self._failing:  # else nobody knows what has run
            for work in queue:
                work()
        return self._called("cudaStreamSynchronize", (stream,))

    def cudaStreamBeginCapture(self, stream: Any, mode: Any) -> Any:
        assert self._captured is None
        self._captured = []
        return self._called("cudaStreamBeginCapture", (stream, mode))

    def cudaStreamEndCapture(self, stream: Any) -> Any:
        assert self._captured is not None
        graph = 1 + max((0, *self._graphs))
        self._graphs[graph], self._captured = self._captured, None
        return self._called("cudaStreamEndCapture", (stream,), real.cudaGraph_t(graph))

    def cudaGraphInstantiate(self, graph: Any, flags: int) -> Any:
        executable = 1 + max(self._graphs)
        self._graphs[executable] = list(self._graphs[int(graph)])
        return self._called("cudaGraphInstantiate", (graph, flags), real.cudaGraphExec_t(executable))

    def cudaGetLastError(self) -> Any:
        self.calls.append(("cudaGetLastError", ()))
        return (real.cudaError_t.cudaSuccess,)

    def cudaGraphDestroy(self, graph: Any) -> Any:
        del self._graphs[int(graph)]
        return self._called("cudaGraphDestroy", (graph,))

    def cudaGraphExecDestroy(self, graph: Any) -> Any:
        del self._graphs[int(graph)]
        return self._called("cudaGraphExecDestroy", (graph,))

    def cudaGraphLaunch(self, graph: Any, stream: Any) -> Any:
        for work in self._graphs[int(graph)]:
            self.enqueue(work)
        return self._called("cudaGraphLaunch", (graph, stream))

    def _allocate(self, name: str, nbytes: int, device: bool) -> Any:
        array = np.full(nbytes, 0xA5, np.uint8)  # nobody may count on zeros
        status, *_ = result = self._called(name, (nbytes,), array.ctypes.data)
        if status == SUCCESS:
            self._memory[array.ctypes.data] = array, device
        return result

    def _release(self, name: str, pointer: int, device: bool) -> Any:
        assert self._memory.pop(pointer)[1] == device
        return self._called(name, (pointer,))

    def _called(self, name: str, arguments: tuple[Any, ...], *values: Any) -> tuple[Any, ...]:
        self.calls.append((name, arguments))
        status = self._failing.pop(name, SUCCESS)
        return (status, *(values if status == SUCCESS else (None,) * len(values)))
