"""What compilers make of a bundle's graphs: is each attention one kernel? The manifest says it, or the export fails.

    fusion_targets(("8.9",), ("float32", "bfloat16"))     # before hours of exporting: can it be asked here at all?
    manifest = check_fusion(bundle, ("8.9",), Tolerance(), print)

A runtime that has run the bundle is asked by `engines/export/verify.py`. TensorRT-RTX builds for a GPU that is not
here: it is asked for any compute capability, and nothing is run.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any, Protocol, runtime_checkable

from engines.bundle import Bundle, Fusion, Manifest, Precision
from engines.errors import ExportError, RuntimeUnavailable
from engines.export.tolerance import Tolerance
from engines.tensorrt_build import BFLOAT16_FROM, Order, build
from engines.tensorrt_library import PACKAGES, RTX, Library, open_library

MAX_BATCH = 8
"""Rows that the engines are built for: a server's usual `--max-batch`."""

ALONE = {"openvino": ("denoiser",)}
"""Runtimes of which not every component is held to fused attention. OpenVINO computes CLIP's, which is causal, in
several nodes: once a prompt, which costs little beside the steps."""


class CompilerReport(Protocol):
    """What a runtime's compiler made of a graph, in words, and a check that raises `ExportError`."""

    @property
    def attentions(self) -> int: ...

    @property
    def fell_apart(self) -> int: ...

    def require_attention(self, component: str) -> None: ...


@runtime_checkable
class ReportsFusion(Protocol):
    """An engine that can say what its compiler fused."""

    def fusion_report(self, component: str) -> CompilerReport: ...


def read_fusion_check(text: str) -> str:
    """The compute capability of `tensorrt-rtx:8.9`.

    Raises:
        ValueError: it is no such thing, or of a GPU without bfloat16.
    """
    runtime, _, capability = text.partition(":")
    if runtime != RTX or not re.fullmatch(r"[1-9]\d?\.\d", capability):
        raise ValueError(
            f"{text!r} cannot be checked for fusion; write {RTX}:CAPABILITY, a GPU's compute capability, as {RTX}:8.9"
        )
    if tuple(map(int, capability.split("."))) < BFLOAT16_FROM:
        least = ".".join(map(str, BFLOAT16_FROM))
        raise ValueError(
            f"{text!r}: compute capability {capability} has no bfloat16, in which TensorRT fuses attention; "
            f"{least} and above have it"
        )
    return capability


def fusion_targets(
    capabilities: Sequence[str], precisions: Sequence[Precision], trt: Any = None
) -> Library | None:
    """The TensorRT-RTX that `check_fusion` asks; None if it is asked nothing. `trt` takes the package's place.

    Raises:
        ExportError: it is not installed, has no such target, or no bfloat16 graphs are written.
    """
    if not capabilities:
        return None
    if "bfloat16" not in precisions:
        raise ExportError(
            f"fusion check {RTX}:{capabilities[0]} reads bfloat16 graphs, and only {', '.join(precisions)} is written; "
            "add --precisions float32,bfloat16, or leave --fusion-check out"
        )
    try:
        library = open_library(RTX, trt)
        for capability in capabilities:
            library.check_target(capability)
    except RuntimeUnavailable as error:
        raise ExportError(f"fusion check {RTX}:{','.join(capabilities)}: {error}") from error
    return library


def check_fusion(
    bundle: Bundle,
    capabilities: Sequence[str],
    tolerance: Tolerance,
    progress: Callable[[str], None],
    trt: Any = None,
) -> Manifest:
    """The bundle's manifest with what TensorRT-RTX makes of each component for `capabilities` added.

    Raises:
        ExportError: what `fusion_targets` says, a component cannot be built, or an attention that could be one kernel
            is not.
    """
    found: dict[str, list[Fusion]] = {name: [] for name in bundle.manifest.components}
    library = fusion_targets(capabilities, bundle.manifest.precisions, trt)
    for capability in capabilities if library else ():
        for component, fusions in found.items():
            progress(f"fusion: {component} on {RTX} bf16 for {capability}")
            assert library is not None
            report = build(Order(library, bundle, "bf16", capability, MAX_BATCH), component)[1]
            fusions += judge(report, component, (RTX, "bf16", capability), tolerance, progress)
    return with_fusions(bundle.manifest, found)


def judge(
    report: CompilerReport,
    component: str,
    on: tuple[str, str, str],
    tolerance: Tolerance,
    progress: Callable[[str], None],
) -> list[Fusion]:
    """`report` for the manifest; nothing of a component without attention. `on`: runtime, precision, target.

    Raises:
        ExportError: an attention fell apart that `tolerance` does not allow to.
    """
    runtime, precision, target = on
    if not report.attentions:
        if component == "denoiser" and not tolerance.unfused:
            raise ExportError(
                f"denoiser on {runtime} {precision}: no attention was recognised in its graph, so nothing is known "
                "of its fusion; export with --allow-unfused to write it all the same"
            )
        return []
    where = f" for {target}" if target else ""
    progress(f"{component} on {runtime} {precision}{where}: {report}")
    never = runtime in PACKAGES and precision == "f32"  # TensorRT fuses none there
    held = component in ALONE.get(runtime, (component,)) and not never
    if held and not tolerance.unfused:
        report.require_attention(component)
    fusion = Fusion(
        runtime=runtime,
        precision=precision,
        target=target,
        attentions=report.attentions,
        fell_apart=report.fell_apart,
        report=str(report),
    )
    return [fusion]


def with_fusions(manifest: Manifest, found: dict[str, list[Fusion]]) -> Manifest:
    """`manifest` with what was `found` of each component beside what it has."""
    components = {
        name: component.model_copy(update={"fusions": (*component.fusions, *found[name])})
        for name, component in manifest.components.items()
    }
    return manifest.model_copy(update={"components": components})
