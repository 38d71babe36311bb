"""One component of a bundle on the device: an engine, its tensors' memory, a CUDA graph per batch and size.

    program = Program(library, cuda, "denoiser", engine, manifest.components["denoiser"], make_context)
    program.put("x", 0, row)                      # row by row from the device, or all at once from the host
    shapes = program.run({"x": (1, 16, 64, 64), …})
    x_next = program.take("x_next", shapes["x_next"], 0)

Memory is laid out once, for the largest shapes: a captured graph has its addresses in it. For the same reason each
graph has an execution context of its own; all of them share one scratch memory, for they never run at once.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engines.bundle import Component
from engines.cuda import Cuda, Row, Shape
from engines.errors import ExecutionError
from engines.tensorrt_library import Library

log = logging.getLogger("engines.tensorrt")

LATENT = "x"
"""The one input whose rows change with every call, and in size; what else lies in its place is not copied again."""


@dataclass(frozen=True)
class _Prepared:
    """Everything for one set of input shapes. No graph: the work is queued anew each time."""

    context: Any
    outputs: Mapping[str, Shape]
    graph: Any


class Program:
    """Loaded once, called from one thread at a time. `make_context` gives a context that has its scratch memory."""

    def __init__(
        self,
        library: Library,
        cuda: Cuda,
        name: str,
        engine: Any,
        component: Component,
        make_context: Callable[[], Any],
    ) -> None:
        self._library = library
        self._cuda = cuda
        self._name = name
        self._make_context = make_context
        self._dtypes = {
            tensor: np.dtype(spec.dtype) for tensor, spec in {**component.inputs, **component.outputs}.items()
        }
        self._inputs = tuple(component.inputs)
        self._outputs = tuple(component.outputs)
        largest = {tensor: tuple(engine.get_tensor_profile_shape(tensor, 0)[2]) for tensor in self._inputs}
        shapes = {**largest, **self._output_shapes(self._shaped(largest))}
        self._memory = {tensor: cuda.allocate(self._bytes(tensor, shape)) for tensor, shape in shapes.items()}
        self._prepared: dict[tuple[Shape, ...], _Prepared] = {}
        self._lying: dict[str, dict[int, Row]] = {tensor: {} for tensor in self._inputs}

    def put(self, tensor: str, slot: int, row: Row) -> None:
        """Queue one picture's row of an input."""
        if self._lying[tensor].get(slot) is row:
            return
        self._cuda.copy(self._memory[tensor] + slot * row.nbytes, row.pointer, row.nbytes)
        if tensor != LATENT:
            self._lying[tensor][slot] = row

    def put_all(self, tensor: str, rows: NDArray[Any]) -> None:
        """Queue a whole input from the host."""
        self._lying[tensor].clear()
        self._cuda.upload(self._memory[tensor], rows.astype(self._dtypes[tensor], copy=False))

    def run(self, shapes: Mapping[str, Shape]) -> Mapping[str, Shape]:
        """Queue a run on what was put, of `shapes`; returns the outputs' shapes.

        The first run of given shapes waits for the device and prepares for all later ones.
        """
        key = tuple(shapes[tensor] for tensor in self._inputs)
        if key not in self._prepared:
            self._prepared[key] = self._prepare(shapes)
        prepared = self._prepared[key]
        if prepared.graph is not None:
            self._cuda.launch(prepared.graph)
        else:
            self._enqueue(prepared.context)
        return prepared.outputs

    def prepared(self) -> int:
        """For how many sets of shapes it has run."""
        return len(self._prepared)

    def take(self, tensor: str, shape: Shape, slot: int) -> Row:
        """Queue the copy of one picture's row of a float32 output, of the batch's `shape`."""
        row = self._cuda.row(shape[1:])
        self._cuda.copy(row.pointer, self._memory[tensor] + slot * row.nbytes, row.nbytes)
        return row

    def download(self, tensor: str, shape: Shape) -> NDArray[Any]:
        """Wait for the device, and return a whole output."""
        return self._cuda.download(self._memory[tensor], shape, self._dtypes[tensor])

    def forget_rows(self) -> None:
        """Take nothing for granted that lies in the inputs."""
        for rows in self._lying.values():
            rows.clear()

    def _prepare(self, shapes: Mapping[str, Shape]) -> _Prepared:
        """Run once, which lets the runtime do all that is done once (and cannot be captured), then capture."""
        context = self._shaped(shapes)
        outputs = self._output_shapes(context)
        for tensor in (*self._inputs, *self._outputs):
            self._accept(context.set_tensor_address(tensor, self._memory[tensor]), f"the memory of {tensor}")
        self._enqueue(context)
        self._cuda.synchronize()
        graph = None
        try:
            if self._library.rtx and not context.is_stream_capturable(self._cuda.handle):
                raise ExecutionError("TensorRT-RTX says that this engine cannot be captured")
            graph = self._cuda.capture(lambda: context.execute_async_v3(self._cuda.handle))
        except ExecutionError as error:
            log.warning("%s at %s runs without a CUDA graph: %s", self._name, dict(shapes), error)
        return _Prepared(context, outputs, graph)

    def _shaped(self, shapes: Mapping[str, Shape]) -> Any:
        context = self._make_context()
        for tensor in self._inputs:
            self._accept(context.set_input_shape(tensor, shapes[tensor]), f"{tensor} of {shapes[tensor]}")
        return context

    def _output_shapes(self, context: Any) -> dict[str, Shape]:
        return {tensor: tuple(context.get_tensor_shape(tensor)) for tensor in self._outputs}

    def _enqueue(self, context: Any) -> None:
        self._accept(context.execute_async_v3(self._cuda.handle), "the call")

    def _accept(self, accepted: bool, what: str) -> None:
        if not accepted:
            raise ExecutionError(
                f"{self._library.title} did not accept {what} of {self._name}: {self._library.logger.why()}"
            )

    def _bytes(self, tensor: str, shape: Shape) -> int:
        return int(np.prod(shape)) * self._dtypes[tensor].itemsize
