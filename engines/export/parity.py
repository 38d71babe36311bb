"""Is the exported graph the same model? Each component against torch, on random inputs it was not traced with."""

from __future__ import annotations

import random
import string
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from engines.bundle import Parity
from engines.errors import ExportError
from engines.families.base import Family

Arrays = dict[str, NDArray[np.generic]]

BATCHES = (1, 2, 3, 5)
"""Batch sizes compared. Graphs are traced at `EXAMPLE_BATCH`, which is none of them."""

EXAMPLE_BATCH = 4


def random_prompts(count: int, generator: random.Random) -> list[str]:
    """Prompts of 0 to 12 made-up words; every letter and digit turns up, some are longer than encoders read."""
    letters = string.ascii_letters + string.digits

    def word() -> str:
        return "".join(generator.choices(letters, k=generator.randint(1, 8)))

    return [" ".join(word() for _ in range(generator.randint(0, 12))) for _ in range(count)]


def probes(family: Family, batch: int, latent: tuple[int, int], seed: int) -> dict[str, dict[str, Tensor]]:
    """Random inputs per component: made-up prompts, normal latents of `latent` (height, width), σ > σ′ per sample."""
    torch_generator = torch.Generator().manual_seed(seed)
    ids = family.tokenize(random_prompts(batch, random.Random(seed)))
    with torch.no_grad():
        conditioning = family.embed(ids)
    x = torch.randn((batch, family.latent_channels, *latent), generator=torch_generator)
    sigma = torch.rand((batch,), generator=torch_generator).clamp(min=1e-3)
    sigma[0] = 1.0  # near σ = 0 both outputs are almost x itself, in which an error of v hardly shows
    sigma_next = sigma * torch.rand((batch,), generator=torch_generator)
    return {
        "text_encoder": ids,
        "denoiser": {"x": x, "sigma": sigma, "sigma_next": sigma_next, **conditioning},
        "decoder": {"x": torch.randn(x.shape, generator=torch_generator)},
    }


def run_torch(
    module: nn.Module, inputs: tuple[str, ...], outputs: tuple[str, ...], probe: dict[str, Tensor]
) -> Arrays:
    """The module's outputs by name, without gradient."""
    with torch.no_grad():
        results = module(*(probe[name] for name in inputs))
    return {name: result.numpy() for name, result in zip(outputs, results, strict=True)}


def open_session(path: Path, threads: int = 0) -> ort.InferenceSession:
    """An ONNX Runtime CPU session in float32: the reference runtime. `threads=0` lets it choose."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def run_onnx(session: ort.InferenceSession, probe: dict[str, Tensor]) -> Arrays:
    """The graph's outputs by name."""
    names = [value.name for value in session.get_outputs()]
    results = session.run(names, {value.name: probe[value.name].numpy() for value in session.get_inputs()})
    return dict(zip(names, results, strict=True))


def compare(batch: int, weights: Any, actual: Arrays, reference: Arrays) -> Parity:
    """The worst error over the outputs."""
    pairs = [(actual[name].astype(np.float64), reference[name].astype(np.float64)) for name in reference]
    max_abs = max(float(np.abs(a - b).max()) for a, b in pairs)
    rel_l2 = max(float(np.linalg.norm(a - b) / max(float(np.linalg.norm(b)), 1e-12)) for a, b in pairs)
    if not np.isfinite([max_abs, rel_l2]).all():
        raise ExportError(f"the model's output is not finite at batch {batch} (with {weights} weights)")
    return Parity(weights=weights, batch=batch, max_abs=max_abs, rel_l2=rel_l2)
