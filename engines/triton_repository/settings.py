"""How Triton shall run a bundle's components: `RepositorySettings`, and which of them go together."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from engines.bundle import Manifest, Precision
from engines.errors import ExportError

Backend = Literal["onnxruntime", "tensorrt", "python"]

GRAPHS: dict[str, Precision] = {"f32": "float32", "bf16": "bfloat16"}
"""An engine's name of a precision → the bundle's."""

RUNS_ON: dict[str, Literal["cpu", "gpu"]] = {"openvino": "cpu", "tensorrt": "gpu", "tensorrt-rtx": "gpu"}
"""Runtimes of cdm-serve that run on nothing else."""


@dataclass(frozen=True)
class RepositorySettings:
    """What `config.pbtxt` says of every model.

    `queue_delay_us` is 0 because cdm-serve has put the batch together before it calls: whatever Triton waited on top
    would only be latency. Raise it where clients of your own call the models one picture at a time.

    Args:
        backend: what runs a component in Triton: ONNX Runtime, TensorRT (`plans`), or Python (`runtime`).
        precision: `f32` or `bf16`; ONNX Runtime has no bf16 on a CPU.
        runtime: in the Python backend, `onnxruntime` (needs numpy and onnxruntime there), or the name of any other of
            cdm-serve's runtimes (needs cdm-serve there; every component's process then holds the whole bundle).
        plans: TensorRT's engine file of every component; `cdm-bench tensorrt --plans` makes them.
        device: where instances run.
        gpus: their numbers; none: an instance group on every GPU.
        instances: copies of a model that run at once, on each GPU or on the CPU.
        threads: of every instance, on a CPU only; 0 lets the runtime choose.
        max_batch: pictures in one execution.
        dynamic_batching: whether Triton may join requests that wait.
        preferred_batches: sizes at which it stops waiting for more.
        warm_up: batch sizes that are run, at the default picture size, before a model is ready.
        version: number of what is written now.
        keep_versions: how many versions, this one included, are kept and served; others that `out` has are dropped.
    """

    backend: Backend = "onnxruntime"
    precision: Literal["f32", "bf16"] = "f32"
    runtime: str = "onnxruntime"
    plans: Mapping[str, Path] = field(default_factory=dict)
    device: Literal["cpu", "gpu"] = "cpu"
    gpus: tuple[int, ...] = ()
    instances: int = 1
    threads: int = 0
    max_batch: int = 8
    dynamic_batching: bool = True
    preferred_batches: tuple[int, ...] = ()
    queue_delay_us: int = 0
    warm_up: tuple[int, ...] = (1,)
    version: int = 1
    keep_versions: int = 1

    def check(self, manifest: Manifest) -> None:
        """Refuse settings that no server could load, or that would change nothing.

        Raises:
            ExportError: naming the first of them.
        """
        for problem in (*self._numbers(), *self._batching(), *self._backend(manifest)):
            raise ExportError(problem)

    def _numbers(self) -> list[str]:
        least = {
            "instances": 1,
            "threads": 0,
            "max_batch": 1,
            "queue_delay_us": 0,
            "version": 1,
            "keep_versions": 1,
        }
        found = [
            f"{name}={getattr(self, name)} is too small; {limit} or more is allowed"
            for name, limit in least.items()
            if getattr(self, name) < limit
        ]
        for name in ("preferred_batches", "warm_up"):
            found += [
                f"{name} has {size}, which is not a batch of 1 to max_batch={self.max_batch}; change it or max_batch"
                for size in getattr(self, name)
                if not 1 <= size <= self.max_batch
            ]
        return found

    def _batching(self) -> list[str]:
        if self.dynamic_batching:
            return []
        given = {"preferred_batches": self.preferred_batches, "queue_delay_us": self.queue_delay_us}
        return [
            f"{name}={value} means nothing without dynamic_batching; leave one of them out"
            for name, value in given.items()
            if value
        ]

    def _backend(self, manifest: Manifest) -> list[str]:
        found = [*self._device()]
        if self.backend != "python" and self.runtime != "onnxruntime":
            found.append(f"runtime={self.runtime!r} runs in the python backend, not in {self.backend}")
        onnxruntime = self.backend != "tensorrt" and self.runtime == "onnxruntime"
        if onnxruntime and self.precision == "bf16" and self.device == "cpu":
            found.append(
                "ONNX Runtime has no bf16 on a CPU; choose precision='f32', device='gpu', or another runtime in the "
                "python backend"
            )
        if self.backend == "tensorrt":
            if missing := [name for name in manifest.components if name not in self.plans]:
                found.append(
                    f"plans lacks {missing[0]}; the tensorrt backend needs an engine file of every component, which "
                    "cdm-bench tensorrt --plans DIR builds on the GPU that they shall run on"
                )
        elif self.plans:
            found.append(f"plans mean nothing to the {self.backend} backend; choose tensorrt")
        if unknown := [name for name in self.plans if name not in manifest.components]:
            found.append(f"plans names {unknown[0]!r}; components are {', '.join(manifest.components)}")
        return found

    def _device(self) -> list[str]:
        found = []
        if self.gpus and self.device == "cpu":
            found.append(f"gpus={list(self.gpus)} means nothing with device='cpu'; choose device='gpu'")
        if wrong := [gpu for gpu in self.gpus if gpu < 0]:
            found.append(f"gpus has {wrong[0]}; GPUs are numbered from 0")
        if self.backend == "tensorrt" and self.device == "cpu":
            found.append("TensorRT runs on GPUs; choose device='gpu'")
        only = RUNS_ON.get(self.runtime, self.device)
        if self.backend == "python" and self.device != only:
            found.append(f"runtime={self.runtime!r} runs on a {only.upper()} only; choose device={only!r}")
        if self.threads and self.device == "gpu":
            found.append(
                f"threads={self.threads} means nothing with device='gpu', where the work is the GPU's; leave it out"
            )
        return found
