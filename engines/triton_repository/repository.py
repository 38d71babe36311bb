"""Bundle → folder for `tritonserver --model-repository`, whole or not there.

    write_repository(load_bundle(Path("bundles/emoji")), Path("triton/emoji"), RepositorySettings(backend="python"))

    triton/emoji/emoji-denoiser/config.pbtxt
                                1/model.onnx              # beside its external weights; or model.plan; or model.py
    triton/emoji/emoji-decoder/…

A repository holds one bundle's models and nothing else, because it is replaced as a whole; a server takes several.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2 as pb

from engines.bundle import MANIFEST, Bundle, file_refs
from engines.errors import BundleError, ExportError
from engines.files import replace_folder
from engines.triton_repository.config import (
    COMPONENT,
    FILES,
    PRECISION,
    RUNTIME,
    model_config,
    weights_parameter,
)
from engines.triton_repository.settings import GRAPHS, RepositorySettings

CONFIG = "config.pbtxt"
BUNDLE = "bundle"
"""Folder of the whole bundle in a version folder, for `model.py` to load with a runtime of cdm-serve."""

LINKED = (".onnx", ".plan", ".engine")


def write_repository(bundle: Bundle, out: Path, settings: RepositorySettings) -> list[str]:
    """Write the models of `bundle` to `out`, replacing a repository that was written before; their names.

    Graphs and plans are hard links where `out` is on the bundle's file system.

    Raises:
        ExportError: settings that contradict each other, `out` holds something else or a version that cannot be kept,
            or it cannot be written. `out` is then as it was before.
    """
    settings.check(bundle.manifest)
    _check_is_ours(out)
    configs = {name: model_config(bundle.manifest, name, settings) for name in bundle.manifest.components}
    for config in configs.values():
        _check_versions(out / config.name, config, settings)
    staging: Path | None = None
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
        staging.chmod(0o755)  # mkdtemp's 0700 would hide the models from a server run by another user
        first = staging / next(iter(configs.values())).name / str(settings.version) / BUNDLE
        for component, config in configs.items():
            folder = staging / config.name
            _keep_versions(out / config.name, folder, config, settings)
            _write_version(bundle, component, folder / str(settings.version), settings, first)
            text = text_format.MessageToString(config, as_utf8=True)
            (folder / CONFIG).write_text(text, encoding="utf-8")
        replace_folder(staging, out)
    except OSError as error:
        raise ExportError(f"{out} cannot be written: {error.strerror or error}") from error
    except BundleError as error:
        raise ExportError(str(error)) from error
    finally:
        if staging is not None:
            shutil.rmtree(staging, ignore_errors=True)
    return [config.name for config in configs.values()]


def _write_version(
    bundle: Bundle, component: str, folder: Path, settings: RepositorySettings, first: Path
) -> None:
    """`first` is where the first model has the whole bundle, if they have it; the others' are links to it."""
    folder.mkdir(parents=True)
    if settings.backend == "tensorrt":
        _place(settings.plans[component], folder / FILES["tensorrt"])
        return
    if settings.backend == "python":
        shutil.copy(Path(__file__).with_name("model.py"), folder / FILES["python"])
    if settings.runtime != "onnxruntime":
        files = [MANIFEST, *(ref.file for ref in file_refs(bundle.manifest))]
        for file in dict.fromkeys(files):  # tokenizers may share one
            source = first / file if (first / file).exists() else bundle.root / file
            _place(source, folder / BUNDLE / file, link=source != bundle.root / file)
        return
    precision = GRAPHS[settings.precision]
    graph = bundle.path(component, precision)
    _place(graph, folder / FILES["onnxruntime"])
    for ref in bundle.manifest.components[component].graphs[precision].data:
        path = bundle.root / ref.file
        _place(path, folder / path.relative_to(graph.parent))  # where the graph looks for it


