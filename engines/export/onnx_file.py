"""A torch module → one ONNX file with dynamic batch, float32 compute and float16-stored weights."""

from __future__ import annotations

import inspect
import logging
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import onnx
import torch
from onnx import TensorProto, numpy_helper
from torch import Tensor, nn

from engines.bundle import Component, DType, Parity, TensorSpec, file_ref
from engines.errors import ExportError

OPSET = 20
"""The newest opset that every CPU runtime here runs in float32 without decomposing what it just composed."""

SINGLE_FILE_BYTES = 1_500_000_000
"""Above this the weights go to a file of their own: protobuf cannot hold 2 GB."""

_DTYPES: dict[int, DType] = {
    TensorProto.FLOAT: "float32",
    TensorProto.FLOAT16: "float16",
    TensorProto.INT64: "int64",
    TensorProto.UINT8: "uint8",
}


class Graph(Protocol):
    """A module that names its inputs and outputs, in order."""

    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


@dataclass(frozen=True)
class Axes:
    """Which dimensions vary: always the batch, and the latent's sides if the bundle makes several sizes."""

    spatial: bool

    def names(self, tensor: str) -> dict[int, str]:
        """Dimension index → name, for an input or output called `tensor`."""
        if not self.spatial or tensor not in ("x", "x_next", "x0", "image"):
            return {0: "batch"}
        if tensor == "image":
            return {0: "batch", 1: "image_height", 2: "image_width"}
        return {0: "batch", 2: "height", 3: "width"}


def to_onnx(module: nn.Module, graph: Graph, example: dict[str, Tensor], axes: Axes) -> onnx.ModelProto:
    """Trace `module` on `example` (batch ≥ 2, or the batch would become a constant 1) and return the ONNX model.

    Raises:
        ExportError: the exporter cannot express the module.
    """
    # `forward(*args)` has one parameter for torch.export: its shapes are one tuple.
    positional = [dict.fromkeys(axes.names(name), torch.export.Dim.DYNAMIC) for name in graph.inputs]
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)  # it warns that torchvision, which nothing here uses, is not installed
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the exporter's own deprecations; parity is checked, not trusted
            program = torch.onnx.export(
                module,
                tuple(example[name] for name in graph.inputs),
                dynamo=True,
                opset_version=OPSET,
                dynamic_shapes=_shapes(module, positional),
                input_names=list(graph.inputs),
                output_names=list(graph.outputs),
                external_data=False,
                verbose=False,
            )
    except Exception as error:  # the exporter raises its own, torch.export's and plain ones
        raise ExportError(
            f"{type(module).__name__} cannot be exported: {str(error).splitlines()[0]}"
        ) from error
    finally:
        logger.setLevel(level)
    assert program is not None
    model = program.model_proto
    _anonymise(model)
    for value in [*model.graph.input, *model.graph.output]:
        for index, name in axes.names(value.name).items():
            value.type.tensor_type.shape.dim[index].dim_param = name
    return model


def _shapes(module: nn.Module, positional: list[dict[int, Any]]) -> tuple[Any, ...]:
    parameters = inspect.signature(module.forward).parameters.values()
    plain = sum(parameter.kind is not parameter.VAR_POSITIONAL for parameter in parameters)
    rest = tuple(positional[plain:])
    return (*positional[:plain], rest) if rest else tuple(positional)


def _anonymise(model: onnx.ModelProto) -> None:
    """Drop stack traces and doc strings: they name files of the machine that exported."""
    for thing in [model, model.graph, *model.graph.node, *model.graph.value_info, *model.functions]:
        del thing.metadata_props[:]
        thing.doc_string = ""
    for tensor in [*model.graph.input, *model.graph.output, *model.graph.initializer]:
        del tensor.metadata_props[:]
        tensor.doc_string = ""


def round_to_float16_(modules: list[nn.Module]) -> None:
    """Round every weight matrix (parameters and tables of two or more dimensions) to float16 values, kept as float32.

    Biases and norms stay exact: they are a thousandth of the bytes.

    Raises:
        ExportError: a weight is not finite, or too large for float16.
    """
    for module in modules:
        for name, parameter in [*module.named_parameters(), *module.named_buffers()]:
            if parameter.ndim < 2 or not parameter.is_floating_point():
                continue
            rounded = parameter.data.to(torch.float16).to(torch.float32)
            if not bool(torch.isfinite(rounded).all()):
                largest = float(parameter.data.abs().max())
                raise ExportError(
                    f"{name} holds |w| = {largest:g}; stored weights must be finite and below 65504"
                )
            parameter.data.copy_(rounded)


def store_weights_as_float16(model: onnx.ModelProto) -> None:
    """Store each float32 matrix that float16 holds exactly as float16, with a Cast back: half the file, same model."""
    casts = []
    for tensor in model.graph.initializer:
        if tensor.data_type != TensorProto.FLOAT or len(tensor.dims) < 2:
            continue
        array = numpy_helper.to_array(tensor)
        with np.errstate(over="ignore"):
            half = array.astype(np.float16)
        if not np.array_equal(half.astype(np.float32), array):
            continue
        name = tensor.name
        tensor.CopyFrom(numpy_helper.from_array(half, f"{name}.float16"))
        casts.append(
            onnx.helper.make_node("Cast", [tensor.name], [name], name=f"{name}.cast", to=TensorProto.FLOAT)
        )
    nodes = list(model.graph.node)
    del model.graph.node[:]
    model.graph.node.extend([*casts, *nodes])


def save_model(root: Path, name: str, model: onnx.ModelProto, limit: int = SINGLE_FILE_BYTES) -> list[Path]:
    """Write `name.onnx`, with its weights beside it in `name.onnx.data` above `limit` bytes; the graph's path first."""
    path, data = root / f"{name}.onnx", root / f"{name}.onnx.data"
    external = model.ByteSize() > limit
    onnx.save_model(model, str(path), save_as_external_data=external, location=data.name, size_threshold=1024)
    return [path, data] if external else [path]


def describe(root: Path, files: list[Path], model: onnx.ModelProto, parity: list[Parity]) -> Component:
    """The manifest's entry for a saved model."""
    graph, *data = [file_ref(root, path) for path in files]
    return Component(
        graph=graph,
        data=tuple(data),
        inputs={value.name: _spec(value) for value in model.graph.input},
        outputs={value.name: _spec(value) for value in model.graph.output},
        opset=next(entry.version for entry in model.opset_import if entry.domain == ""),
        parity=tuple(parity),
    )


def _spec(value: onnx.ValueInfoProto) -> TensorSpec:
    tensor = value.type.tensor_type
    shape = tuple(dim.dim_param if dim.HasField("dim_param") else dim.dim_value for dim in tensor.shape.dim)
    return TensorSpec(dtype=_DTYPES[tensor.elem_type], shape=shape)
