"""TensorRT-RTX and TensorRT on an NVIDIA GPU: latents and embeddings live there, and no step copies one to the host.

A picture's latent is a row of device memory. A call copies the rows of its batch side by side (on the device), launches
the CUDA graph of that batch and size, and copies the results out (on the device). Only σ, token ids and noise go up,
only finished pictures come down.

Every call waits for the device before it returns, so that its time can be measured and its errors are its own.

Nothing here has run on a GPU yet. Its tests drive it against doubles of the CUDA runtime and of the engine; the
engines themselves are built for real, without a GPU (`engines/tensorrt_build.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any, ClassVar, TypeVar

import numpy as np
from numpy.typing import NDArray

from engines.base import EngineInfo, EngineOptions, GraphEngine, TokenIds
from engines.bundle import Bundle
from engines.cache import CompiledCache
from engines.cuda import Cuda, Row, Shape
from engines.errors import ExecutionError, ExportError, RuntimeUnavailable
from engines.tensorrt_build import Order, cached, choose_precision, usable_precisions
from engines.tensorrt_contexts import Contexts
from engines.tensorrt_library import RTX, open_library
from engines.tensorrt_program import Program
from engines.tensorrt_report import Report
from engines.text import BundleTokenizers

Collected = TypeVar("Collected")
Column = Sequence[Row] | NDArray[Any]
"""One entry per picture, on the device or on the host."""

Embedding = tuple[Row, ...]
"""One prompt's tensors, in the order of `manifest.conditioning`."""


