"""A Triton server on this machine's GPU: latents and embeddings stay there, and no step copies one to the host.

    cdm-serve --engine triton-cuda --triton-url 127.0.0.1:8001

A picture's latent is a row of this process's device memory. A call copies the rows of its batch side by side into a
region that the server has opened (CUDA IPC), names it in the request, and copies the results out of it, all on the
device. Only σ, token ids and noise go up, only finished pictures come down.

Nothing here has run on a GPU yet. Its tests drive it against a double of the CUDA runtime, and a server that is one.
"""

from __future__ import annotations

import contextlib
import importlib
import secrets
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray
from tritonclient.grpc import InferenceServerClient, InferInput, InferRequestedOutput
from tritonclient.utils import InferenceServerException

from engines.base import Conditioning, EngineOptions, Sample, TokenIds
from engines.bundle import Bundle
from engines.cuda import Cuda, Row
from engines.errors import ExecutionError, RuntimeUnavailable
from engines.rows import Array
from engines.triton import TritonEngine
from engines.triton_memory import Layout, aligned, size_of
from engines.triton_server import ASK_TIMEOUT_S, CALL_TIMEOUT_S, TritonServer, connect, reason

Column = Sequence[Row] | Array
"""One entry per picture: rows on the device, or an array in the request."""


class CudaRegion:
    """`nbytes` of device 0 that the server has opened. One call uses it at a time.

    Raises:
        InferenceServerException: the server cannot open it: it has no GPU, another one, or runs elsewhere.
    """

    def __init__(self, client: InferenceServerClient, nbytes: int) -> None:
        self._client = client
        self._memory = importlib.import_module("tritonclient.utils.cuda_shared_memory")
        self.name = f"cdm-{secrets.token_hex(16)}"
        self._handle = self._memory.create_shared_memory_region(self.name, nbytes, 0)
        self.address = int(self._handle._base_addr)  # the package has no public name for it
        try:
            raw = self._memory.get_raw_handle(self._handle)
            client.register_cuda_shared_memory(self.name, raw, 0, nbytes, client_timeout=ASK_TIMEOUT_S)
        except BaseException:
            self.destroy()
            raise

    def is_registered(self) -> bool:
        """Whether the server has it; one that was started anew has not."""
        try:
            status = self._client.get_cuda_shared_memory_status(client_timeout=ASK_TIMEOUT_S)
        except InferenceServerException:
            return False
        return self.name in status.regions

    def unregister(self, client: InferenceServerClient | None = None) -> None:
        """Have the server close it, if it is there; `client` is for a region whose own is closed."""
        with contextlib.suppress(InferenceServerException):
            (client or self._client).unregister_cuda_shared_memory(self.name, client_timeout=ASK_TIMEOUT_S)

    def destroy(self) -> None:
        """Free it."""
        self._memory.destroy_shared_memory_region(self._handle)
        self._handle = None


