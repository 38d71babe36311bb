"""ONNX Runtime on the CPU, in float32: the reference that every other runtime is compared with."""

from __future__ import annotations

import logging
from collections.abc import Mapping

import onnxruntime as ort

from engines.base import EngineInfo, EngineOptions
from engines.bundle import Bundle
from engines.errors import RuntimeUnavailable
from engines.rows import Array, HostEngine

log = logging.getLogger("engines.onnxruntime")


class OnnxRuntimeEngine(HostEngine):
    """A bundle on ONNX Runtime's CPU provider.

    It optimises the graphs anew at every start (about a second for small models) and has no compiled form worth
    keeping. Raises `RuntimeUnavailable` for a precision other than f32, and for a `cache_dir` where this very runtime
    was asked for.
    """

    def __init__(self, bundle: Bundle, options: EngineOptions) -> None:
        super().__init__(bundle, options)
        if options.precision not in ("auto", "f32"):
            raise RuntimeUnavailable(
                f"precision={options.precision!r} is not one of onnxruntime's: auto, f32; "
                "the openvino runtime has bf16"
            )
        if options.cache_dir is not None:
            message = (
                f"cache_dir={options.cache_dir} means nothing to onnxruntime, which has no compiled models to keep; "
                "leave it out, or use the openvino runtime"
            )
            if options.runtime == "onnxruntime":
                raise RuntimeUnavailable(message)
            log.warning("%s", message)  # `auto` had no better choice
        settings = ort.SessionOptions()
        settings.intra_op_num_threads = options.threads
        settings.inter_op_num_threads = 1
        settings.log_severity_level = 3
        self._sessions = {
            component: ort.InferenceSession(
                str(bundle.path(component)), settings, providers=["CPUExecutionProvider"]
            )
            for component in bundle.manifest.components
        }
        self.info = EngineInfo(
            runtime="onnxruntime",
            version=ort.__version__,
            device="CPU",
            precision="f32",
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
        return dict(zip(names, session.run(names, dict(inputs)), strict=True))

    def close(self) -> None:
        """Free the sessions."""
        self._sessions.clear()
