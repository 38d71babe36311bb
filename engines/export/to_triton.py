"""`cdm-export BUNDLE --to triton`: a bundle becomes a model repository for NVIDIA Triton Inference Server.

Without torch, as serving: the machine that has the bundle need not be the one that exported it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field, field_validator

from engines.base import RUNTIMES
from engines.bundle import MANIFEST, load_bundle
from engines.cli import CommandSettings
from engines.commands import importing
from engines.errors import ExportError
from engines.triton_repository.settings import Backend, RepositorySettings

STUDENT_INDEX = "model_index.json"
"""By which a student is told from a bundle (`engines/families/base.py` has it too, and needs torch)."""

NOT_IN_TRITON = ("triton", "triton-cuda", "fake")
"""Runtimes that run no graphs of a bundle themselves."""

Defaults = RepositorySettings


class TritonSettings(CommandSettings):
    """How Triton shall run a bundle: `RepositorySettings` as flags."""

    triton_backend: Backend = Field(Defaults.backend, description="what runs a component in Triton")
    triton_precision: Literal["f32", "bf16"] = Field(
        Defaults.precision, description="precision there; ONNX Runtime has no bf16 on a CPU"
    )
    triton_runtime: str = Field(
        Defaults.runtime,
        description="in the python backend: onnxruntime, or another runtime of cdm-serve, which it then needs",
    )
    triton_plans: list[str] = Field(
        [],
        description="for the tensorrt backend: the engine file of every component, COMPONENT=FILE, or the folder that "
        "cdm-bench tensorrt --plans has written",
    )
    triton_device: Literal["cpu", "gpu"] = Field(Defaults.device, description="where instances run")
    triton_gpus: list[int] = Field([], description="numbers of the GPUs to run on; empty: all")
    triton_instances: int = Field(
        Defaults.instances,
        ge=1,
        description="copies of each model that run at once, on each GPU or on the CPU",
    )
    triton_threads: int = Field(
        Defaults.threads, ge=0, description="threads of an instance on a CPU; 0: the runtime chooses"
    )
    triton_max_batch: int = Field(Defaults.max_batch, ge=1, description="pictures in one execution")
    triton_dynamic_batching: bool = Field(
        Defaults.dynamic_batching,
        description="let Triton join requests that wait; cdm-serve --invariant-batch needs it off",
    )
    triton_preferred_batches: list[int] = Field([], description="sizes at which it stops waiting for more")
    triton_queue_delay_us: int = Field(
        Defaults.queue_delay_us, ge=0, description="microseconds that it may wait for more requests"
    )
    triton_warm_up: list[int] = Field(
        list(RepositorySettings().warm_up),
        description="batch sizes run before a model is ready, at the default picture size; '[]': none",
    )
    triton_version: int = Field(Defaults.version, ge=1, description="number of the version that is written")
    triton_keep_versions: int = Field(
        Defaults.keep_versions, ge=1, description="how many versions are kept and served, this one included"
    )

    @field_validator("triton_plans")
    @classmethod
    def _are_plans(cls, value: list[str]) -> list[str]:
        read_plans(value)
        return value

    @field_validator("triton_runtime")
    @classmethod
    def _is_a_runtime(cls, value: str) -> str:
        if value not in RUNTIMES or value in NOT_IN_TRITON:
            known = ", ".join(name for name in RUNTIMES if name not in NOT_IN_TRITON)
            raise ValueError(f"no such runtime runs in Triton; there are {known}")
        return value

    def repository(self) -> RepositorySettings:
        """The same for the writer."""
        return RepositorySettings(
            backend=self.triton_backend,
            precision=self.triton_precision,
            runtime=self.triton_runtime,
            plans=read_plans(self.triton_plans),
            device=self.triton_device,
            gpus=tuple(self.triton_gpus),
            instances=self.triton_instances,
            threads=self.triton_threads,
            max_batch=self.triton_max_batch,
            dynamic_batching=self.triton_dynamic_batching,
            preferred_batches=tuple(self.triton_preferred_batches),
            queue_delay_us=self.triton_queue_delay_us,
            warm_up=tuple(self.triton_warm_up),
            version=self.triton_version,
            keep_versions=self.triton_keep_versions,
        )


def read_plans(given: list[str]) -> dict[str, Path]:
    """`denoiser=denoiser.plan` and others, by component; of a folder, all that it has.

    Raises:
        ValueError: one is no such pair, or names a component again.
    """
    plans: dict[str, Path] = {}
    for entry in given:
        component, equals, file = entry.partition("=")
        if equals and not (component and file):
            raise ValueError(f"{entry!r} is not COMPONENT=FILE, as denoiser=denoiser.plan")
        found = [(component, Path(file))] if equals else [(path.stem, path) for path in _plans_in(entry)]
        for name, path in found:
            if name in plans:
                raise ValueError(f"{name} has two files, {plans[name]} and {path}; name one")
            plans[name] = path
    return plans


def _plans_in(folder: str) -> list[Path]:
    return sorted(Path(folder).glob("*.plan"))


def export_to_triton(bundle: Path, out: Path, settings: TritonSettings) -> list[str]:
    """Write the models of `bundle` to the repository `out`; their names.

    Raises:
        UsageError: a package of the `triton` extra is not installed.
        BundleError: there is no bundle, or one of another version, or a file of it has changed.
        ExportError: it is a student, flags contradict each other, `out` holds something else or cannot be written.
    """
    with importing("cdm-export --to triton", "triton"):
        from engines.triton_repository.repository import write_repository

    if (bundle / STUDENT_INDEX).is_file() and not (bundle / MANIFEST).is_file():
        raise ExportError(
            f"{bundle} is a student, and --to triton takes a bundle; export one with cdm-export {bundle} --out BUNDLE "
            "first, and name that"
        )
    for entry in settings.triton_plans:
        if "=" not in entry and not _plans_in(entry):
            raise ExportError(
                f"--triton-plans names {entry}, which is neither COMPONENT=FILE nor a folder of COMPONENT.plan files; "
                "build them with cdm-bench tensorrt --plans"
            )
    loaded, repository = load_bundle(bundle), settings.repository()
    try:
        repository.check(loaded.manifest)
    except ExportError as error:
        raise ExportError(f"of the --triton flags, {error}") from error
    for component, plan in repository.plans.items():
        if not plan.is_file():
            raise ExportError(
                f"--triton-plans names {plan} for {component}, which is no file; build it first"
            )
    return write_repository(loaded, out, repository)
