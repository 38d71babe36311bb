"""What TensorRT made of a graph, read from its own build log: is attention one kernel, and what memory does it want?

An attention that is not one kernel writes its scores and its probabilities to memory, whole: 2 · batch · heads ·
queries · keys values. An engine whose scratch memory is smaller than that has no such attention, whatever its kernels
are called; where it is larger, their names tell. Both are known without a GPU.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from engines.errors import ExportError

HEADS = range(16, 257)
"""Sizes of an attention head for which there is a fused kernel: of all multiples of 8 tried with TensorRT-RTX 1.7.1,
16 to 256 are fused in bfloat16 and float16, 8, 264 and 512 are not."""

SCRATCH = re.compile(r"^Max Scratch Memory: (\d+) bytes")
KERNEL = re.compile(r"^Name: ([^,]+), LayerType: ([^,]+),", re.MULTILINE)
NO_WORK = {"shape_call", "signal", "wait"}
"""Layer types of the listing that synchronise or compute sizes."""

ATTENTION = re.compile(r"mha", re.IGNORECASE)
ACTIVATION = re.compile(r"Tanh|Erf|Sigm|Silu|Gelu")
PRODUCT = re.compile(r"^__myl_(Fc|Corr)")
"""A matrix product or convolution whose kernel does what follows it as well."""


@dataclass(frozen=True)
class Attention:
    """One attention of a network at its largest shape. `head` is unknown where it is written as two products."""

    batch: int
    heads: int
    queries: int
    keys: int
    itemsize: int
    head: int | None = None

    @property
    def fusable(self) -> bool:
        """Whether there is a kernel for heads of this size."""
        return self.head is None or self.head in HEADS

    @property
    def unfused_bytes(self) -> int:
        """Scores and probabilities."""
        return 2 * self.batch * self.heads * self.queries * self.keys * self.itemsize


@dataclass(frozen=True)
class Report:
    """One engine. `kernels` is None where the log did not list them; sizes are in bytes.

    `fusable` of the `attentions` have heads of a size that can be fused; the smallest of these would write
    `unfused_bytes` if it were not. `fused` kernels are attentions. `activations` are kernels that compute a GELU, a
    SiLU or the like, `activations_in_products` those of them that are part of a matrix product's.
    """

    component: str
    precision: str
    target: str
    onnx_bytes: int
    engine_bytes: int
    scratch_bytes: int
    unfused_bytes: int
    attentions: int
    fusable: int
    fused: int
    kernels: int | None
    activations: int
    activations_in_products: int
    build_s: float

    @property
    def fell_apart(self) -> int:
        """How many attentions are not one kernel and could be."""
        if self.scratch_bytes < self.unfused_bytes:
            return 0
        return self.fusable if self.kernels is None else max(0, self.fusable - self.fused)

    def __str__(self) -> str:
        listed = "" if self.kernels is None else f"; {self.kernels} kernels"
        return (
            f"attention one kernel: {self.fused} of {self.attentions}; activations in the matrix product: "
            f"{self.activations_in_products} of {self.activations}; scratch memory {megabytes(self.scratch_bytes)} MB"
            f"{listed}"
        )

    def require_attention(self, component: str) -> None:
        """Raise `ExportError` if an attention that could be one kernel is not: its scores go through memory."""
        if self.fell_apart:
            remedy = (
                "build the bfloat16 graph, in which TensorRT fuses them"
                if self.precision == "f32"
                else "export with --allow-unfused to keep it, slower, or with an attention that TensorRT fuses"
            )
            raise ExportError(
                f"{component} ({self.precision}, {self.target}): {self.fell_apart} of {self.attentions} attentions "
                f"are not one kernel (scratch memory {megabytes(self.scratch_bytes)} MB, where one of them unfused "
                f"takes {megabytes(self.unfused_bytes)} MB); {remedy}"
            )

    def row(self) -> dict[str, Any]:
        """For a table."""
        fused = f"{self.fused} of {self.attentions}" if self.kernels is not None else ""
        if self.attentions > self.fusable:
            fused += f" ({self.attentions - self.fusable} cannot be)"
        return {
            "component": self.component,
            "precision": self.precision,
            "target": self.target,
            "ONNX MB": megabytes(self.onnx_bytes),
            "engine MB": megabytes(self.engine_bytes),
            "scratch MB": megabytes(self.scratch_bytes),
            "one unfused attention MB": megabytes(self.unfused_bytes),
            "attentions fused": fused if self.attentions else "none there",
            "kernels": self.kernels,
            "activations in products": f"{self.activations_in_products} of {self.activations}",
            "build s": round(self.build_s, 1),
        }

    def to_json(self) -> bytes:
        """What `from_json` reads."""
        return json.dumps(dataclasses.asdict(self)).encode()

    @classmethod
    def from_json(cls, data: bytes) -> Report | None:
        """None if another version wrote it."""
        try:
            return cls(**json.loads(data))
        except (ValueError, TypeError):
            return None


def read_log(lines: Sequence[str]) -> Mapping[str, Any]:
    """The fields of a `Report` that a build log tells: scratch memory, and the kernels where they are listed."""
    scratch = [int(found[1]) for line in lines if (found := SCRATCH.match(line))]
    listing = next((line for line in lines if line.startswith("Layers:")), None)
    kernels = KERNEL.findall(listing or "")
    names = [name for name, kind in kernels if kind not in NO_WORK]
    active = [name for name in names if ACTIVATION.search(name)]
    return {
        "scratch_bytes": max(scratch, default=0),
        "kernels": len(names) if kernels else None,
        "fused": sum(bool(ATTENTION.search(name)) for name in names),
        "activations": len(active),
        "activations_in_products": sum(bool(PRODUCT.match(name)) for name in active),
    }


def attentions(trt: Any, network: Any) -> list[Attention]:
    """Every attention of a network whose inputs have static shapes, written as one operation or as a softmax."""
    found = []
    for index in range(network.num_layers):
        layer = network.get_layer(index)
        if layer.type == trt.LayerType.SOFTMAX:
            scores = layer.get_output(0)
            batch, *heads, queries, keys = scores.shape
            if len(scores.shape) > 2:
                found.append(Attention(batch, heads[0] if heads else 1, queries, keys, scores.dtype.itemsize))
        elif layer.type == getattr(trt.LayerType, "ATTENTION_INPUT", None):
            query, key = layer.get_input(0), layer.get_input(1)
            batch, number, queries, head = query.shape
            found.append(Attention(batch, number, queries, key.shape[2], query.dtype.itemsize, head))
    return found


def megabytes(nbytes: int) -> float:
    """10⁶ bytes, to a tenth."""
    return round(nbytes / 1e6, 1)
