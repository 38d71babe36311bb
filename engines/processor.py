"""What this machine's processor is, and what it computes by itself."""

from __future__ import annotations

import platform
from pathlib import Path

CPUINFO = Path("/proc/cpuinfo")

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


def _field(field: str, cpuinfo: Path) -> str:
    """Of the first core."""
    try:
        lines = cpuinfo.read_text(encoding="utf-8").splitlines()
    except OSError:  # not Linux
        return ""
    found = (line.split(":", 1)[1].strip() for line in lines if line.split(":", 1)[0].strip() == field)
    return next(found, "")
