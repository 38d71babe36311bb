"""What crosses between host and device: as our own calls ask for it, and as the GPU's profiler sees it.

profiled(step)        # [("HtoD", 16), ("HtoD", 16), ("DtoD", 65536), …], or None where torch cannot say
crossing(copies)      # {"up": 32, "down": 0}
"""

from __future__ import annotations

import importlib
import json
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from engines.cuda import Cuda

Copy = tuple[str, int]
"""Kind (`HtoD`, `DtoH`, `DtoD`) and bytes."""

RECORDABLE = ("tensorrt-rtx", "tensorrt", "triton-cuda")
"""Runtimes that call CUDA through `engines/cuda.py`."""

KINDS = {"HostToDevice": "HtoD", "DeviceToHost": "DtoH", "DeviceToDevice": "DtoD", "HostToHost": "HtoH"}
SIGMA_BYTES = 4


class Recorder:
    """`cuda.bindings.runtime`, or a double of it, with the copies that it is asked for written down."""

    def __init__(self, runtime: Any) -> None:
        self._runtime = runtime
        self.copies: list[Copy] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._runtime, name)

    def cudaMemcpyAsync(self, target: int, source: int, nbytes: int, kind: Any, stream: Any) -> Any:
        self.copies.append((KINDS[kind.name.removeprefix("cudaMemcpy")], nbytes))
        return self._runtime.cudaMemcpyAsync(target, source, nbytes, kind, stream)


def recorder_of(runtime: str) -> Recorder | None:
    """One around the real CUDA, for a runtime whose calls can be recorded."""
    return Recorder(importlib.import_module("cuda.bindings.runtime")) if runtime in RECORDABLE else None


@contextmanager
def spoiled_captures() -> Iterator[None]:
    """Every capture into a CUDA graph fails halfway, as CUDA lets it: memory cannot be allocated during one."""
    original = Cuda.capture

    def capture(self: Cuda, enqueue: Callable[[], bool]) -> Any:
        def spoiled() -> bool:
            self.allocate(16)
            return enqueue()

        return original(self, spoiled)

    setattr(Cuda, "capture", capture)  # noqa: B010  (mypy takes no assignment to a method)
    try:
        yield
    finally:
        setattr(Cuda, "capture", original)  # noqa: B010


def profiled(call: Callable[[], object]) -> list[Copy] | None:
    """The copies of `call`, whoever makes them; None without torch for CUDA, whose profiler tells."""
    try:
        import torch
        from torch.profiler import ProfilerActivity, profile
    except ImportError:
        return None
    if not torch.cuda.is_available():
        return None
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        call()
        torch.cuda.synchronize()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(file))
        return parse_trace(file.read_text(encoding="utf-8"))


def parse_trace(text: str) -> list[Copy]:
    """The copies of a trace as torch's profiler writes it: events named `Memcpy HtoD (Pinned -> Device)`."""
    return [
        (str(event["name"]).split()[1], int(event.get("args", {}).get("bytes", 0)))
        for event in json.loads(text)["traceEvents"]
        if event.get("cat") == "gpu_memcpy"
    ]


def crossing(copies: Sequence[Copy]) -> dict[str, int]:
    """Bytes that went up to the device and down from it."""
    return {
        "up": sum(nbytes for kind, nbytes in copies if kind == "HtoD"),
        "down": sum(nbytes for kind, nbytes in copies if kind == "DtoH"),
    }


def judge(copies: Sequence[Copy], batch: int) -> str:
    """`ok` if one step of `batch` pictures has only its σ and σ′ go up, and nothing come down."""
    sigmas = 2 * SIGMA_BYTES * batch
    found = crossing(copies)
    if not found["up"]:
        return "failed: not even σ was seen to go up, so nothing was observed"
    if found["down"]:
        return f"failed: {found['down']} bytes came down to the host in a step; none may"
    if found["up"] > sigmas:
        return f"failed: {found['up']} bytes went up to the device in a step; σ and σ′ are {sigmas}"
    return "ok"
