"""What OpenVINO made of a graph: read from the executed graph of a compiled model, not guessed.

    report = fusion_report(compiled, source)
    report.require_attention("denoiser")      # ExportError where an attention is no single node

Every executed node says which nodes of the source it stands for. Attention is one node if its softmax is inside a
node of another kind than softmax; a GELU is in the matrix product if a FullyConnected names it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import openvino as ov

from engines.errors import ExportError

ALONE = "Softmax"
MATRIX_PRODUCTS = ("FullyConnected", "MatMul", "Convolution")


@dataclass(frozen=True)
class FusionReport:
    """Counts of what the source has and of what is executed for it."""

    attentions: int
    attentions_fused: int
    gelus: int
    gelus_in_products: int
    rms: int
    """RMS norms that are one node."""
    rope: int
    """Rotary embeddings that are one node."""
    nodes: Mapping[str, int]
    """Executed nodes by kind, constants and the graph's own inputs and outputs left out."""

    @property
    def fell_apart(self) -> int:
        """How many attentions are several nodes."""
        return self.attentions - self.attentions_fused

    def __str__(self) -> str:
        largest = ", ".join(f"{count} {kind}" for kind, count in Counter(self.nodes).most_common(6))
        return (
            f"attention one node: {self.attentions_fused} of {self.attentions}; GELU in the matrix product: "
            f"{self.gelus_in_products} of {self.gelus}; RMS norms: {self.rms}; RoPE: {self.rope}; "
            f"{sum(self.nodes.values())} nodes: {largest}"
        )

    def require_attention(self, component: str) -> None:
        """Raise `ExportError` unless every attention is one node: unfused, its scores go through memory."""
        if self.fell_apart:
            raise ExportError(
                f"{component}: {self.fell_apart} of {self.attentions} attentions fell apart in "
                "OpenVINO's executed graph; export with --allow-unfused to keep it, slower, or with an "
                "attention that OpenVINO fuses"
            )


def fusion_report(compiled: ov.CompiledModel, source: ov.Model) -> FusionReport:
    """Compare the executed graph with the `source` model that was compiled."""
    wanted = _names(source.get_ordered_ops())
    executed = [_info(node) for node in compiled.get_runtime_model().get_ordered_ops()]
    inside: dict[str, str] = {}
    for kind, originals in executed:
        inside |= dict.fromkeys(originals, kind)
    return FusionReport(
        attentions=len(wanted[ALONE]),
        attentions_fused=sum(inside.get(name, ALONE) != ALONE for name in wanted[ALONE]),
        gelus=len(wanted["Gelu"]),
        gelus_in_products=sum(inside.get(name) in MATRIX_PRODUCTS for name in wanted["Gelu"]),
        rms=sum(kind == "RMS" for kind, _ in executed),
        rope=sum(kind == "RoPE" for kind, _ in executed),
        nodes=Counter(kind for kind, _ in executed if kind not in ("Const", "Input", "Output")),
    )


def _names(nodes: Sequence[Any]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {ALONE: [], "Gelu": []}
    for node in nodes:
        if node.get_type_name() in found:
            found[node.get_type_name()].append(node.get_friendly_name())
    return found


def _info(node: Any) -> tuple[str, list[str]]:
    info = node.get_rt_info()
    names = info["originalLayersNames"].astype(str) if "originalLayersNames" in info else ""
    return info["layerType"].astype(str), [name for name in names.split(",") if name]