class TensorRTEngine(GraphEngine):
    """A bundle on TensorRT.

    Engines are built as it loads, unless `options.cache_dir` has them. `trt` and `runtime` take the place of the
    packages.

    Raises:
        RuntimeUnavailable: no TensorRT, no GPU or none that it builds for, an engine that cannot be built or does not
            fit, or options that mean nothing here.
    """

    runtime: ClassVar[str] = "tensorrt"

    def __init__(
        self, bundle: Bundle, options: EngineOptions, *, trt: Any = None, runtime: Any = None
    ) -> None:
        if options.threads:
            raise RuntimeUnavailable(
                f"threads={options.threads} means nothing to {self.runtime}, whose work is the GPU's; leave it out"
            )
        self.manifest = bundle.manifest
        self._group = options.invariant_batch
        self._text = BundleTokenizers(bundle)
        factor = self.manifest.latent.downscale
        self._latents = {(size.height // factor, size.width // factor) for size in self.manifest.sizes}
        self._library = open_library(self.runtime, trt)
        self._cuda = Cuda(runtime)
        self._programs: dict[str, Program] = {}
        self._reports: dict[str, Report] = {}
        self._contexts: Contexts | None = None
        self._kept = 0
        try:
            self._load(bundle, options)
        except BaseException as error:
            with suppress(ExecutionError):  # what went wrong first is what is told
                self.close()
            if isinstance(error, (ExportError, ExecutionError)):  # another runtime may still serve the bundle
                raise RuntimeUnavailable(f"{self.runtime} cannot serve this bundle here: {error}") from error
            raise

    def _load(self, bundle: Bundle, options: EngineOptions) -> None:
        library, cuda = self._library, self._cuda
        library.check_target(cuda.capability)
        target = cuda.capability if library.rtx else f"{cuda.name} ({cuda.capability})"
        precision = choose_precision(options.precision, self.manifest, cuda.capability)
        rows = max(options.max_batch, self._group)
        order = Order(library, bundle, precision, target, rows, cuda.free_bytes())
        self._limits = {component: order.limit(component) for component in self.manifest.components}
        # What was measured or compiled on one GPU is not another's, even where the engines are.
        own = order.cache(options.cache_dir, gpu=cuda.name, driver=cuda.driver)
        self.cache_folder = own.folder
        store = order.cache(options.cache_dir)
        self._deserializer = library.trt.Runtime(library.logger)
        engines = {component: self._engine(order, store, component) for component in self._limits}
        self._contexts = Contexts(library, cuda, own, engines.values())
        for name, engine in engines.items():
            make = partial(self._contexts.make, engine)
            self._programs[name] = Program(library, cuda, name, engine, self.manifest.components[name], make)
        self.info = EngineInfo(
            runtime=self.runtime,
            version=library.version,
            device=cuda.name,
            precision=precision,
            max_batch=options.max_batch,
            threads=1,
            invariant_batch=options.invariant_batch,
        )

    def _engine(self, order: Order, store: CompiledCache, component: str) -> Any:
        """A deserialized engine; a stored one that this device does not take is built anew."""

        def read(serialized: bytes) -> Any:
            engine = self._deserializer.deserialize_cuda_engine(serialized)
            if engine is None:
                raise ExecutionError(
                    f"{self._library.title} does not take the {component} that it has built: "
                    f"{self._library.logger.why()}"
                )
            return engine

        engine, self._reports[component] = cached(order, store, component, read)
        return engine

    @classmethod
    def precisions(cls, bundle: Bundle) -> tuple[str, ...]:
        library, cuda = open_library(cls.runtime), Cuda()
        try:
            library.check_target(cuda.capability)
            return usable_precisions(bundle.manifest, cuda.capability)
        finally:
            cuda.close()

    # calls

    def tokenize(self, prompt: str) -> TokenIds:
        return self._text.tokenize(prompt)

    def encode(self, tokens: Sequence[TokenIds]) -> list[Embedding]:
        ids = self._text.batch(tokens)
        outputs: dict[str, list[Row]] = {}
        for name in self.manifest.text_encoders:
            outputs |= self._rows(name, {key: ids[key] for key in self.manifest.components[name].inputs})
        return list(zip(*(outputs[name] for name in self.manifest.conditioning), strict=True))

    def put(self, noise: NDArray[np.float32]) -> Row:
        self._check_row("denoiser", "x", noise.shape)
        with self._told("put", 1):
            row = self._cuda.row(noise.shape)
            self._cuda.upload(row.pointer, noise.astype(np.float32, copy=False))
            self._cuda.synchronize()
        return row

    def denoise(
        self,
        samples: Sequence[Row],
        sigma: Sequence[float],
        sigma_next: Sequence[float],
        conditioning: Sequence[Embedding],
    ) -> tuple[list[Row], list[Row]]:
        columns: dict[str, Any] = {
            "x": samples,
            "sigma": np.array(sigma, dtype=np.float32),
            "sigma_next": np.array(sigma_next, dtype=np.float32),
        }
        columns |= zip(self.manifest.conditioning, zip(*conditioning, strict=True), strict=True)
        outputs = self._rows("denoiser", columns)
        return outputs["x_next"], outputs["x0"]

    def decode(self, samples: Sequence[Row]) -> NDArray[np.uint8]:
        def pictures(program: Program, shapes: Mapping[str, Shape], count: int) -> NDArray[Any]:
            return program.download("image", shapes["image"])[:count]

        return np.concatenate(self._each("decoder", {"x": samples}, pictures))

    def run(self, component: str, inputs: Mapping[str, NDArray[Any]]) -> Mapping[str, NDArray[Any]]:
        def everything(program: Program, shapes: Mapping[str, Shape], count: int) -> dict[str, NDArray[Any]]:
            return {name: program.download(name, shape)[:count] for name, shape in shapes.items()}

        parts = self._each(component, inputs, everything)
        return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}

    def _rows(self, component: str, columns: Mapping[str, Column]) -> dict[str, list[Row]]:
        """Run `component`; the rows of each output stay on the device."""

        def taken(program: Program, shapes: Mapping[str, Shape], count: int) -> dict[str, list[Row]]:
            return {
                name: [program.take(name, shape, slot) for slot in range(count)]
                for name, shape in shapes.items()
            }

        parts = self._each(component, columns, taken)
        return {name: [row for part in parts for row in part[name]] for name in parts[0]}

    def _each(
        self,
        component: str,
        columns: Mapping[str, Column],
        collect: Callable[[Program, Mapping[str, Shape], int], Collected],
    ) -> list[Collected]:
        """Run `component` on one entry per picture, in groups as large as it takes (or as `invariant_batch` says).

        `collect` gets each group's program, the shapes of its outputs, and how many of its rows are wanted.
        """
        batch = len(next(iter(columns.values())))
        if not 1 <= batch <= self.info.max_batch:
            raise ExecutionError(
                f"{component} takes batches of 1 to {self.info.max_batch}, not of {batch}; load the engine with a "
                "larger max_batch"
            )
        shapes = {name: self._row_shape(component, name, rows) for name, rows in columns.items()}
        program, collected = self._programs[component], []
        size = min(self._group or batch, self._limits[component])
        with self._told(component, batch):
            for start in range(0, batch, size):
                rows = list(range(start, min(start + size, batch)))
                count = len(rows)
                if self._group:  # padded with its own first row
                    rows += rows[:1] * (size - count)
                for name, column in columns.items():
                    if isinstance(column, np.ndarray):
                        program.put_all(name, column[rows])
                    else:
                        for slot, row in enumerate(rows):
                            program.put(name, slot, column[row])
                outputs = program.run({name: (len(rows), *shape) for name, shape in shapes.items()})
                collected.append(collect(program, outputs, count))
            self._cuda.synchronize()
        prepared = sum(program.prepared() for program in self._programs.values())
        if prepared > self._kept and self._contexts is not None:
            self._kept = prepared
            self._contexts.keep_kernels()
        return collected

    def _row_shape(self, component: str, name: str, rows: Column) -> Shape:
        """The one shape that all rows of an input have."""
        found = {tuple(row.shape) for row in rows}
        if len(found) > 1:
            raise ExecutionError(f"{component} takes {name} of one shape in a batch, not of {sorted(found)}")
        (shape,) = found
        self._check_row(component, name, shape)
        return shape

    def _check_row(self, component: str, name: str, shape: Shape) -> None:
        wanted = self.manifest.components[component].inputs[name].shape[1:]
        lengths = self.manifest.text_lengths
        fits = len(shape) == len(wanted) and all(
            given == (lengths.get(allowed, given) if isinstance(allowed, str) else allowed)
            for given, allowed in zip(shape, wanted, strict=True)
        )
        if not fits:
            raise ExecutionError(f"{component} takes {name} of shape {list(wanted)}, not {list(shape)}")
        if name == "x" and shape[1:] not in self._latents:
            raise ExecutionError(
                f"{component} takes latents of {sorted(self._latents)} (height, width), not {shape[1:]}"
            )

    @contextmanager
    def _told(self, component: str, batch: int) -> Iterator[None]:
        """Errors of the device say in which call they came up."""
        try:
            yield
        except ExecutionError as error:
            for program in self._programs.values():
                program.forget_rows()
            raise ExecutionError(f"{self.runtime} failed in {component} at batch {batch}: {error}") from error

    def fusion_report(self, component: str) -> Report:
        """What TensorRT made of `component`."""
        return self._reports[component]

    def close(self) -> None:
        """Free everything on the device, rows that are still held included."""
        self._programs.clear()  # contexts before the memory that they use
        self._contexts = None
        self._cuda.close()


class TensorRTRTXEngine(TensorRTEngine):
    """A bundle on TensorRT-RTX, for the GPUs of workstations: `engines.tensorrt_library.Library.targets`."""

    runtime: ClassVar[str] = RTX
