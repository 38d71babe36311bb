"""OpenVINO's static shapes: which are worth a compilation of their own, and requests whose tensors stay where they are.

A graph that is compiled for one shape takes an eighth to a fifth less time than one for any. Its request's tensors keep
their place, too: values are copied into them, which at a small model's step saves half a millisecond of handing over
arrays by name.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import openvino as ov

from engines import processor
from engines.bundle import Manifest
from engines.rows import Array

SHARE = 1 / 12
"""Share of the machine's memory that the weights of all static shapes may take together."""

MOST = 8
"""Static shapes of the denoiser at most: each is a compilation, and a copy of the weights."""


class Static(NamedTuple):
    """A component for one batch and, where it takes a latent, one size of it."""

    component: str
    batch: int
    sides: tuple[int, int] | None = None

    @property
    def name(self) -> str:
        """For a file."""
        return "-".join([self.component, "x".join(map(str, (self.batch, *(self.sides or ()))))])


def static_of(component: str, inputs: Mapping[str, Array]) -> Static:
    """Which one these inputs would need."""
    if "x" in inputs:
        batch, _, height, width = inputs["x"].shape
        return Static(component, batch, (height, width))
    return Static(component, len(next(iter(inputs.values()))))


def worth_compiling(manifest: Manifest, max_batch: int, group: int, bytes_per_weight: int) -> list[Static]:
    """What serving asks for most, as much as memory allows: the denoiser of the default size first.

    Args:
        group: the invariant batch, which is then the only one; 0: batches of 1, 2, 4, … up to `max_batch`.
        bytes_per_weight: in memory; files have two.
    """
    factor = manifest.latent.downscale
    batches = [group] if group else [1 << power for power in range(max_batch.bit_length())]
    default, *others = dict.fromkeys(
        (size.height // factor, size.width // factor) for size in (manifest.default_size, *manifest.sizes)
    )
    sides = [(batch, default) for batch in batches] + [(batch, side) for batch in batches for side in others]
    room = SHARE * processor.memory_bytes()
    found = []
    for wanted in (
        *(Static("denoiser", batch, side) for batch, side in sides[:MOST]),
        Static("decoder", group or 1, default),  # of larger batches it gains next to nothing
        *(Static(name, group or 1) for name in manifest.text_encoders),
    ):
        graph = manifest.components[wanted.component].graphs["float32"]
        room -= sum(ref.bytes for ref in (graph.file, *graph.data)) / 2 * bytes_per_weight
        if room < 0:
            break
        found.append(wanted)
    return found


class StaticRequest:
    """A request of a model with static shapes."""

    def __init__(self, request: ov.InferRequest) -> None:
        self.model: ov.CompiledModel = request.get_compiled_model()
        self._request = request
        # A tensor may have several names, of which the bundle's is one.
        self._inputs = [(port.get_names(), request.get_tensor(port).data) for port in self.model.inputs]
        self._outputs = {
            name: request.get_tensor(port).data for port in self.model.outputs for name in port.get_names()
        }

    def run(self, inputs: Mapping[str, Array], outputs: tuple[str, ...]) -> dict[str, Array]:
        """Values for every input; copies of the wanted outputs."""
        for names, view in self._inputs:
            np.copyto(view, next(inputs[name] for name in names if name in inputs), casting="same_kind")
        self._request.start_async()
        self._request.wait()
        return {name: self._outputs[name].copy() for name in outputs}
