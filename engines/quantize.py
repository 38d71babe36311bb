"""A float32 ONNX graph → the same with the weights of its matrix products in int8 (ONNX Runtime's dynamic kind).

quantize(bundle.path("denoiser"))     # the new graph's bytes

Needs onnx; what it makes does not.
"""

from __future__ import annotations

import logging
import tempfile
from pathlib import Path

import onnx
from onnx import TensorProto, numpy_helper
from onnxruntime.quantization import QuantType, quantize_dynamic

from engines.errors import RuntimeUnavailable

LIMIT_BYTES = 2**31 - 2**20
"""A graph in memory is one protobuf, which cannot be larger."""


def quantize(path: Path) -> bytes:
    """The quantized graph: per-channel signed 8-bit weights of MatMul and Gemm, all else as it was.

    Raises:
        RuntimeUnavailable: the result would be larger than a protobuf can be.
    """
    model = onnx.load(path)
    fold_casts(model)
    del model.graph.value_info[:]  # they disagree with the new types, which stops the quantizer
    if model.ByteSize() > LIMIT_BYTES:
        raise RuntimeUnavailable(
            f"precision='int8': {path.name} has {model.ByteSize() / 1e9:.1f} GB in float32, and int8 takes up to "
            f"{LIMIT_BYTES / 1e9:.1f} GB here; use f32, or bf16 on the openvino runtime"
        )
    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder) / "f32.onnx", Path(folder) / "int8.onnx"
        onnx.save_model(model, str(source))
        before = logging.root.manager.disable
        logging.disable(logging.WARNING)  # it advises a preparation that the exporter has already made
        try:
            quantize_dynamic(
                source,
                target,
                op_types_to_quantize=["MatMul", "Gemm"],
                per_channel=True,
                weight_type=QuantType.QInt8,
            )
        finally:
            logging.disable(before)
        return target.read_bytes()


def fold_casts(model: onnx.ModelProto) -> None:
    """Make the weights that are stored as float16 float32 ones: the quantizer sees only weights that are not cast."""
    stored = {tensor.name: tensor for tensor in model.graph.initializer}
    kept = []
    for node in model.graph.node:
        source = stored.get(node.input[0]) if node.op_type == "Cast" else None
        if source is None or source.data_type != TensorProto.FLOAT16:
            kept.append(node)
            continue
        array = numpy_helper.to_array(source).astype("float32")
        source.CopyFrom(numpy_helper.from_array(array, node.output[0]))
    del model.graph.node[:]
    model.graph.node.extend(kept)
