"""What this machine computes with: its processor and what that does by itself, its GPUs, its memory."""

from __future__ import annotations

import os
import platform
from pathlib import Path

CPUINFO = Path("/proc/cpuinfo")
NVIDIA = Path("/proc/driver/nvidia/gpus")
"""One folder a GPU, from NVIDIA's driver."""
DEVICES = Path("/dev")
"""Has `nvidia0` where that folder is hidden, and `dxg` for the GPU of a Windows around this Linux."""
CGROUP_MEMORY = (
    Path("/sys/fs/cgroup/memory.max"),
    Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"),
)
"""A container's limit: version 2, version 1."""

NATIVE_BF16 = {"amx_bf16", "avx512_bf16"}


def name(cpuinfo: Path = CPUINFO) -> str:
    """What tells processors apart as far as speed goes."""
    return _field("model name", cpuinfo) or platform.processor() or platform.machine()


def flags(cpuinfo: Path = CPUINFO) -> frozenset[str]:
    """Instruction sets, as the kernel names them; empty where it does not say (not Linux)."""
    return frozenset(_field("flags", cpuinfo).split())


def has_bf16(cpuinfo: Path = CPUINFO) -> bool:
    """Whether it multiplies bfloat16 (AMX-BF16 or AVX512-BF16): emulated, that is slower than float32."""
    return bool(flags(cpuinfo) & NATIVE_BF16)


def available() -> int:
    """Processors that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def gpus(nvidia: Path = NVIDIA, devices: Path = DEVICES) -> tuple[str, ...]:
    """Names of the NVIDIA GPUs that the driver shows, without loading anything; none: it shows none."""
    found = [_field("Model", path) or "unknown" for path in sorted(nvidia.glob("*/information"))]
    return tuple(found or ["unknown" for pattern in ("nvidia[0-9]*", "dxg") for _ in devices.glob(pattern)])


def memory_bytes(limits: tuple[Path, ...] = CGROUP_MEMORY) -> int:
    """The machine's memory, or the container's limit where that is less; 0 where neither can be told."""
    try:
        found = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    except (ValueError, OSError, AttributeError):  # not POSIX
        found = []
    for limit in limits:
        try:
            found.append(int(limit.read_text(encoding="ascii")))
        except (OSError, ValueError):  # none, or "max"
            continue
    return min(found, default=0)


def _field(field: str, cpuinfo: Path) -> str:
    """Of the first core."""
    try:
        lines = cpuinfo.read_text(encoding="utf-8").splitlines()
    except OSError:  # not Linux
        return ""
    found = (line.split(":", 1)[1].strip() for line in lines if line.split(":", 1)[0].strip() == field)
    return next(found, "")
