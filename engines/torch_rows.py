"""What the torch runtimes share: a sample or a conditioning is one picture's tensors, on the device that computes.

Rows are joined to batches and batches cut to rows there. Only σ, token ids and noise go up, only finished pictures come
down. Every call waits for the device before it returns, so that its time can be measured and its errors are its own.

What is done for a GPU has never run where this project is developed.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from engines.base import EngineInfo, EngineOptions, GraphEngine, TokenIds
from engines.bundle import Bundle
from engines.errors import ExecutionError, RuntimeUnavailable
from engines.text import BundleTokenizers
from engines.torch_device import choose_device, choose_kernels, choose_precision, device_name

Row = Tensor
Embedding = tuple[Tensor, ...]
"""One prompt's tensors, in the order of `manifest.conditioning`."""

Column = Sequence[Tensor] | NDArray[Any]
"""One entry per picture, on the device or on the host."""


class TorchRows(GraphEngine):
    """A runtime whose arrays are torch tensors.

    Raises:
        RuntimeUnavailable: the bundle has no weights for torch, or options that mean nothing here.
    """

    runtime: ClassVar[str]

    def __init__(self, bundle: Bundle, options: EngineOptions) -> None:
        if not bundle.manifest.model:
            raise RuntimeUnavailable(
                f"{bundle.root} lacks the model's own weights, which {self.runtime} runs; export it again with "
                "--weights"
            )
        self.manifest = bundle.manifest
        self._device = choose_device()
        self._threads = options.threads
        if options.threads and self._on_gpu:
            raise RuntimeUnavailable(
                f"threads={options.threads} means nothing to {self.runtime} on a GPU, whose work it is; leave it out"
            )
        self._group = options.invariant_batch
        self._text = BundleTokenizers(bundle)
        factor = self.manifest.latent.downscale
        self._latents = {(size.height // factor, size.width // factor) for size in self.manifest.sizes}
        self._kernels = choose_kernels(options.fused_kernels, self._device)
        if (
            self._on_gpu
        ):  # float32 is float32: cuDNN's convolutions would take TensorFloat-32. For the whole process
            torch.backends.cudnn.allow_tf32 = False
        self._use_threads()
        self.info = EngineInfo(
            runtime=self.runtime,
            version=torch.__version__,
            device=device_name(self._device),
            precision=choose_precision(options.precision, self._device, self.runtime),
            max_batch=options.max_batch,
            threads=1 if self._on_gpu else torch.get_num_threads(),
            invariant_batch=options.invariant_batch,
        )

    @classmethod
    def precisions(cls, bundle: Bundle) -> tuple[str, ...]:
        device = choose_device()
        return ("bf16", "f32") if choose_precision("auto", device, cls.runtime) == "bf16" else ("f32",)

    @abstractmethod
    def _compute(self, component: str, inputs: Sequence[Tensor]) -> Sequence[Tensor]:
        """Run `component` on whole batches, tensors in the manifest's order. May raise any exception."""

    @property
    def _on_gpu(self) -> bool:
        return self._device.type == "cuda"

    # calls

    def tokenize(self, prompt: str) -> TokenIds:
        return self._text.tokenize(prompt)

    def encode(self, tokens: Sequence[TokenIds]) -> list[Embedding]:
        ids = self._text.batch(tokens)
        outputs: dict[str, Tensor] = {}
        for name in self.manifest.text_encoders:
            wanted = {key: ids[key] for key in self.manifest.components[name].inputs}
            outputs |= self._batched(name, len(tokens), wanted)
        columns = [outputs[name] for name in self.manifest.conditioning]
        # Clones: callers cache embeddings, and a view would keep the whole batch alive.
        return [tuple(column[row].clone() for column in columns) for row in range(len(tokens))]

    def put(self, noise: NDArray[np.float32]) -> Row:
        with self._told("put", 1):
            return torch.tensor(noise, dtype=torch.float32, device=self._device)

    def denoise(
        self,
        samples: Sequence[Row],
        sigma: Sequence[float],
        sigma_next: Sequence[float],
        conditioning: Sequence[Embedding],
    ) -> tuple[list[Row], list[Row]]:
        columns: dict[str, Column] = {
            "x": samples,
            "sigma": np.array(sigma, dtype=np.float32),
            "sigma_next": np.array(sigma_next, dtype=np.float32),
        }
        columns |= zip(self.manifest.conditioning, zip(*conditioning, strict=True), strict=True)
        outputs = self._batched("denoiser", len(samples), columns)
        return list(outputs["x_next"]), list(outputs["x0"])

    def decode(self, samples: Sequence[Row]) -> NDArray[np.uint8]:
        image: NDArray[np.uint8] = (
            self._batched("decoder", len(samples), {"x": samples})["image"].cpu().numpy()
        )
        return image

    def run(self, component: str, inputs: Mapping[str, NDArray[Any]]) -> Mapping[str, NDArray[Any]]:
        spec = self.manifest.components[component]
        with self._told(component, len(next(iter(inputs.values())))):
            outputs = self._compute(component, [self._joined(inputs[name]) for name in spec.inputs])
        return {name: output.cpu().numpy() for name, output in zip(spec.outputs, outputs, strict=True)}

    def _batched(self, component: str, batch: int, columns: Mapping[str, Column]) -> dict[str, Tensor]:
        """Run `component` on one entry per picture, in groups of exactly `invariant_batch` if that is asked for."""
        assert 1 <= batch <= self.info.max_batch, (component, batch, self.info.max_batch)
        spec = self.manifest.components[component]
        with self._told(component, batch):
            inputs = [self._joined(columns[name]) for name in spec.inputs]
            self._check_shapes(component, inputs)
            outputs = self._grouped(component, inputs) if self._group else self._compute(component, inputs)
            return dict(zip(spec.outputs, outputs, strict=True))

    def _joined(self, column: Column) -> Tensor:
        if isinstance(column, np.ndarray):
            return torch.tensor(column, device=self._device)
        return torch.stack(list(column))

    def _grouped(self, component: str, inputs: Sequence[Tensor]) -> list[Tensor]:
        """`_compute` in groups of exactly `invariant_batch` rows; the last is filled up with its own first row."""
        batch, parts = len(inputs[0]), []
        for start in range(0, batch, self._group):
            rows = [start + row if start + row < batch else start for row in range(self._group)]
            parts.append(self._compute(component, [tensor[rows] for tensor in inputs]))
        return [torch.cat(column)[:batch] for column in zip(*parts, strict=True)]

    def _check_shapes(self, component: str, inputs: Sequence[Tensor]) -> None:
        """Not left to torch: compiled code checks nothing."""
        lengths = self.manifest.text_lengths
        for (name, spec), tensor in zip(
            self.manifest.components[component].inputs.items(), inputs, strict=True
        ):
            shape = tuple(tensor.shape)
            fits = len(shape) == len(spec.shape) and all(
                given == (lengths.get(allowed, given) if isinstance(allowed, str) else allowed)
                for given, allowed in zip(shape, spec.shape, strict=True)
            )
            if not fits:
                raise ExecutionError(
                    f"{component} takes {name} of shape {list(spec.shape)}, not {list(shape)}"
                )
            if name == "x" and shape[2:] not in self._latents:
                raise ExecutionError(
                    f"{component} takes latents of {sorted(self._latents)} (height, width), not {shape[2:]}"
                )

    @contextmanager
    def _told(self, component: str, batch: int) -> Iterator[None]:
        """Run the body to its end on the device; its errors say in which call they came up."""
        self._use_threads()
        try:
            with torch.inference_mode():
                yield
            if self._on_gpu:
                torch.cuda.synchronize(self._device)
        except ExecutionError:
            raise
        except Exception as error:  # torch's own share no base; the scheduler knows one
            reason = str(error).strip().splitlines() or [type(error).__name__]
            raise ExecutionError(
                f"{self.runtime} failed in {component} at batch {batch}: {reason[0]}"
            ) from error

    def _use_threads(self) -> None:
        """torch counts threads per calling thread: what loads the engine may be another than what runs it."""
        if self._threads and torch.get_num_threads() != self._threads:
            torch.set_num_threads(self._threads)

    def close(self) -> None:
        """Free the device's memory that nothing holds any more; rows that are still held stay usable."""
        if self._on_gpu:
            torch.cuda.empty_cache()
