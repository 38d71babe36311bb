"""One component of a bundle in Triton's Python backend. This file is copied beside the model that it runs.

It needs numpy and onnxruntime in the environment of the server's Python, or cdm-serve for a runtime other than
onnxruntime. Tensors cross by DLPack both ways: with numpy 2, `Tensor(name, array)` of server 2.51 makes an empty
tensor and says nothing.
"""

from __future__ import annotations

import ctypes
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

Arrays = Mapping[str, Any]
Run = Callable[[Arrays], Arrays]

FOLDER = Path(__file__).resolve().parent

VISIBLE = "CUDA_VISIBLE_DEVICES"


class TritonPythonModel:
    """What the backend looks for by this name."""

    def initialize(self, args: Mapping[str, str]) -> None:
        """Load the component that `config.pbtxt` names."""
        # The server's own module, and numpy must be found before it is asked for.
        import triton_python_backend_utils as backend  # type: ignore[import-not-found, unused-ignore]

        self._backend = backend
        config = json.loads(args["model_config"])
        self._inputs = [tensor["name"] for tensor in config["input"]]
        parameters = {name: value["string_value"] for name, value in config["parameters"].items()}
        gpu = int(args["model_instance_device_id"]) if args["model_instance_kind"] == "GPU" else None
        if parameters["cdm_runtime"] == "onnxruntime":
            self._run = onnxruntime(FOLDER / "model.onnx", int(parameters["cdm_threads"]), gpu)
        else:
            self._run = cdm_serve(FOLDER / "bundle", parameters, int(config["max_batch_size"]), gpu)

    def execute(self, requests: list[Any]) -> list[Any]:
        """Run all `requests`, which the dynamic batcher has chosen to fit together, as one batch."""
        backend = self._backend
        try:
            given = [
                {
                    name: np.from_dlpack(backend.get_input_tensor_by_name(request, name))
                    for name in self._inputs
                }
                for request in requests
            ]
            outputs = self._run({name: _joined([each[name] for each in given]) for name in self._inputs})
        except Exception as error:  # whatever the runtime raises is the answer to these requests
            reason = backend.TritonError(f"{type(error).__name__}: {error}")
            return [backend.InferenceResponse(error=reason) for _ in requests]
        responses, start = [], 0
        for request, arrays in zip(requests, given, strict=True):
            stop = start + len(arrays[self._inputs[0]])
            tensors = [
                backend.Tensor.from_dlpack(name, _Lent(np.ascontiguousarray(array[start:stop])))
                for name, array in outputs.items()
                if name in request.requested_output_names()
            ]
            responses.append(backend.InferenceResponse(output_tensors=tensors))
            start = stop
        return responses


def onnxruntime(path: Path, threads: int, gpu: int | None) -> Run:
    """`path` in ONNX Runtime, on a CPU or on GPU number `gpu`.

    Raises:
        RuntimeError: a GPU was asked for, and this ONNX Runtime cannot use it.
    """
    import onnxruntime as ort

    settings = ort.SessionOptions()
    settings.intra_op_num_threads = threads
    settings.inter_op_num_threads = 1
    settings.log_severity_level = 3
    providers: list[Any] = ["CPUExecutionProvider"]
    if gpu is not None:
        providers.insert(0, ("CUDAExecutionProvider", {"device_id": gpu, "use_tf32": "0"}))
    session = ort.InferenceSession(str(path), settings, providers=providers)
    if (
        gpu is not None and "CUDAExecutionProvider" not in session.get_providers()
    ):  # it falls back and only logs
        raise RuntimeError(
            f"ONNX Runtime cannot use GPU {gpu}: it has {', '.join(session.get_providers())}; install onnxruntime-gpu "
            "and its CUDA in the server's Python, or export with --triton-device cpu"
        )
    names = [output.name for output in session.get_outputs()]
    return lambda inputs: dict(zip(names, session.run(names, dict(inputs)), strict=True))


def cdm_serve(bundle: Path, parameters: Mapping[str, str], max_batch: int, gpu: int | None) -> Run:
    """One component of `bundle` in a runtime of cdm-serve, on a CPU or on GPU number `gpu`.

    Raises:
        RuntimeError: that GPU cannot be chosen.
    """
    see_only(gpu)  # before the runtime is imported
    from engines.base import EngineOptions, GraphEngine, load_engine
    from engines.bundle import load_bundle

    options = EngineOptions(
        parameters["cdm_runtime"],
        parameters["cdm_precision"],
        threads=int(parameters["cdm_threads"]),
        max_batch=max_batch,
    )
    engine = load_engine(load_bundle(bundle), options)
    if not isinstance(engine, GraphEngine):
        raise TypeError(f"{parameters['cdm_runtime']} runs no graphs")
    component = parameters["cdm_component"]
    return lambda inputs: engine.run(component, inputs)


def see_only(gpu: int | None) -> None:
    """Show this process GPU number `gpu` of the server's alone, or none: runtimes of cdm-serve use the first they see.

    Every instance is a process of its own. Its CUDA reads the variable once, and nothing in it has called CUDA yet.

    Raises:
        RuntimeError: the server has no such GPU, or CUDA was in use here before.
    """
    if gpu is None:
        os.environ[VISIBLE] = ""
        return
    shown = os.environ.get(VISIBLE)  # what the server was started with: its numbers count these
    names = [str(gpu)] if shown is None else [name.strip() for name in shown.split(",")[gpu : gpu + 1]]
    if not names:
        raise RuntimeError(f"there is no GPU {gpu}: the server was started with {VISIBLE}={shown}")
    os.environ[VISIBLE] = names[0]
    seen = count_gpus()
    if seen is not None and seen != 1:
        raise RuntimeError(
            f"GPU {gpu} cannot be chosen: with {VISIBLE}={names[0]} this process sees {seen} GPUs, not 1; either there "
            "is no such GPU, or something in the server's Python uses CUDA as it starts, which must not be"
        )


def count_gpus() -> int | None:
    """How many GPUs CUDA shows this process; none known without its driver."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    count = ctypes.c_int(0)
    if driver.cuInit(0) or driver.cuDeviceGetCount(ctypes.byref(count)):
        return 0
    return count.value


def _joined(arrays: list[Any]) -> Any:
    return arrays[0] if len(arrays) == 1 else np.concatenate(arrays)


class _Lent:
    """An array whose DLPack capsule the server takes for good.

    The server renames a capsule that it has taken to "used_dlpack", where the standard says "used_dltensor"; numpy then
    prints an error when the capsule goes, though the array is freed as it should be. So the capsule does nothing then.
    """

    def __init__(self, array: Any) -> None:
        self._array = array

    def __dlpack__(self, **_: Any) -> Any:
        capsule = self._array.__dlpack__()
        forget = ctypes.pythonapi.PyCapsule_SetDestructor
        forget.argtypes, forget.restype = [ctypes.py_object, ctypes.c_void_p], ctypes.c_int
        forget(capsule, None)
        return capsule

    def __dlpack_device__(self) -> Any:
        return self._array.__dlpack_device__()
