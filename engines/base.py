"""What a runtime is: one class, one file, one lazy registration.

A runtime runs the three components of a bundle. Whatever it hands out (a sample, its conditioning) is opaque to the
caller and belongs to one picture, so the caller can batch any rows with any others and never touches arrays; where
those live (host, GPU) is the runtime's affair.

    engine = load_engine(bundle, EngineOptions(runtime="openvino"))
    cond = engine.encode([engine.tokenize("red apple")])
    x = [engine.put(noise)]
    for sigma, sigma_next in pairwise(bundle.manifest.sigmas(4)):
        x, x0 = engine.denoise(x, [sigma], [sigma_next], cond)
    image = engine.decode(x)[0]                      # uint8 (height, width, 3)
"""

from __future__ import annotations

import importlib
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engines.bundle import Bundle, Manifest
from engines.errors import RuntimeUnavailable

TokenIds = tuple[tuple[int, ...], ...]
"""One prompt's ids: a tuple per tokenizer, padded to the tokenizer's length. Hashable: the embedding cache's key."""

Conditioning = Any
"""One prompt's embeddings, opaque."""

Sample = Any
"""One picture's latent, opaque."""


@dataclass(frozen=True)
class EngineOptions:
    """How to run a bundle. `threads=0` lets the runtime choose; `cache_dir=None` compiles anew at every start.

    `invariant_batch=n` runs every call in groups of exactly n pictures (padded), so that a picture's bytes do not
    depend on what shares its batch: a runtime sums in another order for another batch size. 0: batches as they come.
    """

    runtime: str = "auto"
    precision: str = "auto"
    threads: int = 0
    max_batch: int = 8
    cache_dir: Path | None = None
    invariant_batch: int = 0
    fake_costs: Path | None = None
    """Table of what calls shall take (`engines/call_costs.py`); only the fake runtime can follow one."""
    triton_url: str = ""
    """gRPC address (host:port) of the NVIDIA Triton server that executes for the triton runtime."""
    torch_compile: bool = False
    """Let the torch runtime compile the denoiser when it loads."""
    fused_kernels: bool | None = None
    """Whether torch and aotinductor use the kernels of `engines/kernels`; None: where there is a GPU for them."""


@dataclass(frozen=True)
class EngineInfo:
    """What a loaded engine says of itself."""

    runtime: str
    version: str
    device: str
    precision: str
    max_batch: int
    threads: int
    invariant_batch: int = 0
    overlap: bool = False
    """Whether a decode call may run, from another thread, while encode or denoise does, and gains by it."""
    why: str = ""
    """Why this runtime, if `auto` has chosen it."""


class Engine(ABC):
    """One bundle, loaded on one runtime. Calls come from one thread at a time (`info.overlap`: from two).

    Every method takes and returns one entry per picture, `1 ≤ batch ≤ info.max_batch`, and raises
    `ExecutionError` when the device fails.
    """

    manifest: Manifest
    info: EngineInfo
    cache_folder: Path | None = None
    """Where compiled models of exactly this bundle and runtime are kept; none: nowhere."""

    @abstractmethod
    def tokenize(self, prompt: str) -> TokenIds:
        """Ids of one prompt, cut or padded to each tokenizer's length. Thread-safe, no device."""

    @abstractmethod
    def encode(self, tokens: Sequence[TokenIds]) -> list[Conditioning]:
        """Prompt embeddings for each of `tokens`."""

    @abstractmethod
    def put(self, noise: NDArray[np.float32]) -> Sample:
        """Take one picture's starting noise, `(channels, height, width)` in latent pixels."""

    @abstractmethod
    def denoise(
        self,
        samples: Sequence[Sample],
        sigma: Sequence[float],
        sigma_next: Sequence[float],
        conditioning: Sequence[Conditioning],
    ) -> tuple[list[Sample], list[Sample]]:
        """One Euler step x' = x + (σ' − σ)·v per row, each at its own σ: `(x', x̂0)`, x̂0 = x − σ·v."""

    @abstractmethod
    def decode(self, samples: Sequence[Sample]) -> NDArray[np.uint8]:
        """Pictures, `(batch, height, width, 3)` RGB."""

    def close(self) -> None:  # noqa: B027  (a runtime without resources has nothing to do)
        """Free what the runtime holds. The engine is not used afterwards; closing it again does nothing."""


