"""`cdm-bench roofline`: how much of the machine the denoiser uses, and where the rest goes.

Achieved FLOP/s of one step over the best matrix product of the same precision, measured in turns in one run; then the
executed nodes by the time they take. A step's time is the whole call's, a product's that of its node alone: without
the copies and conversions around it, which a network does not have at each product. FLOPs are those of matrix products,
convolutions and attention, counted on torch's own operations for the same shapes.

    cdm-bench roofline --bundle bundles/emoji --student runs/emoji-cdm/student --batches 1,8 --threads 2
"""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov
import openvino.opset15 as ops
import torch
from numpy.typing import NDArray
from pydantic import Field
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.report import show
from benchmarks.turns import take_turns
from engines.base import EngineOptions
from engines.bundle import Manifest, load_bundle
from engines.cli import CommandSettings, UsageError
from engines.families.base import Family, FamilyError, load_family
from engines.openvino import OpenVINOEngine, core

SIZES = (
    (1, 1536, 9216),
    (8, 1536, 9216),
    (512, 512, 512),
    (1024, 1024, 1024),
    (256, 1536, 6144),
    (1024, 1536, 4608),
    (1024, 1536, 6144),
    (1024, 6144, 1536),
    (4096, 1024, 1024),
    (4096, 4096, 4096),
)
"""Matrix products tried: rows, inner, columns. A modulation of one and of eight pictures, small, large, and those of
SD3-Medium's layers."""


Shape = tuple[int, int, int]


class RooflineSettings(CommandSettings, env_prefix="CDM_BENCH_ROOFLINE_"):
    """Compare the denoiser's FLOP/s on OpenVINO with the best matrix product here, and profile its nodes."""

    bundle: Path = Field(description="bundle folder")
    student: Path = Field(description="the diffusers folder that it was exported from: its FLOPs are counted")
    precision: str = Field("auto", description="auto, bf16 or f32")
    batches: list[int] = Field([1, 4], min_length=1, description="batch sizes")
    rounds: int = Field(10, ge=2, description="measured rounds; every batch and matrix product once in each")
    threads: int = Field(0, ge=0, description="threads; 0 lets OpenVINO choose")


def run(settings: RooflineSettings) -> int:
    """Measure, print the table and the JSON line."""
    bundle = load_bundle(settings.bundle)
    try:
        family = load_family(settings.student, torch.float32, only=())
    except FamilyError as error:
        raise UsageError(f"--student: {error}") from error
    engine = OpenVINOEngine(
        bundle,
        EngineOptions("openvino", settings.precision, settings.threads, max_batch=max(settings.batches)),
    )
    inputs = {batch: denoiser_inputs(bundle.manifest, batch) for batch in settings.batches}
    products = {shape: Product(shape, engine.info.precision, settings.threads) for shape in SIZES}
    calls: dict[int | Shape, Callable[[], object]] = {}
    calls |= {batch: partial(engine.run, "denoiser", inputs[batch]) for batch in settings.batches}
    for shape, product in products.items():
        calls[shape] = product
    times = take_turns(calls, settings.rounds)
    speeds = {shape: 2.0 * np.prod(shape) / product.seconds() for shape, product in products.items()}
    best = max(speeds.values())
    rows = []
    for batch in settings.batches:
        took = statistics.median(times[batch]) / 1000
        count = flops(family, bundle.manifest, batch)
        rows.append(
            {
                "batch": batch,
                "step ms": took * 1000,
                "GFLOP": count / 1e9,
                "GFLOP/s": count / took / 1e9,
                "best product GFLOP/s": best / 1e9,
                "% of it": 100 * count / took / best,
            }
        )
    feeds = {batch: engine.with_time(inputs[batch]) for batch in settings.batches}
    engine.close()  # before it is compiled once more to be profiled: a large model fits into memory once
    show(
        "roofline",
        rows,
        bundle=bundle.manifest.name,
        precision=engine.info.precision,
        threads=engine.info.threads,
        size=bundle.manifest.default_size.model_dump(),
        products={"x".join(map(str, shape)): round(speed / 1e9, 1) for shape, speed in speeds.items()},
        nodes_percent={batch: profile(engine, feeds[batch]) for batch in settings.batches},
    )
    return 0


def denoiser_inputs(manifest: Manifest, batch: int) -> dict[str, NDArray[np.float32]]:
    """Random inputs of the default size; every dimension that serving fixes has its length."""
    generator = np.random.default_rng(0)
    size, factor = manifest.default_size, manifest.latent.downscale
    known = {
        "batch": batch,
        "height": size.height // factor,
        "width": size.width // factor,
        **manifest.text_lengths,
    }
    found = {}
    for name, spec in manifest.components["denoiser"].inputs.items():
        shape = [known[dim] if isinstance(dim, str) else dim for dim in spec.shape]
        found[name] = generator.standard_normal(shape, dtype=np.float32)
    found["sigma"], found["sigma_next"] = np.full(batch, 0.9, np.float32), np.full(batch, 0.5, np.float32)
    return found


def flops(family: Family, manifest: Manifest, batch: int) -> int:
    """Of one step, by torch's counter on the meta device."""
    inputs = {
        name: torch.from_numpy(array).to("meta") for name, array in denoiser_inputs(manifest, batch).items()
    }
    conditioning = family.join({name: inputs[name] for name in manifest.conditioning})
    transformer = family.transformer.to("meta")
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        family.velocity(transformer, inputs["x"], inputs["sigma"], conditioning)
    return int(counter.get_total_flops())


class Product:
    """x·W with a constant W, as a network has it, compiled by OpenVINO. A call is one product."""

    def __init__(self, shape: Shape, precision: str, threads: int) -> None:
        rows, inner, columns = shape
        weights = np.random.default_rng(1).standard_normal((inner, columns), dtype=np.float32)
        x = ops.parameter([rows, inner], name="x", dtype=ov.Type.f32)
        model = ov.Model([ops.matmul(x, ops.constant(weights), False, False)], [x], "product")
        config: dict[str, Any] = {
            "INFERENCE_PRECISION_HINT": precision,
            "PERFORMANCE_HINT": "LATENCY",
            "NUM_STREAMS": 1,
            "PERF_COUNT": True,
        }
        if threads:
            config["INFERENCE_NUM_THREADS"] = threads
        self._request = core().compile_model(model, "CPU", config).create_infer_request()
        self._values = np.random.default_rng(2).standard_normal((rows, inner), dtype=np.float32)
        self._seconds: list[float] = []

    def __call__(self) -> None:
        self._request.infer([self._values], share_inputs=True, share_outputs=True)
        took = [
            node.real_time.total_seconds()
            for node in self._request.profiling_info
            if node.node_type in ("FullyConnected", "MatMul")
        ]
        assert len(took) == 1, took
        self._seconds += took

    def seconds(self) -> float:
        """Median time of the product's node, the first call left out."""
        return statistics.median(self._seconds[1:])


def profile(engine: OpenVINOEngine, feed: Mapping[str, NDArray[Any]], rounds: int = 5) -> dict[str, float]:
    """Share (%) of the executed nodes' time by kind, the largest eight."""
    request = engine.profiled("denoiser")
    times: Counter[str] = Counter()
    request.infer(feed)
    for _ in range(rounds):
        request.infer(feed)
        for node in request.profiling_info:
            times[node.node_type] += node.real_time.total_seconds()
    total = sum(times.values())
    return {kind: round(100 * took / total, 1) for kind, took in times.most_common(8)}
