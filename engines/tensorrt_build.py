"""ONNX → TensorRT engines.

TensorRT-RTX builds for a named compute capability, and needs no GPU to do it; what it leaves open (kernels for exact
shapes) the device compiles at run time. TensorRT times kernels on the very GPU it builds for.

    reports = build_engines(load_bundle(Path("bundles/emoji")), capability="8.9", cache_dir=Path("engines-cache"))

A server with this `--cache-dir`, and the same `--max-batch`, finds these engines on any GPU of that capability.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from engines.bundle import Bundle, Manifest, Precision
from engines.cache import CompiledCache, code_hash, graph_hashes
from engines.errors import ExportError, RuntimeUnavailable
from engines.tensorrt_library import RTX, Library, first_line, open_library
from engines.tensorrt_report import Attention, Report, attentions, read_log

log = logging.getLogger("engines.tensorrt")

PRECISIONS: dict[str, Precision] = {"bf16": "bfloat16", "f32": "float32"}
"""A precision is a graph: TensorRT 11 and TensorRT-RTX take every type from it, and have no flag to lower one."""

BFLOAT16_FROM = (8, 0)
"""The compute capability from which there is bfloat16; TensorRT-RTX refuses it for 7.5."""

DECODED_PIXELS = 1 << 20
"""Of all pictures of one decoder call. The scratch memory of SD3's autoencoder in bfloat16 (TensorRT-RTX 1.7.1) is
344 MB for one picture of 512×512, 1.6 GB for four, 1.4 GB for one of 1024×1024, 6.5 GB for four: most of a server's
memory, and a large picture keeps a GPU busy by itself."""

SOURCES = ("tensorrt_build.py", "tensorrt_library.py", "tensorrt_report.py")
"""What decides what an engine is, and what is stored beside it of how it was built: in the cache's key."""

Shape = tuple[int, ...]
Shapes = dict[str, tuple[Shape, Shape, Shape]]
"""Input → its smallest, usual and largest shape."""

Engine = TypeVar("Engine")

_building = threading.Lock()


