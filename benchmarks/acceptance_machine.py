"""What machine this is: GPUs as the driver names them, the versions of everything that matters, the commit.

    describe(device="cuda")["gpus"]     # [{"name": "NVIDIA H100 80GB HBM3", "capability": "9.0", …}]

Nothing here takes a GPU or imports a runtime.
"""

from __future__ import annotations

import ctypes
import importlib.metadata
import os
import subprocess
from pathlib import Path
from typing import Any

QUERY = ("name", "compute_cap", "driver_version", "memory.total", "memory.used")

PACKAGES = {
    "torch": ("torch",),
    "triton": ("triton",),
    "tensorrt": ("tensorrt", "tensorrt-cu13", "tensorrt-cu12"),
    "tensorrt-rtx": ("tensorrt-rtx", "tensorrt-rtx-cu13", "tensorrt-rtx-cu12"),
    "onnxruntime-gpu": ("onnxruntime-gpu",),
    "onnxruntime": ("onnxruntime",),
    "cuda-bindings": ("cuda-bindings",),
    "diffusers": ("diffusers",),
    "transformers": ("transformers",),
    "tritonclient": ("tritonclient",),
    "openvino": ("openvino",),
    "cdm-serve": ("cdm-serve",),
}
"""What is reported → the names that it is installed under."""

CAPABILITY_MAJOR, CAPABILITY_MINOR = 75, 76
"""Numbers of the attributes in CUDA's driver API."""

NONE = "not installed"
ROOT = Path(__file__).resolve().parent.parent


def describe() -> dict[str, Any]:
    """GPUs that this process may use, the CUDA version that the driver takes, packages, commit."""
    return {
        "gpus": gpus(),
        "cuda": cuda_version(),
        "packages": {name: _version(names) for name, names in PACKAGES.items()},
        "commit": commit(),
    }


def gpus() -> list[dict[str, Any]]:
    """As `nvidia-smi` has them, or where it is missing the driver; the first is the one that runtimes use."""
    return parse_smi(_smi()) or ask_driver(_driver())


def parse_smi(text: str) -> list[dict[str, Any]]:
    """Lines of `nvidia-smi --query-gpu=… --format=csv,noheader,nounits`; memory in MiB."""
    found = []
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.split(",")]
        if len(cells) == len(QUERY):
            name, capability, driver, total, used = cells
            found.append(
                {
                    "name": name,
                    "capability": capability,
                    "driver": driver,
                    "memory MiB": _number(total),
                    "used MiB": _number(used),
                }
            )
    return found


def ask_driver(library: Any) -> list[dict[str, Any]]:
    """The same from CUDA's own driver, which containers have even where they lack `nvidia-smi`; no memory is known."""
    count = ctypes.c_int()
    if library is None or library.cuInit(0) or library.cuDeviceGetCount(ctypes.byref(count)):
        return []
    found = []
    for number in range(count.value):
        name, major, minor = ctypes.create_string_buffer(256), ctypes.c_int(), ctypes.c_int()
        library.cuDeviceGetName(name, len(name), number)
        library.cuDeviceGetAttribute(ctypes.byref(major), CAPABILITY_MAJOR, number)
        library.cuDeviceGetAttribute(ctypes.byref(minor), CAPABILITY_MINOR, number)
        found.append({"name": name.value.decode(), "capability": f"{major.value}.{minor.value}"})
    return found


def used_bytes() -> int | None:
    """Device memory that anybody has taken of the first GPU; None where nobody knows."""
    found = gpus()
    mebibytes = found[0].get("used MiB") if found else None
    return None if mebibytes is None else mebibytes << 20


def cuda_version() -> str:
    """The newest CUDA that the driver takes, as "13.0"; empty without a driver."""
    library, version = _driver(), ctypes.c_int()
    if library is None or library.cuDriverGetVersion(ctypes.byref(version)):
        return ""
    return f"{version.value // 1000}.{version.value % 1000 // 10}"


def commit(root: Path = ROOT) -> str:
    """The commit that runs, `+` where files differ from it; the installed version where there is no repository."""
    try:
        head, changed = (
            subprocess.run(
                ["git", "-C", str(root), *command], capture_output=True, text=True, check=True
            ).stdout.strip()
            for command in (["rev-parse", "HEAD"], ["status", "--porcelain", "--untracked-files=no"])
        )
    except (OSError, subprocess.CalledProcessError):
        return f"no repository, version {_version(PACKAGES['cdm-serve'])}"
    return head + ("+" if changed else "")


def _driver() -> Any:
    try:
        return ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None


def _smi() -> str:
    command = ["nvidia-smi", f"--query-gpu={','.join(QUERY)}", "--format=csv,noheader,nounits"]
    if visible := os.environ.get("CUDA_VISIBLE_DEVICES"):
        command.append(f"--id={visible}")
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout
    except (OSError, subprocess.SubprocessError):
        return ""


def _number(text: str) -> int | None:
    return int(text) if text.isdigit() else None  # "[N/A]" on machines that share their memory


def _version(names: tuple[str, ...]) -> str:
    for name in names:
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return NONE
