"""OpenVINO on the CPU: the fastest runtime there, in bfloat16 where the CPU computes it natively.

Every component is compiled for each batch and size that serving asks for most (`engines/openvino_static.py`), and once
for any other: those of a single picture at once, the rest when a call first needs them, as a server's warm-up does.

Bfloat16 has 8 bits of mantissa: 1000·σ computed in it makes σ = 0.9 and 0.9015 the same time. The runtime has no way
to keep chosen operations in float32, so the sines and cosines of σ are cut out of the denoiser into a small float32
model of their own (`cut_time`).
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov
import openvino.opset15 as ops

from engines import processor
from engines.base import EngineInfo, EngineOptions
from engines.bundle import Bundle
from engines.cache import CompiledCache, code_hash, graph_hashes, shapes_of
from engines.errors import RuntimeUnavailable, loading
from engines.openvino_report import FusionReport, fusion_report
from engines.openvino_static import Static, StaticRequest, static_of, worth_compiling
from engines.rows import Array, HostEngine

PRECISIONS = ("auto", "f32", "bf16")

TIME = "time"


class OpenVINOEngine(HostEngine):
    """A bundle on OpenVINO's CPU plugin. Raises `RuntimeUnavailable` for a precision that it does not have."""

    def __init__(self, bundle: Bundle, options: EngineOptions) -> None:
        super().__init__(bundle, options)
        self._core = core()
        self._graphs = {component: bundle.path(component) for component in bundle.manifest.components}
        self._precision = choose_precision(options.precision)
        self._threads = options.threads
        self._max_batch = options.max_batch
        device = str(self._core.get_property("CPU", "FULL_DEVICE_NAME"))
        self._cache = CompiledCache.open(
            options.cache_dir,
            "openvino",
            model=graph_hashes(self.manifest, "float32"),
            shapes=shapes_of(self.manifest),
            code=code_hash(__file__),
            version=ov.get_version(),
            device=device,
            capability=sorted(processor.flags()),
            precision=self._precision,
            threads=options.threads,
        )
        weight = 4 if self._precision == "f32" else 2
        wanted = worth_compiling(self.manifest, self._max_batch, self._group, weight)
        self._wanted = frozenset(wanted)
        self._static: dict[Static, StaticRequest] = {}
        self._dynamic: dict[str, ov.InferRequest] = {}
        for component in self._graphs:
            first = next((static for static in wanted if static.component == component), None)
            if first is None:
                self._request(component)
            else:
                self._static_request(first)
        compiled = self._models("denoiser")[0]
        needs_time = any(port.get_any_name().startswith(TIME) for port in compiled.inputs)
        self._time = self._load(TIME) if needs_time else None
        self._waves = lru_cache(maxsize=1024)(self._waves_of)
        self.info = EngineInfo(
            runtime="openvino",
            version=ov.__version__,
            device=device,
            precision=self._precision,
            max_batch=options.max_batch,
            threads=int(compiled.get_property("INFERENCE_NUM_THREADS")),
            invariant_batch=options.invariant_batch,
        )
        self.cache_folder = self._cache.folder

    @classmethod
    def precisions(cls, bundle: Bundle) -> tuple[str, ...]:
        return ("bf16", "f32") if choose_precision("auto") == "bf16" else ("f32",)

    def run(self, component: str, inputs: Mapping[str, Array]) -> Mapping[str, Array]:
        outputs = tuple(self.manifest.components[component].outputs)
        if component == "denoiser":
            inputs = self.with_time(inputs)
        static = static_of(component, inputs)
        if static in self._wanted:
            return self._static_request(static).run(inputs, outputs)
        results = self._request(component).infer(inputs, share_inputs=True)
        # Not by `get_any_name`: of a tensor with several names, as T5's last product has it, it may be another.
        return {name: results[name] for name in outputs}

    def with_time(self, inputs: Mapping[str, Array]) -> Mapping[str, Array]:
        """The denoiser's inputs as its compiled graph takes them: where σ's waves were cut out, with those."""
        if self._time is None:
            return inputs
        rows = [self._waves(float(sigma)) for sigma in inputs["sigma"]]
        names = [port.get_any_name() for port in self._time.model_outputs]
        columns = (np.concatenate(column) for column in zip(*rows, strict=True))
        return {**inputs, **dict(zip(names, columns, strict=True))}

    def _waves_of(self, sigma: float) -> tuple[Array, ...]:
        """One row of each sine and cosine. Schedules have few σ, so these are remembered."""
        assert self._time is not None
        results = self._time.infer({"sigma": np.array([sigma], np.float32)})
        return tuple(results[port] for port in self._time.model_outputs)

    def _static_request(self, static: Static) -> StaticRequest:
        if static not in self._static:
            self._static[static] = StaticRequest(self._load(static.component, static))
        return self._static[static]

    def _request(self, component: str) -> ov.InferRequest:
        """Of the model for any batch and size."""
        if component not in self._dynamic:
            self._dynamic[component] = self._load(component)
        return self._dynamic[component]

    def _models(self, component: str) -> list[ov.CompiledModel]:
        """All that were compiled of it, the static ones first."""
        models = [request.model for static, request in self._static.items() if static.component == component]
        if component in self._dynamic:
            models.append(self._dynamic[component].get_compiled_model())
        return models

    def _load(self, name: str, static: Static | None = None) -> ov.InferRequest:
        """Component `name` (or `TIME`, the denoiser's float32 part), for any batch and size or `static`'s."""
        config = self._config("f32" if name == TIME else self._precision)

        def build() -> tuple[ov.CompiledModel, bytes]:
            compiled = self._core.compile_model(self._model(name, static), "CPU", config)
            return compiled, compiled.export_model().getvalue() if self._cache.folder is not None else b""

        with loading("openvino", name):
            compiled = self._cache.obtain(
                static.name if static else name,
                lambda blob: self._core.import_model(blob, "CPU", config),
                build,
            )
            return compiled.create_infer_request()

    def _config(self, precision: str) -> dict[str, Any]:
        config: dict[str, Any] = {
            "INFERENCE_PRECISION_HINT": precision,
            "PERFORMANCE_HINT": "LATENCY",
            "NUM_STREAMS": 1,
        }
        if self._threads:
            config["INFERENCE_NUM_THREADS"] = self._threads
        return config

    def profiled(self, component: str) -> ov.InferRequest:
        """`component` compiled once more, for any batch, so that `profiling_info` says what each node took."""
        compiled = self._core.compile_model(
            self._model(component, None), "CPU", {**self._config(self._precision), "PERF_COUNT": True}
        )
        return compiled.create_infer_request()

    def _model(self, name: str, static: Static | None) -> ov.Model:
        model = self._core.read_model(self._graphs["denoiser" if name == TIME else name])
        if name == TIME or (name == "denoiser" and self._precision != "f32"):
            time = cut_time(model)
            if name == TIME:
                assert time is not None
                return time
        model.reshape(self._shapes(model, name, static))
        return model

    def _shapes(self, model: ov.Model, component: str, static: Static | None) -> dict[str, list[int]]:
        """Every input's dimensions, −1 where they vary: as few as serving allows, for each costs speed."""
        sizes, latent = self.manifest.sizes, self.manifest.latent
        known: dict[str, int] = dict(self.manifest.text_lengths)
        sides = static.sides if static else None
        if len(sizes) == 1:
            sides = (sizes[0].height // latent.downscale, sizes[0].width // latent.downscale)
        if sides:
            known |= dict(zip(("height", "width"), sides, strict=True))
        specs = self.manifest.components[component].inputs
        fixed = {}
        for port in model.inputs:
            name = port.get_any_name()
            if name in specs:
                dims = [known.get(dim, -1) if isinstance(dim, str) else dim for dim in specs[name].shape]
            else:  # time, cut out of the graph
                dims = [-1 if dim.is_dynamic else dim.get_length() for dim in port.partial_shape]
            fixed[name] = [static.batch, *dims[1:]] if static else dims
        return fixed

    def fusion_report(self, component: str) -> FusionReport:
        """What became of `component`: of its graphs that are compiled by now, in the worst."""
        source = self._core.read_model(self._graphs[component])
        reports = [fusion_report(model, source) for model in self._models(component)]
        return min(reports, key=lambda report: report.attentions_fused)

    def close(self) -> None:
        """Free the compiled models."""
        self._dynamic.clear()
        self._static.clear()
        self._time = None


@cache
def core() -> ov.Core:
    """The process's only one, kept to its end.

    The CPU plugin gives the thread that makes its first model an alternate signal stack, and unmaps that with the core:
    freed on another thread, as an unloaded engine is, it would leave a stack that the next signal dies on.
    """
    return ov.Core()


def choose_precision(asked: str, cpuinfo: Path = processor.CPUINFO) -> str:
    """`f32` or `bf16`. `auto` is bf16 on a CPU with AMX-BF16 or AVX512-BF16; emulated, it is slower than f32.

    Raises:
        RuntimeUnavailable: a precision that is neither.
    """
    if asked not in PRECISIONS:
        raise RuntimeUnavailable(f"precision={asked!r} is not one of openvino's: {', '.join(PRECISIONS)}")
    if asked != "auto":
        return asked
    return "bf16" if processor.has_bf16(cpuinfo) else "f32"


def cut_time(model: ov.Model) -> ov.Model | None:
    """Cut the sines and cosines of σ out of the denoiser: σ → their values, as a model; they become inputs of `model`.

    Inputs and outputs are called `time_0`, `time_1`, … None if the graph has no sine or cosine of σ.
    """
    time = model.clone()
    waves, inputs = [_waves(graph) for graph in (time, model)]
    if not waves:
        return None
    for index, (wave, cut) in enumerate(zip(waves, inputs, strict=True)):
        name = f"{TIME}_{index}"
        wave.output(0).get_tensor().set_names({name})
        parameter = ops.parameter(cut.output(0).partial_shape, cut.output(0).element_type, name=name)
        parameter.output(0).get_tensor().set_names({name})
        for target in cut.output(0).get_target_inputs():
            target.replace_source_output(parameter.output(0))
        model.add_parameters([parameter])
    sigma = next(node for node in time.get_parameters() if "sigma" in node.output(0).get_names())
    model.validate_nodes_and_infer_types()
    return ov.Model([wave.output(0) for wave in waves], [sigma], TIME)


def _waves(model: ov.Model) -> list[ov.Node]:
    """Those of σ alone: LongCat's positions, where no table has taken their place, have sines of x and the text."""
    needs: dict[str, set[str]] = {}
    for node in model.get_ordered_ops():
        if node.get_type_name() == "Parameter":
            needs[node.get_friendly_name()] = set(node.output(0).get_names())
        else:
            sources = [port.get_source_output().get_node().get_friendly_name() for port in node.inputs()]
            needs[node.get_friendly_name()] = set().union(*(needs[name] for name in sources))
    return [
        node
        for node in model.get_ordered_ops()
        if node.get_type_name() in ("Sin", "Cos") and needs[node.get_friendly_name()] == {"sigma"}
    ]