@dataclass(frozen=True)
class Order:
    """What engines are to be built of, and for what.

    `target` is the compute capability; TensorRT, which builds for the GPU at hand, is given that one's name as well.
    `workspace` (bytes) bounds the scratch memory that an engine may need; None leaves it to TensorRT. With
    `whole_batches` the decoder takes `max_batch` pictures at once like all others, whatever their size.
    """

    library: Library
    bundle: Bundle
    precision: str
    target: str
    max_batch: int
    workspace: int | None = None
    whole_batches: bool = False

    @property
    def graphs(self) -> Precision:
        """Which of the bundle's graphs."""
        return PRECISIONS[self.precision]

    def limit(self, component: str) -> int:
        """The most rows that one run of `component` takes."""
        if component != "decoder" or self.whole_batches:
            return self.max_batch
        pixels = max(size.width * size.height for size in self.bundle.manifest.sizes)
        return max(1, min(self.max_batch, DECODED_PIXELS // pixels))

    def shapes(self, component: str) -> Shapes:
        """The optimization profile: 1 picture to `limit`, of all the bundle's sizes; text has one length."""
        manifest = self.bundle.manifest
        factor, limit, usual = manifest.latent.downscale, self.limit(component), manifest.default_size
        heights = [size.height // factor for size in manifest.sizes]
        widths = [size.width // factor for size in manifest.sizes]
        named = {name: (length, length, length) for name, length in manifest.text_lengths.items()} | {
            "batch": (1, (limit + 1) // 2, limit),
            "height": (min(heights), usual.height // factor, max(heights)),
            "width": (min(widths), usual.width // factor, max(widths)),
        }
        result: Shapes = {}
        for name, spec in manifest.components[component].inputs.items():
            dims = [named[dim] if isinstance(dim, str) else (dim, dim, dim) for dim in spec.shape]
            smallest, middle, largest = (tuple(dim[level] for dim in dims) for level in range(3))
            result[name] = smallest, middle, largest
        return result

    def cache(self, root: Path | None, **key: str | int) -> CompiledCache:
        """What was compiled by exactly this order, whatever its workspace; `key` narrows it."""
        manifest = self.bundle.manifest
        return CompiledCache.open(
            root,
            self.library.runtime,
            model=graph_hashes(manifest, self.graphs),
            code=code_hash(*(str(Path(__file__).with_name(name)) for name in SOURCES)),
            version=self.library.version,
            device=self.target,
            precision=self.precision,
            shapes=[f"{component} {self.shapes(component)}" for component in manifest.components],
            settings=list(self.library.flags),
            **key,
        )


def usable_precisions(manifest: Manifest, capability: str) -> tuple[str, ...]:
    """Precisions that the bundle has graphs in and the device computes in, the default first."""
    return tuple(name for name in _computed(capability) if PRECISIONS[name] in manifest.precisions)


def choose_precision(asked: str, manifest: Manifest, capability: str) -> str:
    """`bf16` or `f32`: what was asked for, or the default.

    Raises:
        RuntimeUnavailable: the bundle or the device has no such precision.
    """
    usable = usable_precisions(manifest, capability)
    if asked == "auto" and usable:
        return usable[0]
    if asked in usable:
        return asked
    raise RuntimeUnavailable(
        f"precision={asked!r} is not to be had: the bundle has graphs in {', '.join(manifest.precisions)}, and compute "
        f"capability {capability} runs {', '.join(_computed(capability))}; export the bundle with --precisions "
        "float32,bfloat16, or leave the precision out"
    )


def _computed(capability: str) -> tuple[str, ...]:
    major, minor = capability.split(".")
    return tuple(PRECISIONS) if (int(major), int(minor)) >= BFLOAT16_FROM else ("f32",)


def build(order: Order, component: str) -> tuple[bytes, Report]:
    """A serialized engine, and what became of its graph.

    Raises:
        ExportError: TensorRT cannot read the graph, or build it for these shapes and this target.
    """
    library, trt = order.library, order.library.trt
    path = order.bundle.path(component, order.graphs)
    graph = order.bundle.manifest.components[component].graphs[order.graphs]
    started = time.perf_counter()
    with _building, library.logger.recording() as lines:
        builder = trt.Builder(library.logger)
        # TensorRT 11 and TensorRT-RTX always type a network so; 10 does when it is told.
        network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
        parser = trt.OnnxParser(network, library.logger)
        if not parser.parse_from_file(str(path)):
            error = parser.get_error(0)  # reading stops at the first
            node = f"node {error.node_name()} of {error.node_operator()}: " if error.node_operator() else ""
            raise ExportError(f"{library.title} cannot read {path}: {node}{first_line(error.desc())}")
        found = _attentions(trt, network, order.shapes(component))
        serialized = builder.build_serialized_network(network, _configure(order, builder, component))
        if serialized is None:
            raise ExportError(
                f"{library.title} cannot build {component} in {order.precision} for {order.target}, batches up to "
                f"{order.limit(component)}: {library.logger.why()}"
            )
        engine = bytes(serialized)
    fusable = [attention for attention in found if attention.fusable]
    report = Report(
        component=component,
        precision=order.precision,
        target=order.target,
        onnx_bytes=sum(ref.bytes for ref in (graph.file, *graph.data)),
        engine_bytes=len(engine),
        unfused_bytes=min((attention.unfused_bytes for attention in fusable), default=0),
        attentions=len(found),
        fusable=len(fusable),
        build_s=time.perf_counter() - started,
        **read_log(lines),
    )
    return engine, report


def _configure(order: Order, builder: Any, component: str) -> Any:
    trt = order.library.trt
    config = builder.create_builder_config()
    profile = builder.create_optimization_profile()
    for name, levels in order.shapes(component).items():
        profile.set_shape(name, *levels)
    config.add_optimization_profile(profile)
    config.profiling_verbosity = (
        trt.ProfilingVerbosity.DETAILED
    )  # lists the kernels in the log, for the report
    config.clear_flag(trt.BuilderFlag.TF32)  # which would keep 10 of float32's 23 bits
    for flag in order.library.flags:
        config.set_flag(getattr(trt.BuilderFlag, flag))
    if order.workspace is not None:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, order.workspace)
    if order.library.rtx:
        config.num_compute_capabilities = 1
        config.set_compute_capability(getattr(trt.ComputeCapability, f"SM{order.target.replace('.', '')}"), 0)
    return config


def _attentions(trt: Any, network: Any, shapes: Shapes) -> list[Attention]:
    """The attentions at the largest shapes. From here on, each may be built of several kernels where no one fits.

    Otherwise a graph with one such attention cannot be built at all; the autoencoder's has a head of 512.
    """
    inputs = [network.get_input(index) for index in range(network.num_inputs)]
    dynamic = [tuple(tensor.shape) for tensor in inputs]
    for tensor in inputs:
        tensor.shape = shapes[tensor.name][2]
    found = attentions(trt, network)
    for tensor, shape in zip(inputs, dynamic, strict=True):
        tensor.shape = shape
    for index in range(network.num_layers):
        layer = network.get_layer(index)
        if layer.type == getattr(trt.LayerType, "ATTENTION_INPUT", None):
            layer.__class__ = trt.IAttentionInputLayer  # the bindings' way to a layer's own fields
            layer.attention.decomposable = True
    return found


def cached(
    order: Order, store: CompiledCache, component: str, read: Callable[[bytes], Engine]
) -> tuple[Engine, Report]:
    """What `read` makes of an engine, and its report: of what `store` has, or else of what is built now."""

    def stored(serialized: bytes) -> tuple[Engine, Report]:
        report = Report.from_json(store.load(f"{component}.report") or b"")
        if report is None:
            raise LookupError("what was said of it as it was built is not there")
        return read(serialized), report

    def made() -> tuple[tuple[Engine, Report], bytes]:
        log.info("building %s in %s for %s", component, order.precision, order.target)
        serialized, report = build(order, component)
        store.store(f"{component}.report", report.to_json())  # before the engine, which is looked for first
        return (read(serialized), report), serialized

    return store.obtain(component, stored, made)


def build_engines(
    bundle: Bundle,
    *,
    capability: str,
    cache_dir: Path | None,
    max_batch: int = 8,
    precision: str = "auto",
    workspace: int | None = None,
    trt: Any = None,
) -> list[Report]:
    """Build TensorRT-RTX engines of every component for GPUs of `capability`, without one, into `cache_dir`.

    What is there already is not built again; None keeps nothing. `precision` and `max_batch` are `EngineOptions`'.

    Raises:
        RuntimeUnavailable: TensorRT-RTX is not installed, or has no such target or precision.
        ExportError: a component cannot be built.
    """
    library = open_library(RTX, trt)
    library.check_target(capability)
    chosen = choose_precision(precision, bundle.manifest, capability)
    order = Order(library, bundle, chosen, capability, max_batch, workspace)
    store = order.cache(cache_dir)
    return [cached(order, store, component, bytes)[1] for component in bundle.manifest.components]
