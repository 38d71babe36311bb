"""Plain torch, eager or compiled: for GPUs without TensorRT, with the Triton kernels of `engines/kernels`.

Nothing is exported: the bundle's own diffusers folder is loaded and run. The GPU's path has never run where this
project is developed; what tests run is the CPU's, where OpenVINO is the faster choice.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from engines.base import EngineOptions
from engines.bundle import Bundle
from engines.errors import RuntimeUnavailable
from engines.torch_graphs import compile_failure, example, load_graph, varying
from engines.torch_rows import TorchRows


class TorchEngine(TorchRows):
    """A bundle with the model's own weights (`cdm-export --weights`) on torch.

    `torch_compile` compiles the denoiser as the engine loads: for any batch, and once more for a single picture, which
    torch makes a case of its own. torch keeps what it compiles in a cache of its own, not in `cache_dir`.

    Raises:
        RuntimeUnavailable: what `TorchRows` says, a model that cannot be loaded or compiled, a `cache_dir` where this
            very runtime was asked for.
    """

    runtime = "torch"

    def __init__(self, bundle: Bundle, options: EngineOptions) -> None:
        super().__init__(bundle, options)
        if options.cache_dir is not None and options.runtime == self.runtime:
            raise RuntimeUnavailable(
                f"cache_dir={options.cache_dir} means nothing to torch, which keeps what it compiles in a folder "
                "of its own (TORCHINDUCTOR_CACHE_DIR); leave it out, or use the aotinductor runtime"
            )
        self._calls: dict[str, Callable[..., Any]] = {
            name: load_graph(bundle, name, self.info.precision, self._device, options.fused_kernels)
            for name in self.manifest.components
        }
        if options.torch_compile:
            self._calls["denoiser"] = torch.compile(self._calls["denoiser"], fullgraph=True)
            batches = (self._group,) if self._group else (2, 1)
            for batch in batches:
                self._compile(batch)

    def _compute(self, component: str, inputs: Sequence[Tensor]) -> Sequence[Tensor]:
        outputs: Sequence[Tensor] = self._calls[component](*inputs)
        return outputs

    def _compile(self, batch: int) -> None:
        """Compile the denoiser for `batch`, 2 standing for any larger one, or for exactly the invariant batch."""
        try:
            with (
                torch.inference_mode()
            ):  # where its inputs are made too: dynamo tells such tensors from others
                inputs = example(self.manifest, "denoiser", batch, self._device)
                for tensor, axes in zip(inputs, varying(self.manifest, "denoiser"), strict=True):
                    for axis in axes:
                        if axis > 0 or batch == 2 != self._group:
                            torch._dynamo.mark_dynamic(tensor, axis)
                self._compute("denoiser", inputs)
        except Exception as error:  # the compiler's own, the C++ compiler's, and plain ones
            raise RuntimeUnavailable(compile_failure(self.runtime, "denoiser", error)) from error

    def close(self) -> None:
        """Free the model."""
        self._calls.clear()
        super().close()