class TritonCudaEngine(TritonEngine):
    """`TritonEngine` whose samples and conditioning are rows of device memory. `runtime` takes cuda-python's place."""

    runtime: ClassVar[str] = "triton-cuda"

    def __init__(
        self,
        bundle: Bundle,
        options: EngineOptions,
        *,
        runtime: Any = None,
        timeout_s: float = CALL_TIMEOUT_S,
    ) -> None:
        self._cuda = Cuda(runtime)
        self._device: CudaRegion | None = None
        self._abandoned: list[CudaRegion] = []
        try:
            super().__init__(bundle, options, timeout_s=timeout_s)
        except BaseException:
            self._cuda.close()
            raise

    # calls

    def put(self, noise: NDArray[np.float32]) -> Sample:
        self._check_shapes("decoder", {"x": noise[None]})
        row = self._cuda.row(noise.shape)
        self._cuda.upload(row.pointer, noise.astype(np.float32, copy=False))
        self._cuda.synchronize()
        return row

    def encode(self, tokens: Sequence[TokenIds]) -> list[Conditioning]:
        ids = self._text.batch(tokens)
        outputs: dict[str, list[Row]] = {}
        for name in self.manifest.text_encoders:
            wanted = {key: ids[key] for key in self.manifest.components[name].inputs}
            for part in self._each(name, wanted):
                for output, rows in part.items():
                    outputs.setdefault(output, []).extend(rows)
        return list(zip(*(outputs[name] for name in self.manifest.conditioning), strict=True))

    def denoise(
        self,
        samples: Sequence[Sample],
        sigma: Sequence[float],
        sigma_next: Sequence[float],
        conditioning: Sequence[Conditioning],
    ) -> tuple[list[Sample], list[Sample]]:
        columns: dict[str, Column] = {
            "x": samples,
            "sigma": np.array(sigma, dtype=np.float32),
            "sigma_next": np.array(sigma_next, dtype=np.float32),
            **dict(zip(self.manifest.conditioning, zip(*conditioning, strict=True), strict=True)),
        }
        parts = list(self._each("denoiser", columns))
        moved, previews = ([row for part in parts for row in part[name]] for name in ("x_next", "x0"))
        return moved, previews

    def decode(self, samples: Sequence[Sample]) -> NDArray[np.uint8]:
        return np.concatenate([part["image"] for part in self._each("decoder", {"x": samples})])

    def _each(self, component: str, columns: Mapping[str, Column]) -> Iterator[dict[str, Any]]:
        """Run `component` on all pictures, or in groups of `invariant_batch`: each group's outputs, an entry a picture.

        Floats come as rows on the device, pictures as an array.
        """
        batch = len(next(iter(columns.values())))
        assert 1 <= batch <= self.info.max_batch, (component, batch, self.info.max_batch)
        self._check_shapes(
            component, {name: _of_its_shape(component, name, each) for name, each in columns.items()}
        )
        size = self._group or batch
        for start in range(0, batch, size):
            rows = list(range(start, min(start + size, batch)))
            count = len(rows)
            if self._group:  # padded with its own first row
                rows += rows[:1] * (size - count)
            chosen = {
                name: each[rows] if isinstance(each, np.ndarray) else [each[row] for row in rows]
                for name, each in columns.items()
            }
            yield self._told(component, batch, chosen, count)

    def _told(self, component: str, batch: int, columns: Mapping[str, Column], count: int) -> dict[str, Any]:
        try:
            return self._with_server(lambda: self._on_device(component, columns, count))
        except Exception as error:  # the client's, the package's, and ours
            told = reason(error) if isinstance(error, InferenceServerException) else error
            raise ExecutionError(f"{self.runtime} failed in {component} at batch {batch}: {told}") from error

    def _on_device(self, component: str, columns: Mapping[str, Column], count: int) -> dict[str, Any]:
        device = self._device
        assert device is not None
        inputs = self._given({name: each for name, each in columns.items() if isinstance(each, np.ndarray)})
        end = 0
        for name, column in columns.items():
            if isinstance(column, np.ndarray):
                continue
            layout: Layout = (_shape(column), np.dtype(np.float32))
            for slot, row in enumerate(column):
                self._cuda.copy(device.address + end + slot * row.nbytes, row.pointer, row.nbytes)
            described = InferInput(name, list(layout[0]), "FP32")
            inputs.append(described.set_shared_memory(device.name, size_of(layout), end))
            end += aligned(layout)
        self._cuda.synchronize()  # the server does not wait for this process's copies
        layouts = self._outputs_of(component, {name: _shape(each) for name, each in columns.items()})
        outputs = self._wanted({name: layout for name, layout in layouts.items() if layout[1] != np.float32})
        places = {}
        for name, layout in layouts.items():
            if layout[1] == np.float32:
                places[name] = device.address + end
                outputs.append(InferRequestedOutput(name))
                outputs[-1].set_shared_memory(device.name, size_of(layout), end)
                end += aligned(layout)
        result = self._infer(component, inputs, outputs)
        self._check_shapes_of(result, layouts)
        taken: dict[str, Any] = {}
        for name, (shape, _) in layouts.items():
            if name in places:
                taken[name] = [self._taken(places[name], shape, slot) for slot in range(count)]
            else:
                taken[name] = self._read(result, name)[:count]
        self._cuda.synchronize()
        return taken

    def _taken(self, address: int, shape: tuple[int, ...], slot: int) -> Row:
        row = self._cuda.row(shape[1:])
        self._cuda.copy(row.pointer, address + slot * row.nbytes, row.nbytes)
        return row

    # the connection

    def _share(self, server: TritonServer, max_batch: int) -> None:
        super()._share(server, max_batch)
        try:
            self._device = CudaRegion(server.client, self._bytes(max_batch))
        except Exception as error:  # the package has exceptions of its own
            told = reason(error) if isinstance(error, InferenceServerException) else error
            raise RuntimeUnavailable(
                f"the Triton server at {server.url} cannot share this process's GPU memory ({told}); both must run on "
                "this machine and on its first GPU, or choose the triton runtime"
            ) from error

    def _is_remembered(self) -> bool:
        return super()._is_remembered() and (self._device is None or self._device.is_registered())

    def _disconnect(self, late: bool = False) -> None:
        device, self._device = self._device, None
        try:
            if device is not None and late:
                # The late call may still write there, and freed it would be another's.
                self._abandoned.append(device)
            elif device is not None:
                device.unregister()
                device.destroy()
        finally:
            super()._disconnect(late)

    def close(self) -> None:
        """End the connection, and free everything on the device, rows that are still held included."""
        try:
            super().close()
            self._free_abandoned()
        finally:
            self._cuda.close()

    def _free_abandoned(self) -> None:
        """The server closes its side first: what it has open must not be freed. One that is gone has nothing open."""
        if not self._abandoned:
            return
        with contextlib.closing(connect(self._options.triton_url)) as client:
            while self._abandoned:
                region = self._abandoned.pop()
                region.unregister(client)
                region.destroy()


def _shape(column: Column) -> tuple[int, ...]:
    return tuple(column.shape) if isinstance(column, np.ndarray) else (len(column), *column[0].shape)


def _of_its_shape(component: str, name: str, column: Column) -> Array:
    """An array without memory of its own, for what checks shapes."""
    if not isinstance(column, np.ndarray) and len(shapes := {row.shape for row in column}) > 1:
        raise ExecutionError(f"{component} takes {name} of one shape in a batch, not of {sorted(shapes)}")
    return np.broadcast_to(np.float32(0), _shape(column))
