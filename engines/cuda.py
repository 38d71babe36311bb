"""CUDA through `cuda.bindings.runtime` (the package cuda-python) and nothing else: one device, one stream.

Every status is checked. Copies and launches are queued on the stream; nothing has happened before `synchronize`.

    cuda = Cuda()
    row = cuda.row((16, 64, 64))                  # float32 on the device, its memory used again once `row` is forgotten
    cuda.upload(row.pointer, noise)
    graph = cuda.capture(lambda: context.execute_async_v3(cuda.handle))
    cuda.launch(graph)
    cuda.synchronize()
    cuda.close()
"""

from __future__ import annotations

import ctypes
import importlib
from collections import deque
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engines.errors import ExecutionError, RuntimeUnavailable

Shape = tuple[int, ...]

STAGING_BYTES = 1 << 20
"""Page-locked host memory to begin with; it grows to what a call copies."""


class Row:
    """A float32 tensor in device memory that belongs to one picture. Forgotten, its memory serves the next of its size.

    It may be forgotten on any thread: that calls no CUDA.
    """

    __slots__ = ("_home", "nbytes", "pointer", "shape")

    def __init__(self, pointer: int, shape: Shape, nbytes: int, home: deque[int]) -> None:
        self.pointer = pointer
        self.shape = shape
        self.nbytes = nbytes
        self._home = home

    def __del__(self) -> None:
        self._home.append(self.pointer)