def _place(source: Path, target: Path, link: bool = False) -> None:
    """A hard link if it may be one (or `link` says so), else a copy.

    External weights are copied: of which there is a second link, the onnx package refuses to read, in the bundle too.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    if link or source.suffix in LINKED:
        try:
            os.link(source.resolve(), target)
            return
        except OSError:  # another file system, or one without links
            pass
    shutil.copy(source, target)


def _check_is_ours(out: Path) -> None:
    """Refuse to replace what another hand has made."""
    if not out.exists():
        return
    entries = sorted(out.iterdir()) if out.is_dir() else [out]
    if other := [path for path in entries if COMPONENT not in _read_config(path).parameters]:
        raise ExportError(
            f"{out} holds {other[0].name}, which cdm-export did not write there; give another --out (a server takes "
            "several --model-repository), or remove it first"
        )


def _read_config(folder: Path) -> pb.ModelConfig:
    """A model's configuration; an empty one where there is none that can be read."""
    try:
        config: pb.ModelConfig = text_format.Parse(
            (folder / CONFIG).read_text(encoding="utf-8"), pb.ModelConfig(), allow_unknown_field=True
        )
    except (OSError, ValueError, text_format.ParseError):
        return pb.ModelConfig()
    return config


def _kept(before: Path, settings: RepositorySettings) -> list[int]:
    """Numbers of the newest other versions of a model, as many as shall stay."""
    if settings.keep_versions == 1 or not before.is_dir():
        return []
    numbers = [int(path.name) for path in before.iterdir() if path.name.isdigit()]
    return sorted(number for number in numbers if number != settings.version)[-(settings.keep_versions - 1) :]


def _check_versions(before: Path, config: pb.ModelConfig, settings: RepositorySettings) -> None:
    """Refuse to keep versions that cannot be loaded with the new `config`, which is one for all of a model's."""
    if not (numbers := _kept(before, settings)):
        return
    old = _read_config(before)
    for (what, was), now in zip(_shared(old).items(), _shared(config).values(), strict=True):
        if was != now:
            raise ExportError(
                f"version {numbers[-1]} in {before} was written for {what} {was}, and the one config.pbtxt of all "
                f"versions would say {now}; use --triton-keep-versions 1, which drops it, or another --out"
            )
    if config.backend == "tensorrt" and config.max_batch_size > old.max_batch_size:
        raise ExportError(
            f"version {numbers[-1]} in {before} has a plan for batches of up to {old.max_batch_size}, and the one "
            f"config.pbtxt of all versions would say {config.max_batch_size}; use --triton-keep-versions 1, which "
            f"drops it, or --triton-max-batch {old.max_batch_size}"
        )


def _shared(config: pb.ModelConfig) -> dict[str, str]:
    """What every version of a model must agree on."""

    def parameter(name: str) -> str:
        return str(config.parameters[name].string_value) if name in config.parameters else "none"

    def tensors(given: Iterable[Any]) -> str:
        return ", ".join(
            f"{each.name} {pb.DataType.Name(each.data_type).removeprefix('TYPE_')}{list(each.dims)}"
            + (f" as {list(each.reshape.shape)}" if each.HasField("reshape") else "")
            for each in sorted(given, key=lambda each: str(each.name))
        )

    return {
        "backend": config.backend,
        "runtime": parameter(RUNTIME),
        "precision": parameter(PRECISION),
        "inputs": tensors(config.input),
        "outputs": tensors(config.output),
    }


def _keep_versions(before: Path, folder: Path, config: pb.ModelConfig, settings: RepositorySettings) -> None:
    """Take the newest other versions of a model over, with the hashes of their weights."""
    old = _read_config(before)
    for number in _kept(before, settings):
        key = weights_parameter(number)
        config.parameters[key].string_value = old.parameters[key].string_value
        for path in sorted((before / str(number)).rglob("*")):
            if path.is_file():
                _place(path, folder / str(number) / path.relative_to(before / str(number)))
