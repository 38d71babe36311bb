"""A torch module → an ONNX file with symbolic shapes, written weight by weight: memory holds the model once.

model = to_onnx(module, example, opset=OPSET["float32"])
store_weights_as_float16(model)
graph = save_model(root, "denoiser", model)
"""

from __future__ import annotations

import inspect
import logging
import warnings
from pathlib import Path
from typing import Any

import onnx_ir as ir
import torch
from onnx_ir.tensor_adapters import TorchTensor
from onnxscript import optimizer
from torch import Tensor, nn

from engines.bundle import DType, Graph, Precision, TensorSpec, file_ref
from engines.errors import ExportError
from engines.export.attention import TRANSLATIONS

OPSET: dict[Precision, int] = {"float32": 20, "bfloat16": 23}
"""20 is the newest that every CPU runtime here runs in float32 without decomposing what it just composed; 23 has
Attention and RMSNormalization as one node each, which NVIDIA's parsers want (24 decomposes the norm again)."""

SINGLE_FILE_BYTES = 256_000_000
"""Above this the weights go to a file of their own: protobuf cannot hold 2 GB, and copies what it holds."""

_DTYPES: dict[ir.DataType, DType] = {
    ir.DataType.FLOAT: "float32",
    ir.DataType.INT64: "int64",
    ir.DataType.UINT8: "uint8",
}


class GraphModule(nn.Module):
    """A module that names its inputs and outputs, in order, and their dimensions that vary.

    `forward` takes tensors in the order of `inputs` and gives a tuple in the order of `outputs`.
    """

    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    axes: dict[str, dict[int, str]]
    """Tensor → dimension → name; a dimension that is not named is fixed."""
    weights: nn.Module
    """What holds the weights."""


def to_onnx(module: GraphModule, example: dict[str, Tensor], opset: int) -> ir.Model:
    """Trace `module` on `example` (batch ≥ 2, or the batch would become a constant 1) and return the ONNX model.

    Its weights are the module's own memory: do not change or free them before it is saved.

    Raises:
        ExportError: the exporter cannot express the module.
    """
    # `forward(*args)` has one parameter for torch.export: its shapes are one tuple.
    positional = [
        dict.fromkeys(module.axes.get(name, {}), torch.export.Dim.DYNAMIC) for name in module.inputs
    ]
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)  # it warns that torchvision, which nothing here uses, is not installed
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the exporter's own deprecations; parity is checked, not trusted
            program = torch.onnx.export(
                module,
                tuple(example[name].contiguous() for name in module.inputs),  # strides cannot be traced
                dynamo=True,
                opset_version=opset,
                dynamic_shapes=_shapes(module, positional),
                input_names=list(module.inputs),
                output_names=list(module.outputs),
                custom_translation_table=TRANSLATIONS if opset == OPSET["float32"] else None,
                external_data=False,
                verbose=False,
                optimize=False,  # it would copy every weight that a product takes transposed
            )
            assert program is not None
            model = program.model
            assert isinstance(model, ir.Model)
            optimizer.optimize_ir(model, should_fold=_fold_small)
    except Exception as error:  # the exporter raises its own, torch.export's and plain ones
        raise ExportError(f"{type(module).__name__} cannot be exported: {_reason(error)}") from error
    finally:
        logger.setLevel(level)
    _fold_transposes(model)
    _anonymise(model)
    for value in (*model.graph.inputs, *model.graph.outputs):
        for index, name in module.axes.get(value.name or "", {}).items():
            assert value.shape is not None
            value.shape[index] = name
    return model


def _fold_small(node: ir.Node) -> bool | None:
    """Leave transposed weights to `_fold_transposes`; None: the optimizer's own rules."""
    return False if _transposed_weight(node) else None


def _transposed_weight(node: ir.Node) -> bool:
    value = node.inputs[0] if node.op_type == "Transpose" and node.domain == "" else None
    return value is not None and value.is_initializer() and value.const_value is not None


def _fold_transposes(model: ir.Model) -> None:
    """Make every transposed weight a weight of its own, whose values are copied when they are written, not now."""
    graph = model.graph
    for node in list(graph):
        if not _transposed_weight(node):
            continue
        source, result = node.inputs[0], node.outputs[0]
        assert source is not None
        assert source.name is not None
        tensor = source.const_value
        assert tensor is not None
        order = node.attributes.get_ints("perm", tuple(reversed(range(len(tensor.shape)))))
        name = f"{source.name}.transposed_{'_'.join(map(str, order))}"
        if name not in graph.initializers:
            folded = _permuted(tensor, tuple(order), name)
            graph.register_initializer(
                ir.Value(
                    name=name,
                    shape=ir.Shape(folded.shape.numpy()),
                    type=ir.TensorType(folded.dtype),
                    const_value=folded,
                )
            )
        result.replace_all_uses_with(graph.initializers[name])
        graph.remove(node, safe=True)
        if not source.uses():
            del graph.initializers[source.name]


def _permuted(tensor: ir.TensorProtocol, order: tuple[int, ...], name: str) -> ir.TensorProtocol:
    """A view, whose values are put in order when they are written."""
    raw = getattr(tensor, "raw", None)
    if isinstance(raw, Tensor):
        return TorchTensor(raw.detach().permute(order), name=name)
    return ir.Tensor(tensor.numpy().transpose(order), name=name)


