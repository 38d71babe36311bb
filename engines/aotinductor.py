"""AOTInductor: every component compiled ahead of time by torch into a package (`.pt2`) that runs without Python.

For GPUs without TensorRT, with the Triton kernels of `engines/kernels`. Packages are made as the engine loads, which
takes minutes, the `train` extra and a C++ compiler, and kept in `cache_dir`: from then on the same model on the same
kind of machine starts in seconds and needs of all that nothing but torch.

A package is code: it is loaded from `cache_dir`, which is the user's own, and never from a bundle, which may be
anybody's. The GPU's path has never run where this project is developed; packages for the CPU are compiled and run in
tests.
"""

from __future__ import annotations

import importlib.metadata
import io
import json
import logging
from collections.abc import Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from engines import processor
from engines.base import EngineOptions
from engines.bundle import Bundle
from engines.cache import CompiledCache, shapes_of
from engines.errors import RuntimeUnavailable
from engines.files import sha256_files
from engines.torch_rows import TorchRows

log = logging.getLogger("engines.aotinductor")

SOURCES = (
    "torch_graphs.py",
    "aotinductor_build.py",
    "export/graphs.py",
    "export/precision.py",
    "families",
    "kernels",
)
"""What decides what is compiled of a model: change any of it, and it is compiled anew."""


CLASSES = ("diffusers", "transformers")
"""Packages whose own classes are what is compiled; without them nothing can be."""

COMPILERS = ("triton",)
"""Packages besides torch that make machine code of it; on a machine without a GPU there is none."""


class AOTInductorEngine(TorchRows):
    """A bundle with the model's own weights (`cdm-export --weights`) as AOTInductor packages.

    Raises:
        RuntimeUnavailable: what `TorchRows` says, or there is no package and none can be made here.
    """

    runtime = "aotinductor"

    def __init__(self, bundle: Bundle, options: EngineOptions) -> None:
        super().__init__(bundle, options)
        self._bundle, self._fused = bundle, options.fused_kernels
        key: dict[str, Any] = {
            "model": [ref.sha256 for ref in self.manifest.model],
            "shapes": shapes_of(self.manifest),
            "code": _code(),
            "version": f"{torch.__version__} CUDA {torch.version.cuda}",
            "device": self.info.device,
            "capability": self._capability(),
            "precision": self.info.precision,
            "kernels": self._kernels,
            "threads": self.info.threads,  # their number is compiled in
        }
        packages = _packages(options.cache_dir, key)
        self._cache = CompiledCache.open(options.cache_dir, self.runtime, packages=packages, **key)
        self._packages = {name: self._load(name) for name in self.manifest.components}
        self.cache_folder = self._cache.folder

    def _load(self, component: str) -> Any:
        return self._cache.obtain(component, self._open, partial(self._build, component))

    def _build(self, component: str) -> tuple[Any, bytes]:
        try:
            from engines.aotinductor_build import build
        except ImportError as error:
            raise RuntimeUnavailable(
                f"aotinductor needs the package {error.name!r} once, to compile this model; install the extra 'train', "
                "or start with the cache folder of a machine of this kind that has compiled it"
            ) from error
        log.info("compiling the %s, which takes minutes", component)
        package = build(self._bundle, component, self.info.precision, self._device, self._fused)
        return self._open(package), package

    def _open(self, package: bytes) -> Any:
        # Without a C++ compiler torch cannot name the processor's features, and calls every package outdated.
        loader = logging.getLogger("torch._inductor.package.package")
        level = loader.level
        loader.setLevel(logging.ERROR)
        try:
            index = self._device.index if self._on_gpu else -1
            return torch._inductor.aoti_load_package(io.BytesIO(package), device_index=index)
        finally:
            loader.setLevel(level)

    def _capability(self) -> list[str]:
        """What code that is compiled for this very device may use."""
        if self._on_gpu:
            return [str(number) for number in torch.cuda.get_device_capability(self._device)]
        return [torch.backends.cpu.get_cpu_capability(), *sorted(processor.flags())]

    def _compute(self, component: str, inputs: Sequence[Tensor]) -> Sequence[Tensor]:
        outputs: Sequence[Tensor] = self._packages[component](*inputs)
        return outputs

    def close(self) -> None:
        """Free the packages."""
        self._packages.clear()
        super().close()


def _packages(root: Path | None, key: dict[str, Any]) -> list[str]:
    """Versions of `CLASSES` and `COMPILERS`, for the key.

    Where `CLASSES` are not installed nothing can be compiled, and what a machine that has them made last of the same
    `key` is what there is: its versions.
    """
    found = {name: _version(name) for name in (*CLASSES, *COMPILERS)}
    here = [f"{name} {version}" for name, version in found.items()]
    if root is not None and any(found[name] is None for name in CLASSES):
        wanted = json.loads(json.dumps({"runtime": AOTInductorEngine.runtime, **key}))
        for path in sorted(root.glob(f"{AOTInductorEngine.runtime}-*/key.json"), key=_written, reverse=True):
            try:
                stored = json.loads(path.read_text(encoding="utf-8"))
                packages: list[str] = stored.pop("packages")
            except (
                OSError,
                ValueError,
                KeyError,
                AttributeError,
                TypeError,
            ):  # damaged: compiled anew where that can be
                continue
            if stored == wanted and packages != here:  # which has nothing in it
                return packages
    return here


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _written(path: Path) -> int:
    try:
        return path.stat().st_mtime_ns
    except OSError:  # somebody empties the cache
        return 0


@cache
def _code() -> str:
    """Hash of `SOURCES` as this process has them."""
    root = Path(__file__).parent
    files = [
        path
        for source in SOURCES
        for path in ((root / source).rglob("*.py") if (root / source).is_dir() else [root / source])
    ]
    return sha256_files(root, files)
