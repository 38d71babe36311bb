"""One component at a time: load it, let torch answer, write its graphs, check them, forget it.

A stage is all that memory ever holds of the model, so that the largest component alone bounds the export.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import onnx_ir as ir
import torch

from engines.bundle import Component, Graph, Parity, Precision, TensorSpec
from engines.errors import ExportError
from engines.export.graphs import exportable
from engines.export.memory import free, trim
from engines.export.onnx_file import (
    OPSET,
    GraphModule,
    describe,
    round_to_float16_,
    save_model,
    store_weights_as_float16,
    to_onnx,
)
from engines.export.parity import Probe, answer, compare, open_session, run_onnx
from engines.export.precision import raise_
from engines.export.raised import raised_session
from engines.export.tolerance import RAISED, Tolerance
from engines.families.base import Family

Loader = Callable[[str], Family]
"""Diffusers component → the family with this one loaded, in float32, its weights as they are."""

SUFFIX: dict[Precision, str] = {"float32": "", "bfloat16": ".bf16"}


@dataclass(frozen=True)
class Stage:
    """How one component is exported.

    `part` is diffusers' name of it; `module` makes its graph of the family that has it; `lower` makes it compute in
    bfloat16; `fuse` rewrites it before it is traced; torch's answers are put into `probes`.
    """

    name: str
    part: str
    module: Callable[[Family], GraphModule]
    probes: list[Probe]
    example: Probe
    lower: Callable[[GraphModule], None]
    fuse: Callable[[Family], None] = lambda family: None
    meanwhile: Callable[[Family], None] = lambda family: None
    """Called once, while the component is loaded with its original weights."""


def run_stage(
    stage: Stage, load: Loader, root: Path, precisions: tuple[Precision, ...], tolerance: Tolerance
) -> Component:
    """Export one component in every precision asked for; torch's original answers stay in `stage.probes`.

    Raises:
        ExportError: it cannot be exported, or is another model than torch's.
    """
    family = load(stage.part)
    module = stage.module(family)
    check_finite(stage.part, module)
    for probe in stage.probes:
        answer(stage.name, module, probe, "original")
    stage.meanwhile(family)
    _release(module)
    del family, module
    trim()
    exports = {"float32": _float32, "bfloat16": _bfloat16}
    written = [exports[precision](stage, load, root, tolerance) for precision in precisions]
    specs = [(inputs, outputs) for _, inputs, outputs, _ in written]
    assert all(spec == specs[0] for spec in specs), "precisions differ in what they take and give"
    return Component(
        graphs={precision: graph for precision, (graph, *_) in zip(precisions, written, strict=True)},
        inputs=specs[0][0],
        outputs=specs[0][1],
        parity=tuple(parity for *_, parities in written for parity in parities),
    )


Written = tuple[Graph, dict[str, TensorSpec], dict[str, TensorSpec], list[Parity]]


def _float32(stage: Stage, load: Loader, root: Path, tolerance: Tolerance) -> Written:
    """Held to torch twice: with the weights as the file stores them, and with the original ones."""
    family = load(stage.part)
    module = stage.module(family)
    round_to_float16_(module)
    for probe in stage.probes:
        answer(stage.name, module, probe, "stored")
    stage.fuse(family)
    model = _trace(stage, module, "float32")
    store_weights_as_float16(model)
    written = _save(stage, model, root, "float32")
    _release(module)
    del family, module, model
    trim()
    session = open_session(root / written[0].file.file, data_bytes=sum(ref.bytes for ref in written[0].data))
    for probe in stage.probes:
        actual = run_onnx(session, probe.inputs)
        for weights in ("stored", "original"):
            written[-1].append(compare(probe, weights, actual, "onnxruntime", "f32"))
            tolerance.check(stage.name, written[-1][-1])
        del probe.answers["stored"]
    return written


def _bfloat16(stage: Stage, load: Loader, root: Path, tolerance: Tolerance) -> Written:
    """Torch in bfloat16 is held to torch in float32; the graph, raised to float32, to torch with its weights."""
    family = load(stage.part)
    module = stage.module(family)
    stage.fuse(family)
    stage.lower(module)
    parities = []
    for probe in stage.probes:
        answer(stage.name, module, probe, "lowered")
        parities.append(compare(probe, "original", probe.answers.pop("lowered"), "torch", "bf16"))
        tolerance.check(stage.name, parities[-1])
    model = _trace(stage, module, "bfloat16")
    written = _save(stage, model, root, "bfloat16")
    del model
    raise_(module)
    for probe in stage.probes:
        answer(stage.name, module, probe, "stored")
    _release(module)
    del family, module
    trim()
    session = raised_session(root / written[0].file.file, sum(ref.bytes for ref in written[0].data))
    for probe in stage.probes:
        actual = run_onnx(session, probe.inputs)
        parities.append(compare(probe, "stored", actual, "onnxruntime", RAISED))
        tolerance.check(stage.name, parities[-1])
        del probe.answers["stored"]
    return (*written[:3], parities)


def _trace(stage: Stage, module: GraphModule, precision: Precision) -> ir.Model:
    with (
        exportable(),
        torch.no_grad(),
        contextlib.redirect_stdout(io.StringIO()),  # the exporter prints its progress
    ):
        return to_onnx(module, stage.example.inputs, OPSET[precision])


def _save(stage: Stage, model: ir.Model, root: Path, precision: Precision) -> Written:
    graph = save_model(root, f"{stage.name}{SUFFIX[precision]}", model)
    return graph, describe(list(model.graph.inputs)), describe(list(model.graph.outputs)), []


def _release(module: GraphModule) -> None:
    free((*module.parameters(), *module.buffers()))


def check_finite(part: str, module: GraphModule) -> None:
    """Refuse weights that are no numbers before hours are spent on them.

    Raises:
        ExportError: naming the first such weight.
    """
    for name, parameter in module.state_dict().items():
        if parameter.is_floating_point() and not bool(torch.isfinite(parameter).all()):
            broken = int((~torch.isfinite(parameter)).sum())
            raise ExportError(
                f"{part}: {name} holds {broken} values that are NaN or infinite, of {parameter.numel()}; "
                "export a checkpoint from before training diverged"
            )