class GraphEngine(Engine):
    """An engine that runs the bundle's own graphs, and can be held to them."""

    @classmethod
    @abstractmethod
    def precisions(cls, bundle: Bundle) -> tuple[str, ...]:
        """What `EngineOptions.precision` may ask for with this bundle on this machine, the default first."""

    @abstractmethod
    def run(self, component: str, inputs: Mapping[str, NDArray[Any]]) -> Mapping[str, NDArray[Any]]:
        """Run one graph on whole batches, host arrays in and out: for comparison with torch, not for serving."""


RUNTIMES: dict[str, str] = {
    "openvino": "engines.openvino:OpenVINOEngine",
    "onnxruntime": "engines.onnxruntime:OnnxRuntimeEngine",
    "tensorrt-rtx": "engines.tensorrt:TensorRTRTXEngine",
    "tensorrt": "engines.tensorrt:TensorRTEngine",
    "torch": "engines.torch_engine:TorchEngine",
    "aotinductor": "engines.aotinductor:AOTInductorEngine",
    "triton": "engines.triton:TritonEngine",
    "triton-cuda": "engines.triton_cuda:TritonCudaEngine",
    "fake": "engines.fake:FakeEngine",
}
"""Runtime name → `module:class`, imported only when asked for. A new runtime is one file and one line here."""

ONLY_FOR = {
    "fake_costs": ("fake",),
    "triton_url": ("triton", "triton-cuda"),
    "torch_compile": ("torch",),
    "fused_kernels": ("torch", "aotinductor"),
}
"""Options that mean something to these runtimes alone."""

AUTO = ("openvino", "onnxruntime")
"""What `auto` chooses from on every machine."""

AUTO_GPU = ("tensorrt-rtx", "tensorrt", "aotinductor", "torch")
"""What it measures besides where there is an NVIDIA GPU. The others want something that only their user can say."""


def load_engine(bundle: Bundle, options: EngineOptions) -> Engine:
    """Load `bundle` on the asked-for runtime (`auto`: the fastest here of `AUTO` and `AUTO_GPU`, measured).

    Raises:
        RuntimeUnavailable: no such runtime, or its packages are missing here.
    """
    if options.runtime == "auto":
        from engines.choose import choose

        return choose(bundle, options)
    return load_runtime(options.runtime, bundle, options)


def runtime_class(name: str) -> Any:
    """The class of runtime `name`.

    Raises:
        RuntimeUnavailable: no such runtime, or its packages are missing here.
    """
    if name not in RUNTIMES:
        raise RuntimeUnavailable(f"runtime={name!r} is unknown; allowed: auto, {', '.join(RUNTIMES)}")
    module_name, class_name = RUNTIMES[name].split(":")
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise RuntimeUnavailable(
            f"runtime {name!r} needs the package {error.name!r}, which is not installed"
        ) from error
    return getattr(module, class_name)


def load_runtime(name: str, bundle: Bundle, options: EngineOptions) -> Engine:
    """Load `bundle` on runtime `name`, which `auto` is not.

    Raises:
        RuntimeUnavailable: no such runtime, its packages are missing here, or an option means nothing to it.
    """
    for option, runtimes in ONLY_FOR.items():
        value = getattr(options, option)
        if (
            name in RUNTIMES
            and name not in runtimes
            and value != EngineOptions.__dataclass_fields__[option].default
        ):
            raise RuntimeUnavailable(
                f"{option}={value} means nothing to the {name} runtime; leave it out, or choose {' or '.join(runtimes)}"
            )
    engine: Engine = runtime_class(name)(bundle, options)
    return engine
