"""Whatever shapes what a runtime compiles is in its key: change any of it, and nothing that is stored is found."""

from __future__ import annotations

import importlib.metadata
import io
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import onnxruntime
import openvino
import pytest
import torch

from engines import aotinductor, processor
from engines.base import EngineOptions, runtime_class
from engines.bundle import Bundle, FileRef, Graph, Manifest, Precision, Size, load_bundle
from engines.cache import CompiledCache, shapes_of
from engines.tensorrt_build import Order
from engines.tensorrt_library import Library
from tests.engines.fake_cuda import FakeCuda
from tests.engines.fake_tensorrt import FakeTensorRT

EMOJI = Path(__file__).resolve().parents[2] / "cdm_serve" / "bundles" / "emoji"

FACETS = {"runtime", "model", "code", "version", "precision", "shapes", "device", "capability", "threads"}
ALWAYS_THE_SAME = {"onnxruntime": {"precision", "shapes", "device", "capability", "threads"}}
"""The int8 graph is no compiled model: it is for any machine."""

OTHER = "c" * 64
Key = dict[str, Any]


class Opened(Exception):
    """Raised in the place of compiling anything."""


@pytest.fixture(scope="module")
def bundle() -> Bundle:
    """The bundled model, as if it had a second precision and the model's own weights."""
    whole = load_bundle(EMOJI)
    components = {
        name: component.model_copy(
            update={"graphs": {"bfloat16": component.graphs["float32"], **component.graphs}}
        )
        for name, component in whole.manifest.components.items()
    }
    weights = (FileRef(file="model/a.safetensors", sha256="a" * 64, bytes=1),)
    return of(whole, components=components, model=weights)


def of(bundle: Bundle, **changes: Any) -> Bundle:
    return Bundle(bundle.root, bundle.manifest.model_copy(update=changes), bundle.sha256)


def key(runtime: str, bundle: Bundle, root: Path, **given: Any) -> Key:
    """What `runtime` looks for in the cache."""
    opened: list[Key] = []

    def record(_: Path | None, name: str, **fields: Any) -> CompiledCache:
        opened.append({"runtime": name, **fields})
        raise Opened

    precision = {"onnxruntime": "int8", "tensorrt-rtx": "bf16"}.get(runtime, "f32")
    asked = {"precision": precision, "threads": 1, "target": "8.9", "version": "1", **given}
    library = Library(runtime, FakeTensorRT(FakeCuda(), version=asked["version"]))
    order = Order(library, bundle, asked["precision"], asked["target"], 4)
    options = EngineOptions(runtime, asked["precision"], threads=asked["threads"], cache_dir=root)
    load = partial(runtime_class(runtime), bundle, options)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CompiledCache, "open", record)
        with pytest.raises(Opened):
            order.cache(root) if runtime == "tensorrt-rtx" else load()
    json.dumps(opened[0])
    return opened[0]


def other_weights(bundle: Bundle) -> Bundle:
    """External data alone is another."""
    components = dict(bundle.manifest.components)
    for name, component in components.items():
        graphs: dict[Precision, Graph] = {
            precision: graph.model_copy(update={"data": (FileRef(file="x", sha256=OTHER, bytes=1),)})
            for precision, graph in component.graphs.items()
        }
        components[name] = component.model_copy(update={"graphs": graphs})
    return of(bundle, components=components, model=(FileRef(file="m", sha256=OTHER, bytes=1),))


def other_sizes(bundle: Bundle) -> Bundle:
    return of(bundle, sizes=(*bundle.manifest.sizes, Size(width=80, height=48)))


def other_default(bundle: Bundle) -> Bundle:
    """What one shape is compiled for by itself."""
    sizes = (*bundle.manifest.sizes, Size(width=80, height=48))
    return of(bundle, sizes=sizes, default_size=sizes[-1])


def other_text(bundle: Bundle) -> Bundle:
    lengths = {name: length + 1 for name, length in bundle.manifest.text_lengths.items()}
    assert lengths
    return of(bundle, text_lengths=lengths)


BUNDLES: dict[str, Callable[[Bundle], Bundle]] = {
    "weights": other_weights, "sizes": other_sizes, "default size": other_default, "text": other_text,
}  # fmt: skip

Patch = tuple[Any, str, Any]
PATCHES: dict[str, dict[str, Patch]] = {
    "openvino": {
        "version": (openvino, "get_version", lambda: "2099.1"),
        "capability": (processor, "flags", lambda: frozenset({"amx_fp8"})),
    },
    "onnxruntime": {"version": (onnxruntime, "__version__", "99.1")},
    "aotinductor": {
        "version": (torch, "__version__", "99.1"),
        "capability": (processor, "flags", lambda: frozenset({"amx_fp8"})),
        "device": (processor, "name", lambda: "Another CPU"),
    },
    "tensorrt-rtx": {},
}
OPTIONS: dict[str, dict[str, dict[str, Any]]] = {
    "openvino": {"precision": {"precision": "bf16"}, "threads": {"threads": 2}},
    "onnxruntime": {},
    "aotinductor": {"precision": {"precision": "bf16"}, "threads": {"threads": 2}},
    "tensorrt-rtx": {
        "precision": {"precision": "f32"}, "device": {"target": "12.0"}, "version": {"version": "2"},
    },
}  # fmt: skip
RUNTIMES = list(PATCHES)


