"""Weights' memory, given back when it is no longer needed and not when nobody refers to it any more.

Pipelines refer to themselves, torch's exporter keeps what it traced until it traces again, and the C library keeps
what was freed in small pieces: together they held the model twice.
"""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Iterable

import torch
from torch import Tensor


def free(tensors: Iterable[Tensor]) -> None:
    """Empty the tensors, whoever still refers to them; memory that is not torch's own (a mapped file) is let go of."""
    for tensor in tensors:
        storage = tensor.untyped_storage()
        if storage.resizable():
            storage.resize_(0)
        else:
            tensor.data = torch.empty(0, dtype=tensor.dtype)


def trim() -> None:
    """Give freed memory back to the system, where the C library can (glibc)."""
    gc.collect()
    if release := getattr(ctypes.CDLL(None), "malloc_trim", None):
        release(0)
