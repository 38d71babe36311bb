"""Who takes part in an acceptance, and how each is loaded."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Contender:
    """A runtime with its options; `devices` it is examined on where nobody names it."""

    name: str
    runtime: str
    devices: tuple[str, ...] = ("cuda",)
    compile: bool = False
    fused: bool | None = None
    """Whether with the Triton kernels; None: the runtime has none."""
    own_weights: bool = False
    """Whether it runs the model's original weights, not those that the graphs store."""
    keeps: bool = True
    """Whether it keeps what it compiles in `cache_dir`."""

    def options(self, precision: str, max_batch: int, cache: Path, triton_url: str) -> dict[str, Any]:
        """Of `EngineOptions`, plain."""
        found: dict[str, Any] = {
            "runtime": self.runtime,
            "precision": precision,
            "max_batch": max_batch,
            "cache_dir": str(cache / "engines") if self.keeps else None,
        }
        if self.fused is not None:
            found["fused_kernels"] = self.fused
        if self.compile:
            found["torch_compile"] = True
        if self.runtime.startswith("triton"):
            found["triton_url"] = triton_url
        return found


BOTH = ("cuda", "cpu")

CONTENDERS = {
    item.name: item
    for item in (
        Contender("torch-compile", "torch", BOTH, compile=True, fused=False, own_weights=True, keeps=False),
        Contender("torch-compile+kernels", "torch", compile=True, fused=True, own_weights=True, keeps=False),
        Contender("torch", "torch", BOTH, fused=False, own_weights=True, keeps=False),
        Contender("torch+kernels", "torch", fused=True, own_weights=True, keeps=False),
        Contender("aotinductor", "aotinductor", BOTH, fused=False, own_weights=True),
        Contender("aotinductor+kernels", "aotinductor", fused=True, own_weights=True),
        Contender("tensorrt-rtx", "tensorrt-rtx"),
        Contender("tensorrt", "tensorrt"),
        Contender("onnxruntime", "onnxruntime", BOTH, keeps=False),
        Contender("triton", "triton", keeps=False),
        Contender("triton-cuda", "triton-cuda", keeps=False),
        Contender("openvino", "openvino", ("cpu",)),
    )
}
"""By name. The first that is timed, torch.compile in bfloat16 where it takes part, is what others are compared with."""


def environment(cache: Path) -> Mapping[str, str]:
    """Where torch and Triton keep what they compile, apart for each contender: a cold start must be one."""
    return {
        "TORCHINDUCTOR_CACHE_DIR": str(cache / "inductor"),
        "TRITON_CACHE_DIR": str(cache / "triton"),
        "CUDA_CACHE_PATH": str(cache / "cuda"),
    }