@pytest.fixture(autouse=True)
def threads() -> Any:
    """torch's, which aotinductor sets."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_key_is_the_same_for_the_same_and_another_for_any_change(
    bundle: Bundle, tmp_path: Path, runtime: str
) -> None:
    first = key(runtime, bundle, tmp_path)
    assert key(runtime, bundle, tmp_path) == first
    assert key(runtime, of(bundle, name="renamed", default_steps=2), tmp_path) == first
    found = {"nothing": first}
    for name, change in BUNDLES.items():
        if name == "weights" or runtime != "onnxruntime":
            found[name] = key(runtime, change(bundle), tmp_path)
    for name, options in OPTIONS[runtime].items():
        found[name] = key(runtime, bundle, tmp_path, **options)
    for name, (target, attribute, value) in PATCHES[runtime].items():
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(target, attribute, value)
            found[name] = key(runtime, bundle, tmp_path)
    texts = {name: json.dumps(fields, sort_keys=True) for name, fields in found.items()}
    same = {name for name, text in texts.items() if list(texts.values()).count(text) > 1}
    assert not same
    changing = FACETS - {"runtime", "model", "shapes", "code"} - ALWAYS_THE_SAME.get(runtime, set())
    if runtime == "tensorrt-rtx":  # a capability is what it builds for; threads are refused
        changing -= {"capability", "threads"}
    if runtime == "openvino":  # told by the plugin, which has one device here
        changing -= {"device"}
        assert first["device"] == openvino.Core().get_property("CPU", "FULL_DEVICE_NAME")
    assert changing <= set(found)


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_key_names_everything_for_whoever_reads_it(bundle: Bundle, tmp_path: Path, runtime: str) -> None:
    fields = key(runtime, bundle, tmp_path)
    absent = (
        {"capability", "threads"} if runtime == "tensorrt-rtx" else set()
    )  # `device` is the capability there
    assert set(fields) >= FACETS - absent
    assert fields["runtime"] == runtime


CODE = {
    "openvino": ["openvino.py"],
    "onnxruntime": ["quantize.py"],
    "aotinductor": ["aotinductor_build.py", "torch_graphs.py", "families/sd3.py", "kernels/sd3.py"],
    "tensorrt-rtx": ["tensorrt_build.py", "tensorrt_library.py", "tensorrt_report.py"],
}
"""Of each runtime, files of `engines` that decide what is compiled, or all of them."""


def test_every_runtime_that_keeps_something_is_held_to_its_code() -> None:
    assert set(CODE) == set(RUNTIMES)


@pytest.mark.parametrize(
    ("runtime", "file"), [(name, file) for name, files in CODE.items() for file in files]
)
def test_key_has_the_code_that_makes_what_is_compiled(
    bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, runtime: str, file: str
) -> None:
    """One changed byte in `file`, as the hash reads it."""
    path, read = Path(aotinductor.__file__).parent / file, Path.open
    assert path.is_file()

    def changed(self: Path, *args: Any, **kwargs: Any) -> Any:
        opened = read(self, *args, **kwargs)
        if self != path:
            return opened
        with opened:
            return io.BytesIO(opened.read() + b"#")

    aotinductor._code.cache_clear()
    before = key(runtime, bundle, tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", changed)
        aotinductor._code.cache_clear()
        after = key(runtime, bundle, tmp_path)
    aotinductor._code.cache_clear()
    assert {name for name in before if before[name] != after[name]} == {"code"}


@pytest.mark.parametrize("package", ["diffusers", "transformers", "triton"])
def test_aotinductors_key_has_the_packages_whose_classes_it_compiles(
    bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, package: str
) -> None:
    before = key("aotinductor", bundle, tmp_path)
    version = importlib.metadata.version
    monkeypatch.setattr(
        importlib.metadata, "version", lambda name: "99.1" if name == package else version(name)
    )
    after = key("aotinductor", bundle, tmp_path)
    assert {name for name in before if before[name] != after[name]} == {"packages"}
    assert f"{package} 99.1" in after["packages"]


def test_where_those_packages_are_not_installed_what_a_machine_that_has_them_made_last_is_found(
    bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = key("aotinductor", bundle, tmp_path)

    def absent(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", absent)
    assert key("aotinductor", bundle, tmp_path)["packages"] == [
        "diffusers None", "transformers None", "triton None",
    ]  # fmt: skip
    CompiledCache.open(tmp_path, **made)
    CompiledCache.open(
        tmp_path, **key("aotinductor", bundle, tmp_path / "elsewhere")
    )  # a start that found nothing
    other = CompiledCache.open(tmp_path, **{**made, "threads": 2, "packages": ["of another key"]})
    damaged = CompiledCache.open(tmp_path, **{**made, "packages": ["damaged"]})
    assert other.folder is not None
    assert damaged.folder is not None
    (damaged.folder / "key.json").write_text("[", encoding="utf-8")
    assert key("aotinductor", bundle, tmp_path) == made


def test_shapes_are_sizes_default_first_and_text(bundle: Bundle) -> None:
    manifest: Manifest = other_default(bundle).manifest
    found = shapes_of(manifest)
    assert found[0] == "80x48"
    assert [f"{name} {length}" for name, length in sorted(manifest.text_lengths.items())] == found[
        len(manifest.sizes) :
    ]
