"""One component → Triton's `ModelConfig`: names, tensors, batching, instances, warm-up.

    config = model_config(bundle.manifest, "denoiser", RepositorySettings())
    text_format.MessageToString(config)          # config.pbtxt

Triton counts dimensions without the batch, and has no tensor without dimensions: σ is `(batch,)` to the graph and
`(batch, 1)` to whoever calls.
"""

from __future__ import annotations

import hashlib
import re

from tritonclient.grpc import model_config_pb2 as pb

from engines.bundle import Component, DType, Manifest, Size, TensorSpec
from engines.errors import ExportError
from engines.triton_repository.settings import RepositorySettings

TYPES: dict[DType, int] = {
    "float32": pb.TYPE_FP32,
    "float16": pb.TYPE_FP16,
    "bfloat16": pb.TYPE_BF16,
    "int64": pb.TYPE_INT64,
    "int32": pb.TYPE_INT32,
    "uint8": pb.TYPE_UINT8,
}

PLATFORMS = {"onnxruntime": "onnxruntime_onnx", "tensorrt": "tensorrt_plan", "python": ""}
FILES = {"onnxruntime": "model.onnx", "tensorrt": "model.plan", "python": "model.py"}

COMPONENT, PRECISION, RUNTIME, THREADS = "cdm_component", "cdm_precision", "cdm_runtime", "cdm_threads"
"""Parameters of a model: what `model.py` and cdm-serve read there."""


def weights_parameter(version: int) -> str:
    """Name of the parameter that holds `weights_key` of a model's `version`."""
    return f"cdm_weights.{version}"


def weights_key(component: Component) -> str:
    """What tells one export of a component from another: a hash of its graphs and their weights, of all precisions."""
    text = "\n".join(f"{precision} {graph.sha256}" for precision, graph in sorted(component.graphs.items()))
    return hashlib.sha256(text.encode()).hexdigest()


def model_name(manifest: Manifest, component: str) -> str:
    """What the component is called in Triton; it is a folder's name there."""
    name = re.sub(r"[^A-Za-z0-9_.-]+", "-", manifest.name).strip(".-") or manifest.family
    return f"{name}-{component}"


def tensor_dims(spec: TensorSpec) -> list[int]:
    """Dimensions as Triton counts them: without the batch, −1 where they vary, at least one."""
    return [-1 if isinstance(dim, str) else dim for dim in spec.shape[1:]] or [1]


def known_dims(manifest: Manifest, size: Size) -> dict[str, int]:
    """Numbers for the names of dimensions, the batch's excepted, for pictures of `size`."""
    factor = manifest.latent.downscale
    return {
        **manifest.text_lengths,
        "height": size.height // factor,
        "width": size.width // factor,
        "image_height": size.height,
        "image_width": size.width,
    }


def model_config(manifest: Manifest, component: str, settings: RepositorySettings) -> pb.ModelConfig:
    """The configuration of `component`.

    Raises:
        ExportError: its warm-up needs the number of a dimension that the manifest does not tell.
    """
    part = manifest.components[component]
    config = pb.ModelConfig(
        name=model_name(manifest, component),
        backend=settings.backend,
        platform=PLATFORMS[settings.backend],
        default_model_filename=FILES[settings.backend],
        max_batch_size=settings.max_batch,
        input=[pb.ModelInput(name=name, **_tensor(spec)) for name, spec in part.inputs.items()],
        output=[pb.ModelOutput(name=name, **_tensor(spec)) for name, spec in part.outputs.items()],
    )
    config.version_policy.latest.num_versions = settings.keep_versions
    group = config.instance_group.add(count=settings.instances, gpus=settings.gpus)
    group.kind = group.KIND_GPU if settings.device == "gpu" else group.KIND_CPU
    if settings.dynamic_batching:
        config.dynamic_batching.preferred_batch_size.extend(settings.preferred_batches)
        config.dynamic_batching.max_queue_delay_microseconds = settings.queue_delay_us
    for name, value in _parameters(component, part, settings).items():
        config.parameters[name].string_value = value
    for batch in settings.warm_up:
        config.model_warmup.append(_warm_up(manifest, component, batch))
    return config


def _tensor(spec: TensorSpec) -> dict[str, object]:
    scalar = {"reshape": pb.ModelTensorReshape()} if len(spec.shape) == 1 else {}
    return {"data_type": TYPES[spec.dtype], "dims": tensor_dims(spec), **scalar}


def _parameters(component: str, part: Component, settings: RepositorySettings) -> dict[str, str]:
    parameters = {
        COMPONENT: component,
        PRECISION: settings.precision,
        weights_parameter(settings.version): weights_key(part),
    }
    if settings.backend == "python":
        parameters |= {RUNTIME: settings.runtime, THREADS: str(settings.threads)}
    elif settings.backend == "onnxruntime" and settings.threads:
        parameters["intra_op_thread_count"] = str(settings.threads)
    return parameters


def _warm_up(manifest: Manifest, component: str, batch: int) -> pb.ModelWarmup:
    """Zeros: they are in every vocabulary."""
    size = manifest.default_size
    known = known_dims(manifest, size)
    warm_up = pb.ModelWarmup(name=f"{size.width}x{size.height} batch {batch}", batch_size=batch, count=1)
    for name, spec in manifest.components[component].inputs.items():
        if unknown := [dim for dim in spec.shape[1:] if isinstance(dim, str) and dim not in known]:
            raise ExportError(
                f"{component} takes {name} with a dimension {unknown[0]!r}, for which the manifest has no number; "
                "leave the warm-up out"
            )
        sample = warm_up.inputs[name]
        sample.data_type, sample.zero_data = TYPES[spec.dtype], True
        sample.dims.extend([known[dim] if isinstance(dim, str) else dim for dim in spec.shape[1:]] or [1])
    return warm_up
