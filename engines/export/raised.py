"""A bfloat16 graph checked on a CPU: ONNX Runtime there has no bfloat16 arithmetic, so a copy computes in float32.

The copy has the very weights of the file, bfloat16, each cast once; every other bfloat16 becomes a float32. What it
answers must be what torch answers in float32 with the same rounded weights.
"""

from __future__ import annotations

from pathlib import Path

import onnx
import onnxruntime as ort
from onnx import TensorProto, numpy_helper

from engines.export.parity import open_session

LOW = TensorProto.BFLOAT16


def raise_graph(model: onnx.ModelProto) -> None:
    """Rewrite `model` in place; its external data is neither read nor changed."""
    graph = model.graph
    del graph.value_info[:]
    casts = []
    for tensor in graph.initializer:
        if tensor.data_type == LOW:
            name, tensor.name = tensor.name, f"{tensor.name}.bfloat16"
            casts.append(onnx.helper.make_node("Cast", [tensor.name], [name], to=TensorProto.FLOAT))
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.name in ("to", "dtype") and attribute.i == LOW:
                attribute.i = TensorProto.FLOAT
            elif attribute.type == onnx.AttributeProto.TENSOR and attribute.t.data_type == LOW:
                values = numpy_helper.to_array(attribute.t).astype("float32")
                attribute.t.CopyFrom(numpy_helper.from_array(values, attribute.t.name))
    nodes = list(graph.node)
    del graph.node[:]
    graph.node.extend([*casts, *nodes])


def raised_session(path: Path, data_bytes: int) -> ort.InferenceSession:
    """A session of the raised copy of the graph at `path`; the copy lies beside it only while it is opened."""
    model = onnx.load(path, load_external_data=False)
    raise_graph(model)
    copy = path.with_name(f"{path.name}.raised")
    onnx.save_model(model, str(copy))
    try:
        return open_session(copy, data_bytes)
    finally:
        copy.unlink()