def _reason(error: BaseException) -> str:
    """The line that says what could not be exported: the exporter wraps the cause in advice of its own."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__


def _shapes(module: nn.Module, positional: list[dict[int, Any]]) -> tuple[Any, ...]:
    parameters = inspect.signature(module.forward).parameters.values()
    plain = sum(parameter.kind is not parameter.VAR_POSITIONAL for parameter in parameters)
    rest = tuple(positional[plain:])
    return (*positional[:plain], rest) if rest else tuple(positional)


def _anonymise(model: ir.Model) -> None:
    """Drop stack traces and doc strings: they name files of the machine that exported."""
    graphs: list[ir.Graph | ir.Function] = [model.graph, *model.functions.values()]
    model.metadata_props.clear()
    model.doc_string = None
    for graph in graphs:
        graph.metadata_props.clear()
        graph.doc_string = None
        for node in graph.all_nodes():
            node.metadata_props.clear()
            node.doc_string = None
            for value in node.outputs:
                value.metadata_props.clear()
                value.doc_string = None
        for value in graph.inputs:
            value.metadata_props.clear()
            value.doc_string = None
    for value in model.graph.initializers.values():
        value.metadata_props.clear()
        value.doc_string = None


def round_to_float16_(module: nn.Module) -> None:
    """Round every weight matrix (parameters and tables of two or more dimensions) to float16 values, kept as float32.

    Biases and norms stay exact: they are a thousandth of the bytes.

    Raises:
        ExportError: a weight is not finite, or too large for float16.
    """
    for name, parameter in [*module.named_parameters(), *module.named_buffers()]:
        if parameter.ndim < 2 or not parameter.is_floating_point():
            continue
        rounded = parameter.data.to(torch.float16)
        if not bool(torch.isfinite(rounded).all()):
            largest = float(parameter.data.abs().max())
            raise ExportError(
                f"{name} holds |w| = {largest:g}; stored weights must be finite and below 65504"
            )
        parameter.data.copy_(rounded)


def store_weights_as_float16(model: ir.Model) -> None:
    """Store each float32 matrix that float16 holds exactly as float16, with a Cast back: half the file, same model."""
    graph = model.graph
    first = next(iter(graph))
    for value in list(graph.initializers.values()):
        tensor, name = value.const_value, value.name
        assert tensor is not None
        assert name is not None
        if tensor.dtype != ir.DataType.FLOAT or len(tensor.shape) < 2 or not _is_float16(tensor):
            continue
        half = ir.Value(
            name=f"{name}.float16",
            shape=ir.Shape(tensor.shape.numpy()),
            type=ir.TensorType(ir.DataType.FLOAT16),
            const_value=_as_float16(tensor, f"{name}.float16"),
        )
        cast = ir.node("Cast", [half], {"to": ir.DataType.FLOAT}, name=f"{name}.cast")
        value.replace_all_uses_with(cast.outputs[0])
        del graph.initializers[name]
        cast.outputs[0].name = name
        cast.outputs[0].shape, cast.outputs[0].type = value.shape, value.type
        graph.register_initializer(half)
        graph.insert_before(first, cast)


def _is_float16(tensor: ir.TensorProtocol) -> bool:
    values = _torch(tensor)
    return torch.equal(values.to(torch.float16).to(torch.float32), values)


def _as_float16(tensor: ir.TensorProtocol, name: str) -> ir.LazyTensor:
    """The rounded tensor, made when it is written and forgotten then."""

    def halve() -> ir.TensorProtocol:
        return ir.Tensor(_torch(tensor).to(torch.float16).numpy(), name=name)

    return ir.LazyTensor(halve, dtype=ir.DataType.FLOAT16, shape=ir.Shape(tensor.shape.numpy()), name=name)


def _torch(tensor: ir.TensorProtocol) -> Tensor:
    raw = getattr(tensor, "raw", None)
    return raw.detach() if isinstance(raw, Tensor) else torch.tensor(tensor.numpy())


def save_model(root: Path, name: str, model: ir.Model, limit: int = SINGLE_FILE_BYTES) -> Graph:
    """Write `name.onnx`, with its weights beside it in `name.onnx.data` where they are above `limit` bytes.

    Raises:
        ExportError: the disk is full, or cannot be written.
    """
    path, data = root / f"{name}.onnx", root / f"{name}.onnx.data"
    tensors = [value.const_value for value in model.graph.initializers.values()]
    external = sum(tensor.nbytes for tensor in tensors if tensor is not None) > limit
    try:
        ir.save(model, path, external_data=data.name if external else None, size_threshold_bytes=1024)
        return Graph(
            file=file_ref(root, path),
            data=(file_ref(root, data),) if external else (),
            opset=model.opset_imports[""],
        )
    except OSError as error:
        raise ExportError(f"{path} cannot be written: {error.strerror or error}") from error


def describe(values: list[ir.Value]) -> dict[str, TensorSpec]:
    """The manifest's entries for a graph's inputs or outputs."""
    specs = {}
    for value in values:
        assert value.name is not None
        assert value.dtype is not None
        assert value.shape is not None
        shape = tuple(dim if isinstance(dim, int) else str(dim.value) for dim in value.shape)
        specs[value.name] = TensorSpec(dtype=_DTYPES[value.dtype], shape=shape)
    return specs
