"""What the host runtimes share: rows in, rows out. A sample or a conditioning is one picture's numpy arrays.

`HostEngine` stacks rows to batches and cuts batches to rows; a runtime says only how to run a component.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from engines.base import EngineOptions, GraphEngine, TokenIds
from engines.bundle import Bundle
from engines.errors import ExecutionError
from engines.text import BundleTokenizers

Array = NDArray[np.generic]
Row = NDArray[np.float32]
Embedding = tuple[Row, ...]
"""One prompt's tensors, in the order of `manifest.conditioning`."""


class HostEngine(GraphEngine):
    """A runtime whose arrays live in host memory."""

    def __init__(self, bundle: Bundle, options: EngineOptions) -> None:
        self.manifest = bundle.manifest
        self._group = options.invariant_batch
        self._text = BundleTokenizers(bundle)
        factor = bundle.manifest.latent.downscale
        self._latents = {(size.height // factor, size.width // factor) for size in bundle.manifest.sizes}

    @abstractmethod
    def run(self, component: str, inputs: Mapping[str, Array]) -> Mapping[str, Array]:
        """Run `component` on whole batches; the outputs are the caller's to keep. May raise any exception."""

    def tokenize(self, prompt: str) -> TokenIds:
        return self._text.tokenize(prompt)

    def encode(self, tokens: Sequence[TokenIds]) -> list[Embedding]:
        inputs = self._text.batch(tokens)
        outputs: dict[str, Array] = {}
        for name in self.manifest.text_encoders:
            wanted = {key: inputs[key] for key in self.manifest.components[name].inputs}
            outputs |= self._checked(name, len(tokens), wanted)
        columns = [outputs[name] for name in self.manifest.conditioning]
        # Copies: callers cache embeddings, and a view would keep the whole batch alive.
        return [
            tuple(np.array(column[row], dtype=np.float32) for column in columns) for row in range(len(tokens))
        ]

    def put(self, noise: Row) -> Row:
        return noise

    def denoise(
        self,
        samples: Sequence[Row],
        sigma: Sequence[float],
        sigma_next: Sequence[float],
        conditioning: Sequence[Embedding],
    ) -> tuple[list[Row], list[Row]]:
        inputs: dict[str, Array] = {
            "x": np.stack(samples),
            "sigma": np.array(sigma, dtype=np.float32),
            "sigma_next": np.array(sigma_next, dtype=np.float32),
        }
        for name, column in zip(self.manifest.conditioning, zip(*conditioning, strict=True), strict=True):
            inputs[name] = np.stack(column)
        outputs = self._checked("denoiser", len(samples), inputs)
        return list(outputs["x_next"]), list(outputs["x0"])

    def decode(self, samples: Sequence[Row]) -> NDArray[np.uint8]:
        image = self._checked("decoder", len(samples), {"x": np.stack(samples)})["image"]
        return image.astype(np.uint8, copy=False)

    def _checked(self, component: str, batch: int, inputs: Mapping[str, Array]) -> Mapping[str, Array]:
        assert 1 <= batch <= self.info.max_batch, (component, batch, self.info.max_batch)
        self._check_shapes(component, inputs)
        try:
            return self._grouped(component, batch, inputs) if self._group else self.run(component, inputs)
        except Exception as error:  # each runtime has its own; the scheduler knows one
            reason = str(error).strip().splitlines() or [type(error).__name__]
            raise ExecutionError(
                f"{self.info.runtime} failed in {component} at batch {batch}: {reason[0]}"
            ) from error

    def _grouped(self, component: str, batch: int, inputs: Mapping[str, Array]) -> Mapping[str, Array]:
        """`run` in groups of exactly `invariant_batch` rows; the last is filled up with its own first row."""
        parts = []
        for start in range(0, batch, self._group):
            rows = [start + row if start + row < batch else start for row in range(self._group)]
            parts.append(self.run(component, {name: array[rows] for name, array in inputs.items()}))
        return {name: np.concatenate([part[name] for part in parts])[:batch] for name in parts[0]}

    def _check_shapes(self, component: str, inputs: Mapping[str, Array]) -> None:
        """Not left to the runtime: OpenVINO was seen to accept a smaller x and to read past its end."""
        lengths = self.manifest.text_lengths
        for name, spec in self.manifest.components[component].inputs.items():
            shape = inputs[name].shape
            fits = len(shape) == len(spec.shape) and all(
                given == (lengths.get(allowed, given) if isinstance(allowed, str) else allowed)
                for given, allowed in zip(shape, spec.shape, strict=True)
            )
            if not fits:
                raise ExecutionError(
                    f"{component} takes {name} of shape {list(spec.shape)}, not {list(shape)}"
                )
        if "x" in inputs and inputs["x"].shape[2:] not in self._latents:
            raise ExecutionError(
                f"{component} takes latents of {sorted(self._latents)} (height, width), not {inputs['x'].shape[2:]}"
            )
