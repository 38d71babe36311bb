"""System shared memory between this process and a Triton server on the same machine: tensors go by name, not by gRPC.

region = SharedRegion(server.client, 1 << 20)
inputs = region.inputs({"x": x})
outputs = region.outputs({"image": ((4, 128, 128, 3), np.dtype(np.uint8))})
…
image = region.read("image")
"""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from tritonclient.grpc import InferenceServerClient, InferInput, InferRequestedOutput, InferResult
from tritonclient.utils import InferenceServerException, np_to_triton_dtype
from tritonclient.utils import shared_memory as shm

from engines.bundle import TensorSpec
from engines.rows import Array
from engines.triton_server import ASK_TIMEOUT_S

Layout = tuple[tuple[int, ...], np.dtype[np.generic]]
"""Shape, batch included, and type of a tensor."""

FOLDER = Path("/dev/shm")
ALIGNMENT = 256
"""What device memory is aligned to; more than the host's needs."""

SMALL_BYTES = 1 << 17
"""Below it a tensor travels in the request: naming it costs as much as sending it (`docs/triton.md`)."""


def layouts_of(specs: Mapping[str, TensorSpec], batch: int, known: Mapping[str, int]) -> dict[str, Layout]:
    """Shapes of `batch` rows, with `known` numbers for the names of the other dimensions.

    Raises:
        KeyError: the bundle has a dimension of which nobody knows the number.
    """
    return {
        name: (
            (batch, *(known[dim] if isinstance(dim, str) else dim for dim in spec.shape[1:])),
            np.dtype(spec.dtype),
        )
        for name, spec in specs.items()
    }


def size_of(layout: Layout) -> int:
    """Bytes of a tensor."""
    shape, dtype = layout
    return int(np.prod(shape)) * dtype.itemsize


def aligned(layout: Layout) -> int:
    """Bytes of a tensor and of the gap to the next."""
    return -(-size_of(layout) // ALIGNMENT) * ALIGNMENT


def span(layouts: Mapping[str, Layout]) -> int:
    """Bytes of all tensors, one after the other."""
    return sum(map(aligned, layouts.values()))


def infer_input(name: str, array: Array) -> InferInput:
    """A described input without its data. A tensor of one number per row is `(batch, 1)` to Triton."""
    shape = array.shape if array.ndim > 1 else (*array.shape, 1)
    return InferInput(name, list(shape), np_to_triton_dtype(array.dtype))


def plain_input(name: str, array: Array) -> InferInput:
    """An input whose data travels in the request."""
    described = infer_input(name, array)
    return described.set_data_from_numpy(np.ascontiguousarray(array).reshape(described.shape()))


class SharedRegion:
    """One region of `nbytes`, made, filled with zeros and known to the server. One call uses it at a time.

    Raises:
        OSError: there is not that much shared memory.
        InferenceServerException: the server cannot open it: it runs elsewhere, in a container of its own, or as another
            user.
    """

    def __init__(self, client: InferenceServerClient, nbytes: int) -> None:
        self._client = client
        self._size = nbytes
        self._end = 0
        self._places: dict[str, tuple[int, Layout]] = {}
        self.name = f"cdm-{secrets.token_hex(16)}"
        try:
            self._handle = shm.create_shared_memory_region(self.name, self.name, nbytes, create_only=True)
        except shm.SharedMemoryException as error:
            raise OSError(
                f"{nbytes} bytes of shared memory cannot be had: {error.__cause__ or error}"
            ) from error
        try:
            _reserve(self.name, nbytes)
            client.register_system_shared_memory(self.name, self.name, nbytes, client_timeout=ASK_TIMEOUT_S)
        except BaseException:
            self.destroy()
            raise

    def inputs(self, arrays: Mapping[str, Array]) -> list[InferInput]:
        """Copy the large arrays to the region's beginning, and describe all."""
        self._end = 0
        self._places.clear()
        described = []
        for name, array in arrays.items():
            if array.nbytes < SMALL_BYTES:
                described.append(plain_input(name, array))
                continue
            offset = self._place((array.shape, array.dtype))
            shm.set_shared_memory_region(self._handle, [array], offset)
            described.append(infer_input(name, array).set_shared_memory(self.name, array.nbytes, offset))
        return described

    def outputs(self, layouts: Mapping[str, Layout]) -> list[InferRequestedOutput]:
        """Places for large outputs, after the inputs."""
        described = []
        for name, layout in layouts.items():
            described.append(InferRequestedOutput(name))
            if size_of(layout) >= SMALL_BYTES:
                offset = self._place(layout)
                self._places[name] = (offset, layout)
                described[-1].set_shared_memory(self.name, size_of(layout), offset)
        return described

    def read(self, result: InferResult, name: str) -> Array:
        """An output, from its place (copied) or from the answer."""
        if name not in self._places:
            array: Array = result.as_numpy(name)
            return array
        offset, (shape, dtype) = self._places[name]
        view: Array = shm.get_contents_as_numpy(self._handle, dtype, list(shape), offset)
        return view.copy()

    def _place(self, layout: Layout) -> int:
        offset = self._end
        self._end += aligned(layout)
        assert self._end <= self._size, (layout, self._end, self._size)
        return offset

    def is_registered(self) -> bool:
        """Whether the server has it; one that was started anew has not."""
        try:
            status = self._client.get_system_shared_memory_status(client_timeout=ASK_TIMEOUT_S)
        except InferenceServerException:
            return False
        return self.name in status.regions

    def unregister(self) -> None:
        """Have the server forget it, if it is there."""
        with contextlib.suppress(InferenceServerException):
            self._client.unregister_system_shared_memory(self.name, client_timeout=ASK_TIMEOUT_S)

    def destroy(self) -> None:
        """Free it on this side. What the server still writes goes nowhere."""
        shm.destroy_shared_memory_region(self._handle)


def _reserve(key: str, nbytes: int) -> None:
    """Take the pages now: where the file system is full (a container has 64 MiB), the first write would be a SIGBUS."""
    if not FOLDER.is_dir():
        return
    descriptor = os.open(FOLDER / key, os.O_RDWR)
    try:
        os.posix_fallocate(descriptor, 0, nbytes)
    finally:
        os.close(descriptor)
