"""Whether a runtime can be examined on a device at all, asked before it is loaded."""

from __future__ import annotations

from importlib.util import find_spec

from benchmarks.acceptance_report import Missed, Skipped
from engines.cuda import Cuda
from engines.errors import RuntimeUnavailable
from engines.tensorrt_library import RTX, open_library

TORCH = ("torch", "aotinductor")
"""Runtimes that run torch, or what it has compiled."""


def check_installed(runtime: str, device: str, *, kernels: bool = False) -> None:
    """Refuse `runtime` where it would run on something else than `device` without a word.

    Raises:
        Skipped: a package is missing or made without CUDA, or its maker has nothing for this GPU.
        Missed: it is made for CUDA and sees no GPU.
    """
    if kernels and find_spec("triton") is None:
        raise Skipped("the kernels need the package 'triton', which is not installed")
    if device != "cuda":
        return
    if runtime == "onnxruntime":
        import onnxruntime

        if "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
            raise Skipped("onnxruntime is installed without its CUDA provider, which onnxruntime-gpu has")
    if runtime in TORCH:
        import torch

        if torch.version.cuda is None:
            raise Skipped(f"torch {torch.__version__} is installed without CUDA")
        if not torch.cuda.is_available():
            raise Missed(f"torch {torch.__version__} sees no GPU")
    if runtime == RTX:
        library, cuda = open_library(runtime), Cuda()
        try:
            library.check_target(cuda.capability)
        except RuntimeUnavailable as error:
            raise Skipped(str(error)) from error
        finally:
            cuda.close()
