"""ONNX Runtime: float32 on the CPU, the reference that every other runtime is compared with; int8 there on request.

Where the installed build has the CUDA provider, float32 uses it, with inputs and outputs bound to the device: rows come
from the host and go back at every call, as no graph here batches rows that lie apart on a device (TensorRT and torch
do). That path has never run where this project is developed: there is no GPU.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from functools import partial
from pathlib import Path

import onnxruntime as ort

from engines.base import EngineInfo, EngineOptions
from engines.bundle import Bundle
from engines.cache import CompiledCache, code_hash, graph_hashes
from engines.errors import RuntimeUnavailable, loading
from engines.rows import Array, HostEngine

log = logging.getLogger("engines.onnxruntime")

CUDA = "CUDAExecutionProvider"
CPU = "CPUExecutionProvider"
PRECISIONS = ("auto", "f32", "int8")


class OnnxRuntimeEngine(HostEngine):
    """A bundle on ONNX Runtime.

    In float32 it optimises the graphs anew at every start (about a second for small models) and has no compiled form
    worth keeping. `int8` quantizes the weights of matrix products once (`engines/quantize.py`), their other operand at
    every call, and keeps the graphs in `cache_dir`.

    Raises `RuntimeUnavailable` for a precision that it has not, and for a `cache_dir` in float32 where this very
    runtime was asked for.
    """

    def __init__(self, bundle: Bundle, options: EngineOptions) -> None:
        super().__init__(bundle, options)
        if options.precision not in PRECISIONS:
            raise RuntimeUnavailable(
                f"precision={options.precision!r} is not one of onnxruntime's: {', '.join(PRECISIONS)}; "
                "the openvino runtime has bf16"
            )
        precision = "int8" if options.precision == "int8" else "f32"
        if options.cache_dir is not None and precision == "f32" and options.runtime == "onnxruntime":
            raise RuntimeUnavailable(
                f"cache_dir={options.cache_dir} means nothing to onnxruntime in f32, which has no compiled models to "
                "keep; leave it out, or use the openvino runtime"
            )
        # int8's products have kernels on the CPU alone.
        self._cuda = CUDA in ort.get_available_providers() and precision != "int8"
        graphs: dict[str, Path | bytes] = {name: bundle.path(name) for name in bundle.manifest.components}
        if precision == "int8":
            graphs |= _quantized(bundle, options)
        settings = ort.SessionOptions()
        settings.intra_op_num_threads = options.threads
        settings.inter_op_num_threads = 1
        settings.log_severity_level = 3
        # By default the CUDA provider rounds the factors of float32 products to TF32's 10 bits.
        providers = [(CUDA, {"use_tf32": "0"}), CPU] if self._cuda else [CPU]
        self._sessions: dict[str, ort.InferenceSession] = {}
        for name, graph in graphs.items():
            with loading("onnxruntime", name):
                self._sessions[name] = ort.InferenceSession(
                    graph if isinstance(graph, bytes) else str(graph), settings, providers=providers
                )
        if self._cuda and not all(CUDA in session.get_providers() for session in self._sessions.values()):
            self._cuda = (
                False  # a build with CUDA takes the CPU without a word where CUDA's libraries are missing
            )
            log.warning(
                "onnxruntime has CUDA and could not load it, so it runs on the CPU: install the GPU's driver, and the "
                "CUDA and cuDNN that this build of onnxruntime is for"
            )
        self.info = EngineInfo(
            runtime="onnxruntime",
            version=ort.__version__,
            device="CUDA" if self._cuda else "CPU",
            precision=precision,
            max_batch=options.max_batch,
            threads=options.threads,
            invariant_batch=options.invariant_batch,
        )

    @classmethod
    def precisions(cls, bundle: Bundle) -> tuple[str, ...]:
        return ("f32",)

    def run(self, component: str, inputs: Mapping[str, Array]) -> Mapping[str, Array]:
        session = self._sessions[component]
        names = [output.name for output in session.get_outputs()]
        if not self._cuda:
            return dict(zip(names, session.run(names, dict(inputs)), strict=True))
        # Bound, so that each input goes up in one copy and outputs are allocated by the device, not by the host.
        binding = session.io_binding()
        for name, array in inputs.items():
            binding.bind_ortvalue_input(name, ort.OrtValue.ortvalue_from_numpy(array, "cuda", 0))
        for name in names:
            binding.bind_output(name, "cuda")
        session.run_with_iobinding(binding)
        return dict(zip(names, binding.copy_outputs_to_cpu(), strict=True))

    def close(self) -> None:
        """Free the sessions."""
        self._sessions.clear()


def _quantized(bundle: Bundle, options: EngineOptions) -> dict[str, bytes]:
    """The int8 graphs of all components with matrix products, from the cache or made now."""
    cache = CompiledCache.open(
        options.cache_dir,
        "onnxruntime",
        model=graph_hashes(bundle.manifest, "float32"),
        version=ort.__version__,
        code=code_hash(str(Path(__file__).with_name("quantize.py"))),
        precision="int8",
        # It is a graph, compiled at every start: for any machine, of any shape, with any number of threads.
        **dict.fromkeys(("shapes", "device", "capability", "threads"), "any"),
    )
    names = (*bundle.manifest.text_encoders, "denoiser")
    return {name: cache.obtain(name, _whole, partial(_quantize, bundle.path(name))) for name in names}


def _whole(graph: bytes) -> bytes:
    return graph


def _quantize(path: Path) -> tuple[bytes, bytes]:
    try:
        from engines.quantize import quantize
    except ImportError as error:
        raise RuntimeUnavailable(
            f"precision='int8' needs the package {error.name!r} once, to quantize; install the extra 'train'"
        ) from error
    graph = quantize(path)
    return graph, graph
