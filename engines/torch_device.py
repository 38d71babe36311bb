"""What torch computes on here: which device, in which precision, with which kernels."""

from __future__ import annotations

from importlib.util import find_spec

import torch

from engines import processor
from engines.errors import RuntimeUnavailable

PRECISIONS = ("auto", "f32", "bf16")

KERNELS_FROM = (8, 0)
"""Compute capability from which the kernels of `engines/kernels` are compiled."""


def choose_device() -> torch.device:
    """The first GPU that CUDA shows (`CUDA_VISIBLE_DEVICES`), or the CPU."""
    return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")


def device_name(device: torch.device) -> str:
    """The device's own name."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else processor.name()


def choose_precision(asked: str, device: torch.device, runtime: str) -> str:
    """`f32` or `bf16`. `auto` is bf16 where the device computes it natively.

    Raises:
        RuntimeUnavailable: a precision that is neither.
    """
    if asked not in PRECISIONS:
        raise RuntimeUnavailable(f"precision={asked!r} is not one of {runtime}'s: {', '.join(PRECISIONS)}")
    if asked != "auto":
        return asked
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "f32"
    return "bf16" if processor.has_bf16() else "f32"


def choose_kernels(asked: bool | None, device: torch.device) -> bool:
    """Whether to run the Triton kernels: as asked, or else on the GPUs that they are compiled for.

    Raises:
        RuntimeUnavailable: asked for, and there is no Triton or no GPU.
    """
    if asked is False:
        return False
    if find_spec("triton") is None:
        why = "need the package 'triton', which is not installed; install it (torch for CUDA brings it)"
    else:
        from engines.kernels.launch import INTERPRETED

        nvidia = device.type == "cuda" and torch.version.cuda is not None
        if INTERPRETED and asked:
            return True
        if nvidia and torch.cuda.get_device_capability(device) >= KERNELS_FROM:
            return True
        least = ".".join(map(str, KERNELS_FROM))
        why = f"need an NVIDIA GPU of compute capability {least} or more, and there is {device_name(device)}"
    if asked:
        raise RuntimeUnavailable(f"fused_kernels {why}, or leave them off")
    return False