class Cuda:
    """Device 0 (of those that `CUDA_VISIBLE_DEVICES` leaves). Calls come from one thread at a time.

    Args:
        runtime: `cuda.bindings.runtime`, or a double of it.

    Raises:
        RuntimeUnavailable: the package is missing, or there is no device.
    """

    def __init__(self, runtime: Any = None) -> None:
        if runtime is None:
            try:
                runtime = importlib.import_module("cuda.bindings.runtime")
            except ImportError as error:
                raise RuntimeUnavailable(
                    "CUDA needs the package cuda-python, which is not installed"
                ) from error
        self._cuda = runtime
        self._allocated: list[int] = []
        self._free: dict[int, deque[int]] = {}
        self._graphs: list[Any] = []
        self._pinned = 0
        self._staging: NDArray[np.uint8] = np.empty(0, np.uint8)
        self._staged = 0
        try:
            if self._call("count devices", runtime.cudaGetDeviceCount) < 1:
                raise ExecutionError("CUDA sees no device")
            self._call("use the device", runtime.cudaSetDevice, 0)
            properties = self._call("describe the device", runtime.cudaGetDeviceProperties, 0)
            self.driver = int(self._call("read the driver's version", runtime.cudaDriverGetVersion))
            self._stream = self._call(
                "make a stream", runtime.cudaStreamCreateWithFlags, runtime.cudaStreamNonBlocking
            )
        except ExecutionError as error:
            raise RuntimeUnavailable(
                f"no usable CUDA device here: {error}; run on a machine with an NVIDIA GPU and its driver, or choose "
                "another runtime"
            ) from error
        self.name = properties.name.decode().rstrip("\0")
        self.capability = f"{properties.major}.{properties.minor}"
        self.handle = int(self._stream)
        """The stream, as other libraries take it."""

    def free_bytes(self) -> int:
        """Device memory that nobody has taken."""
        free, _ = self._call("ask for free memory", self._cuda.cudaMemGetInfo)
        return int(free)

    # memory

    def allocate(self, nbytes: int) -> int:
        """Device memory, kept until `close`."""
        pointer = int(self._call(f"allocate {nbytes} bytes", self._cuda.cudaMalloc, nbytes))
        self._allocated.append(pointer)
        return pointer

    def row(self, shape: Shape) -> Row:
        """A float32 tensor of its own."""
        nbytes = 4 * int(np.prod(shape))
        home = self._free.setdefault(nbytes, deque())
        try:
            pointer = home.pop()
        except IndexError:
            pointer = self.allocate(nbytes)
        return Row(pointer, shape, nbytes, home)

    def copy(self, target: int, source: int, nbytes: int) -> None:
        """Queue a copy within the device."""
        kind = self._cuda.cudaMemcpyKind.cudaMemcpyDeviceToDevice
        self._call(
            "copy on the device", self._cuda.cudaMemcpyAsync, target, source, nbytes, kind, self._stream
        )

    def upload(self, target: int, array: NDArray[Any]) -> None:
        """Queue a copy to the device; `array` is the caller's again at once."""
        source = self._stage(array.nbytes)
        self._staging[source : source + array.nbytes] = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
        kind = self._cuda.cudaMemcpyKind.cudaMemcpyHostToDevice
        address = self._pinned + source
        self._call(
            "copy to the device",
            self._cuda.cudaMemcpyAsync,
            target,
            address,
            array.nbytes,
            kind,
            self._stream,
        )

    def download(self, source: int, shape: Shape, dtype: np.dtype[Any]) -> NDArray[Any]:
        """Wait for all that is queued, and return an array copied from the device."""
        nbytes = int(np.prod(shape)) * dtype.itemsize
        target = self._stage(nbytes)
        kind = self._cuda.cudaMemcpyKind.cudaMemcpyDeviceToHost
        address = self._pinned + target
        self._call(
            "copy to the host", self._cuda.cudaMemcpyAsync, address, source, nbytes, kind, self._stream
        )
        self.synchronize()
        return self._staging[target : target + nbytes].view(dtype).reshape(shape).copy()

    def _stage(self, nbytes: int) -> int:
        """An offset in the page-locked buffer at which no queued copy reads or writes."""
        if self._staged + nbytes > len(self._staging):
            self.synchronize()
            if nbytes > len(self._staging):
                self._free_staging()
                size = max(nbytes, STAGING_BYTES)
                self._pinned = int(
                    self._call(f"lock {size} bytes of host memory", self._cuda.cudaMallocHost, size)
                )
                self._staging = np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(self._pinned))
        offset = self._staged
        self._staged += -(-nbytes // 16) * 16  # so that every array in it is aligned
        return offset

    def _free_staging(self) -> None:
        if self._pinned:
            self._staging = np.empty(0, np.uint8)
            self._call("free host memory", self._cuda.cudaFreeHost, self._pinned)
            self._pinned = 0

    # work

    def synchronize(self) -> None:
        """Wait for all that is queued; an error of any of it is raised here."""
        self._call("finish what was queued", self._cuda.cudaStreamSynchronize, self._stream)
        self._staged = 0

    def capture(self, enqueue: Callable[[], bool]) -> Any:
        """What `enqueue` queues, as a graph for `launch`; it is recorded and not run.

        Raises:
            ExecutionError: `enqueue` says no, or queued something that cannot be recorded.
        """
        # Only this thread's calls may spoil it: the runtime compiles kernels on threads of its own.
        mode = self._cuda.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
        self._call("begin a capture", self._cuda.cudaStreamBeginCapture, self._stream, mode)
        enqueued = False
        try:
            enqueued = enqueue()
        finally:  # an open capture would swallow every later call
            status, graph = self._cuda.cudaStreamEndCapture(self._stream)
            if not enqueued and not int(status):
                self._call("forget a capture", self._cuda.cudaGraphDestroy, graph)
        if not enqueued:
            raise ExecutionError("the work cannot be captured")
        self._call("end a capture", lambda: (status, graph))
        try:
            executable = self._call("make a graph", self._cuda.cudaGraphInstantiate, graph, 0)
        finally:
            self._call("forget a capture", self._cuda.cudaGraphDestroy, graph)
        self._graphs.append(executable)
        return executable

    def launch(self, graph: Any) -> None:
        """Queue a captured graph."""
        self._call("launch a graph", self._cuda.cudaGraphLaunch, graph, self._stream)

    def close(self) -> None:
        """Wait, then free everything, rows that are still held included. Closing again does nothing."""
        if self._stream is None:
            return
        try:
            self.synchronize()
            for graph in self._graphs:
                self._call("destroy a graph", self._cuda.cudaGraphExecDestroy, graph)
            for pointer in self._allocated:
                self._call("free device memory", self._cuda.cudaFree, pointer)
            self._free_staging()
            self._call("destroy the stream", self._cuda.cudaStreamDestroy, self._stream)
        finally:
            self._stream = None
            self._graphs.clear()
            self._allocated.clear()
            self._free.clear()

    def _call(self, what: str, function: Callable[..., Any], *arguments: Any) -> Any:
        """The function's one value, its values as a tuple, or None; its status is checked."""
        status, *values = function(*arguments)
        if int(status):
            self._cuda.cudaGetLastError()  # else the next launch of another library here would report it as its own
            name = self._cuda.cudaGetErrorName(status)[1].decode()
            meaning = self._cuda.cudaGetErrorString(status)[1].decode()
            raise ExecutionError(f"CUDA could not {what}: {name} ({meaning})")
        return values[0] if len(values) == 1 else tuple(values) or None
