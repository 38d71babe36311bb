"""Execution contexts: whose scratch memory they use, and where the kernels that the device compiles for them are kept.

TensorRT-RTX compiles kernels for exact shapes on the device, when they first run. What it has compiled is kept in the
cache folder beside the engines, for this GPU and driver only; a second start then finds it.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import Any

from engines.cache import CompiledCache
from engines.cuda import Cuda
from engines.errors import ExecutionError
from engines.tensorrt_library import Library

log = logging.getLogger("engines.tensorrt")

KERNELS = "kernels"
"""Their name in the cache."""


class Contexts:
    """Makes the contexts of all of a bundle's engines. They share one scratch memory: no two ever run at once."""

    def __init__(self, library: Library, cuda: Cuda, cache: CompiledCache, engines: Iterable[Any]) -> None:
        self._library = library
        self._cache = cache
        self._size = max(int(engine.device_memory_size_v2) for engine in engines)
        self._scratch = cuda.allocate(self._size) if self._size else 0
        self._kernels: Any = None

    def make(self, engine: Any) -> Any:
        """A context of `engine`.

        Raises:
            ExecutionError: TensorRT makes none.
        """
        strategy = self._library.trt.ExecutionContextAllocationStrategy.USER_MANAGED
        if self._library.rtx:
            context = engine.create_execution_context(runtime_config=self._configure(engine, strategy))
        else:
            context = engine.create_execution_context(strategy=strategy)
        if context is None:
            raise ExecutionError(
                f"{self._library.title} made no execution context: {self._library.logger.why()}"
            )
        if self._size:
            context.set_device_memory(self._scratch, self._size)
        return context

    def keep_kernels(self) -> None:
        """Store what the device has compiled until now."""
        if self._kernels is not None:
            self._cache.store(KERNELS, bytes(self._kernels.serialize()))

    def _configure(self, engine: Any, strategy: Any) -> Any:
        specialization = self._library.trt.DynamicShapesKernelSpecializationStrategy
        config = engine.create_runtime_config()
        config.set_execution_context_allocation_strategy(strategy)
        # Kernels for the exact shape at once: a graph would keep the stopgap that runs until they are compiled.
        config.dynamic_shapes_kernel_specialization_strategy = specialization.EAGER
        if self._kernels is None:
            self._kernels = config.create_runtime_cache()
            stored = self._cache.load(KERNELS)
            if stored is not None and not self._kernels.deserialize(stored):
                reason = self._library.logger.why()
                log.warning("the stored kernels cannot be used, they are compiled anew: %s", reason)
        config.set_runtime_cache(self._kernels)
        return config
