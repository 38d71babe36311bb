"""Is the exported graph the same model? Each component against torch, on random inputs it was not traced with."""

from __future__ import annotations

import random
import string
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import torch
from numpy.typing import NDArray
from torch import Tensor

from engines.bundle import Parity, Size
from engines.errors import ExportError
from engines.export.onnx_file import GraphModule

Arrays = dict[str, NDArray[Any]]

BATCHES = (1, 2, 3, 5)
"""Batch sizes compared. Graphs are traced at `EXAMPLE_BATCH`, which is none of them."""

EXAMPLE_BATCH = 4

FOLDED_BYTES = 256_000_000
"""Above this ONNX Runtime must not fold the weights' casts when a graph is checked: it would hold them twice."""


@dataclass(frozen=True)
class Probe:
    """One component's inputs, and torch's answers by the weights it ran with.

    `short` marks a probe whose text is shorter than the tokenizer's length; serving has none, but graphs promise it.
    """

    batch: int
    size: Size | None
    inputs: dict[str, Tensor]
    short: bool = False
    answers: dict[str, Arrays] = field(default_factory=dict)


def random_prompts(count: int, seed: int) -> list[str]:
    """Prompts of 0 to 12 made-up words; every letter and digit turns up, some are longer than encoders read."""
    generator, letters = random.Random(seed), string.ascii_letters + string.digits

    def word() -> str:
        return "".join(generator.choices(letters, k=generator.randint(1, 8)))

    return [" ".join(word() for _ in range(generator.randint(0, 12))) for _ in range(count)]


def latent_probe(channels: int, batch: int, latent: tuple[int, int], seed: int) -> dict[str, Tensor]:
    """`x` normal `(batch, channels, *latent)`, and σ > σ′ per sample, the first at σ = 1."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn((batch, channels, *latent), generator=generator)
    sigma = torch.rand((batch,), generator=generator).clamp(min=1e-3)
    sigma[0] = 1.0  # near σ = 0 both outputs are almost x itself, in which an error of v hardly shows
    return {"x": x, "sigma": sigma, "sigma_next": sigma * torch.rand((batch,), generator=generator)}


def answer(name: str, module: GraphModule, probe: Probe, weights: str) -> None:
    """Let torch answer `probe` with what `module` holds now.

    Raises:
        ExportError: it cannot, at that shape.
    """
    try:
        with torch.no_grad():
            results = module(*(probe.inputs[tensor] for tensor in module.inputs))
    except (RuntimeError, ValueError) as error:  # a size the model's position table or patches refuse
        shape = tuple(next(iter(probe.inputs.values())).shape)
        raise ExportError(f"{name} cannot run on inputs of shape {shape}: {error}") from error
    probe.answers[weights] = {
        output: result.numpy() for output, result in zip(module.outputs, results, strict=True)
    }


def open_session(path: Path, data_bytes: int = 0) -> ort.InferenceSession:
    """An ONNX Runtime CPU session in float32: the reference runtime.

    Raises:
        ExportError: it does not take the graph.
    """
    options = ort.SessionOptions()
    options.log_severity_level = 3
    if data_bytes > FOLDED_BYTES:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        options.add_session_config_entry("session.disable_prepacking", "1")
    try:
        return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # ONNX Runtime's own errors share no base
        raise ExportError(f"ONNX Runtime refuses {path.name}: {_first_line(error)}") from error


def run_onnx(session: ort.InferenceSession, probe: dict[str, Tensor]) -> Arrays:
    """The graph's outputs by name.

    Raises:
        ExportError: it fails at that shape, as one does that was traced with a constant where a size belongs.
    """
    names = [value.name for value in session.get_outputs()]
    inputs = {value.name: probe[value.name].numpy() for value in session.get_inputs()}
    try:
        return dict(zip(names, session.run(names, inputs), strict=True))
    except Exception as error:
        shapes = ", ".join(f"{name} {list(array.shape)}" for name, array in inputs.items())
        raise ExportError(f"the graph fails on {shapes} in ONNX Runtime: {_first_line(error)}") from error


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:300] if lines else type(error).__name__


def compare(probe: Probe, weights: Any, actual: Arrays, runtime: str, precision: str) -> Parity:
    """The worst error over the outputs.

    Raises:
        ExportError: an output is not finite.
    """
    reference = probe.answers[weights]
    pairs = [(actual[name].astype(np.float64), reference[name].astype(np.float64)) for name in reference]
    max_abs = max(float(np.abs(a - b).max()) for a, b in pairs)
    rel_l2 = max(float(np.linalg.norm(a - b) / max(float(np.linalg.norm(b)), 1e-12)) for a, b in pairs)
    if not np.isfinite([max_abs, rel_l2]).all():
        raise ExportError(
            f"the model's output is not finite at batch {probe.batch} ({runtime} {precision}, {weights} weights)"
        )
    return Parity(
        runtime=runtime,
        precision=precision,
        weights=weights,
        batch=probe.batch,
        size=probe.size,
        max_abs=max_abs,
        rel_l2=rel_l2,
    )
