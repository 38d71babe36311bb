"""A bundle's own model as torch modules: the graphs that were exported, run by torch instead.

They are made as the export makes them (`engines/export/graphs.py`): the same exact rewrites, the same parts in bfloat16
(`engines/export/precision.py`). One component is loaded at a time, so that in bfloat16 no more of the model than that
is ever in memory in float32.
"""

from __future__ import annotations

import logging

import torch
from torch import Tensor

from engines.bundle import MODEL, Bundle, Manifest
from engines.errors import RuntimeUnavailable
from engines.export.graphs import DecoderGraph, DenoiserGraph, TextEncoderGraph
from engines.export.onnx_file import GraphModule
from engines.export.precision import LOW, lower_
from engines.families.base import Family, FamilyError, load_family
from engines.kernels.switch import use_fused_kernels
from engines.torch_device import choose_kernels

log = logging.getLogger("engines.torch")

PARTS = {"denoiser": "transformer", "decoder": "vae"}
"""Component → diffusers' name of it; text encoders have one name."""


def load_graph(
    bundle: Bundle, component: str, precision: str, device: torch.device, fused: bool | None
) -> GraphModule:
    """`component` in `f32` or `bf16` on `device`; the denoiser with the Triton kernels if `choose_kernels(fused, …)`.

    Raises:
        RuntimeUnavailable: the model cannot be loaded with what is installed, or lacks kernels that were asked for.
    """
    try:
        family = load_family(bundle.root / MODEL, torch.float32, (PARTS.get(component, component),))
    except FamilyError as error:
        raise RuntimeUnavailable(f"the model of this bundle cannot be loaded here: {error}") from error
    graph = _graph(bundle.manifest, component, family)
    assert graph.inputs == tuple(bundle.manifest.components[component].inputs), graph.inputs
    assert graph.outputs == tuple(bundle.manifest.components[component].outputs), graph.outputs
    if component == "denoiser":
        family.fuse()
    if precision == "bf16":
        if component == "denoiser":
            lower_(graph.weights, family.low_precision())
        else:
            graph.to(LOW)
    graph.to(device)
    if component == "denoiser" and choose_kernels(fused, device):
        try:
            use_fused_kernels(graph.weights, enabled=True)
        except RuntimeUnavailable as error:  # a family without any
            if fused:
                raise
            log.warning("%s", error)
    return graph


def _graph(manifest: Manifest, component: str, family: Family) -> GraphModule:
    """Without names for what varies, which only an ONNX file has."""
    if component == "denoiser":
        return DenoiserGraph(family, {name: {} for name in manifest.conditioning})
    if component == "decoder":
        return DecoderGraph(family)
    (encoder,) = [item for item in family.text_encoders() if item.component == component]
    return TextEncoderGraph(encoder, ())


def example(manifest: Manifest, component: str, batch: int, device: torch.device) -> list[Tensor]:
    """Inputs of `component` at the default size, to trace it or to warm it with: zeros."""
    size, factor = manifest.default_size, manifest.latent.downscale
    dims = {
        **manifest.text_lengths,
        "batch": batch,
        "height": size.height // factor,
        "width": size.width // factor,
    }
    return [
        torch.zeros(
            [dims[dim] if isinstance(dim, str) else dim for dim in spec.shape],
            dtype=getattr(torch, spec.dtype),
            device=device,
        )
        for spec in manifest.components[component].inputs.values()
    ]


def varying(manifest: Manifest, component: str) -> list[list[int]]:
    """Which dimensions of each input serving varies: the batch, and the latent's sides if there are several sizes."""
    names = {"batch", "height", "width"} if len(manifest.sizes) > 1 else {"batch"}
    return [
        [axis for axis, dim in enumerate(spec.shape) if dim in names]
        for spec in manifest.components[component].inputs.values()
    ]


def compile_failure(runtime: str, component: str, error: BaseException) -> str:
    """What to tell of a failed compilation, in a sentence."""
    while error.__cause__ is not None:
        error = error.__cause__
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return (
        f"{runtime} cannot compile the {component} here: {reason}; it takes a C++ compiler (g++) and, for a GPU, the "
        "CUDA toolkit's headers: install what is missing, or choose another runtime"
    )
