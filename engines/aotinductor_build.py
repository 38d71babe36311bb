"""A component of a bundle → an AOTInductor package: `torch.export`, then Inductor and the C++ compiler.

    package = build(bundle, "denoiser", "bf16", torch.device("cpu"), fused=None)       # bytes of a .pt2

Any batch and all of the bundle's sizes are one package; text has the length that serving always gives it.
"""

from __future__ import annotations

import io
import warnings
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch._inductor.utils import fresh_cache
from torch.export import Dim

from engines.bundle import Bundle
from engines.errors import RuntimeUnavailable
from engines.torch_graphs import compile_failure, example, load_graph, varying

EXAMPLE_BATCH = 2
"""The least that is not taken for a constant."""


def build(bundle: Bundle, component: str, precision: str, device: torch.device, fused: bool | None) -> bytes:
    """Compile `component` in `precision` for `device`; `fused` as `choose_kernels` takes it.

    Raises:
        RuntimeUnavailable: it cannot be loaded or compiled here.
    """
    graph = load_graph(bundle, component, precision, device, fused)
    inputs = example(bundle.manifest, component, EXAMPLE_BATCH, device)
    shapes: Any = torch.export.ShapesCollection()  # type: ignore[no-untyped-call]
    for tensor, axes in zip(inputs, varying(bundle.manifest, component), strict=True):
        shapes[tensor] = dict.fromkeys(axes, Dim.DYNAMIC)
    package = io.BytesIO()
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")  # torch's own deprecations
            program = torch.export.export(graph, tuple(inputs), dynamic_shapes=shapes, strict=False)
            # What the compiler leaves behind is several times the model's size.
            with TemporaryDirectory() as folder, fresh_cache(dir=folder, delete=False):
                torch._inductor.aoti_compile_and_package(program, package_path=package)
    except Exception as error:  # torch.export's, Inductor's, the C++ compiler's, and plain ones
        raise RuntimeUnavailable(compile_failure("aotinductor", component, error)) from error
    return package.getvalue()
