"""Folders of the real classes, as people have them, through export to pictures: those that diffusers itself paints.

Every picture is compared with the folder's own pipeline class, run by diffusers in float32 with the same noise, the
same sigmas and no guidance. Sizes have odd numbers of patches on one side or both, prompts are empty or far too long.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from diffusers import LongCatImagePipeline, StableDiffusion3Pipeline
from numpy.typing import NDArray

from engines.base import Engine, EngineOptions, load_engine
from engines.bundle import Bundle, Manifest, Size, load_bundle
from engines.export.export import ExportOptions, export_bundle
from engines.export.graphs import exportable
from engines.export.onnx_file import OPSET, save_model, to_onnx
from engines.export.parity import EXAMPLE_BATCH
from engines.families.loading import quiet
from engines.families.longcat import pack
from engines.families.sd3 import T5_LENGTH
from engines.noise import noise
from engines.tensorrt_build import Order, build
from engines.tensorrt_library import open_library
from engines.torch_graphs import example, load_graph
from tests.engines.pictures import Job, draw, worst
from tests.engines.tensorrt_models import with_graph
from tests.folders import FOLDERS

pytestmark = pytest.mark.slow  # three exports

SIZES = (Size(width=64, height=64), Size(width=80, height=48), Size(width=48, height=112))
SQUARE, WIDE, TALL = ((size.height // 8, size.width // 8) for size in SIZES)
"""4×4, 3×5 and 7×3 patches."""

LONG = "red apple of japan with tears " * 120
MIXED = [Job("red apple", 1, 4), Job("", 2, 1), Job(LONG, 3, 3), Job("a sign says 'Hi' 🍎", 4, 2)]
JOBS = [*MIXED, *(job._replace(size=size, seed=job.seed + 10) for size in (WIDE, TALL) for job in MIXED[:3])]

NAMES = ("sd3-medium", "sd35-medium", "longcat")

PSNR_DB = {"torch f32": 70.0, "f32": 55.0, "bf16": 38.0, "int8": 38.0}
"""Of a picture against diffusers' in float32. Graphs store their weights in float16: that, and rounding, is what
float32 loses; torch runs the original ones."""
LARGEST = {"torch f32": 1, "f32": 2, "bf16": 40, "int8": 40}
"""Of any one value, of 255."""

Picture = NDArray[np.uint8]


class Exported(NamedTuple):
    """A folder, the bundle of it, and what diffusers paints of it."""

    name: str
    folder: Path
    bundle: Bundle
    pictures: dict[Job, Picture]


@pytest.fixture(scope="module")
def export(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Exported]:
    """Each folder once, in whatever order tests ask for them."""

    @cache
    def export(name: str) -> Exported:
        root = tmp_path_factory.mktemp(name)
        folder = FOLDERS[name](root / "folder")
        options = ExportOptions(sizes=SIZES, runtimes=("onnxruntime",), batches=(1,), weights=True)
        export_bundle(folder, root / "bundle", options)
        bundle = load_bundle(root / "bundle")
        return Exported(name, folder, bundle, diffusers_pictures(folder, bundle.manifest, JOBS))

    return export


@pytest.fixture(scope="module", params=NAMES)
def exported(request: pytest.FixtureRequest, export: Callable[[str], Exported]) -> Exported:
    return export(request.param)


@pytest.fixture(scope="module")
def cache_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("compiled")


def diffusers_pictures(folder: Path, manifest: Manifest, jobs: list[Job]) -> dict[Job, Picture]:
    """Each by itself, by the pipeline class that the folder is of."""
    paint = {"sd3": _stable_diffusion, "longcat": _longcat}[manifest.family](folder)
    found = {}
    for job in jobs:
        start = torch.from_numpy(noise(job.seed, (manifest.latent.channels, *job.size))[None])
        found[job] = np.asarray(paint(job, start, manifest.sigmas(job.steps)))
    return found


Paint = Callable[[Job, torch.Tensor, tuple[float, ...]], Any]


def _common(job: Job) -> dict[str, Any]:
    return {
        "prompt": job.prompt,
        "height": 8 * job.size[0],
        "width": 8 * job.size[1],
        "guidance_scale": 1.0,
        "num_inference_steps": job.steps,
    }


def _stable_diffusion(folder: Path) -> Paint:
    without = {} if (folder / "text_encoder_3").is_dir() else {"text_encoder_3": None, "tokenizer_3": None}
    with quiet():
        pipeline = StableDiffusion3Pipeline.from_pretrained(folder, **without)
    pipeline.set_progress_bar_config(disable=True)
    length = T5_LENGTH if not without else pipeline.tokenizer.model_max_length

    def paint(job: Job, start: torch.Tensor, sigmas: tuple[float, ...]) -> Any:
        shift = pipeline.scheduler.config.shift
        plain = [sigma / (shift - (shift - 1) * sigma) for sigma in sigmas[:-1]]
        with quiet():  # it tells what is cut off a prompt
            return pipeline(**_common(job), sigmas=plain, latents=start, max_sequence_length=length).images[0]

    return paint


def _longcat(folder: Path) -> Paint:
    with quiet():
        pipeline = LongCatImagePipeline.from_pretrained(folder, text_processor=None)
    pipeline.set_progress_bar_config(disable=True)

    def paint(job: Job, start: torch.Tensor, sigmas: tuple[float, ...]) -> Any:
        """Bundles have one schedule for all sizes, the pipeline shifts by size: given, and not shifted again."""
        config = {**pipeline.scheduler.config, "use_dynamic_shifting": False, "shift": 1.0}
        pipeline.scheduler = type(pipeline.scheduler).from_config(config)
        given = {"sigmas": list(sigmas[:-1]), "latents": pack(start), "enable_prompt_rewrite": False}
        with quiet():
            return pipeline(**_common(job), **given).images[0]

    return paint


def psnr(mine: Picture, theirs: Picture) -> float:
    square = float(np.mean((mine.astype(np.float64) - theirs.astype(np.float64)) ** 2))
    return 10 * np.log10(255**2 / square) if square else 99.0


RUNTIMES = {
    "onnxruntime": EngineOptions("onnxruntime", "f32", threads=1),
    "onnxruntime:int8": EngineOptions("onnxruntime", "int8", threads=1),
    "openvino": EngineOptions("openvino", "f32", threads=1),
    "openvino:bf16": EngineOptions("openvino", "bf16", threads=1),
    "openvino in threes": EngineOptions("openvino", "f32", threads=1, invariant_batch=3),
    "torch": EngineOptions("torch", "f32", threads=1),
    "torch:bf16": EngineOptions("torch", "bf16", threads=1),
}


@pytest.fixture(scope="module", params=RUNTIMES)
def engine(request: pytest.FixtureRequest, exported: Exported, cache_dir: Path) -> Iterator[Engine]:
    options = RUNTIMES[request.param]
    if options.runtime == "openvino":  # in threes or not, the compiled models are the same
        options = replace(options, cache_dir=cache_dir)
    loaded = load_engine(exported.bundle, options)
    yield loaded
    loaded.close()


def _held(engine: Engine, found: dict[Job, Picture], exported: Exported) -> None:
    kind = (
        "torch f32"
        if (engine.info.runtime, engine.info.precision) == ("torch", "f32")
        else engine.info.precision
    )
    for job, picture in found.items():
        theirs = exported.pictures[job]
        assert picture.shape == theirs.shape == (8 * job.size[0], 8 * job.size[1], 3)
        assert psnr(picture, theirs) >= PSNR_DB[kind], job
        assert worst(picture, theirs) <= LARGEST[kind], job


def test_pictures_are_diffusers_own_in_batches_of_mixed_prompts_and_steps_at_every_size(
    exported: Exported, engine: Engine
) -> None:
    """Sizes take turns in one engine: what it keeps of one must not reach the next."""
    found: dict[Job, Picture] = {}
    for size in (SQUARE, TALL, WIDE, SQUARE):
        jobs = [job for job in JOBS if job.size == size]
        found |= zip(jobs, draw(engine, jobs), strict=True)
    assert set(found) == set(JOBS)
    _held(engine, found, exported)


def test_one_picture_alone_is_diffusers_own(exported: Exported, engine: Engine) -> None:
    """A batch of one is what compilers make constants of, and what OpenVINO has a shape of its own for."""
    for job in (JOBS[0], JOBS[4]):
        _held(engine, {job: draw(engine, [job])[0]}, exported)


def test_pictures_that_are_compared_show_something(exported: Exported) -> None:
    """On an even grey no error would show, and prompts that change nothing would hide a text encoder left out."""
    for job, picture in exported.pictures.items():
        assert picture.std() > 10, job
    by_prompt = [exported.pictures[job] for job in MIXED]
    assert len({picture.tobytes() for picture in by_prompt}) == len(MIXED)


def lowered(bundle: Bundle, root: Path) -> Bundle:
    """The bundle with its denoiser in bfloat16 too, as `--precisions` would add it; the other components cost time."""
    spec = bundle.manifest.components["denoiser"].inputs
    device = torch.device("cpu")
    module = load_graph(bundle, "denoiser", "bf16", device, fused=False)
    module.axes |= {
        name: {axis: dim for axis, dim in enumerate(tensor.shape) if isinstance(dim, str)}
        for name, tensor in spec.items()
    }
    rows = example(bundle.manifest, "denoiser", EXAMPLE_BATCH, device)
    with exportable(), torch.no_grad():
        model = to_onnx(module, dict(zip(spec, rows, strict=True)), OPSET["bfloat16"])
    graph = save_model(root, "denoiser.bf16", model)
    return with_graph(bundle, root, "denoiser", root / graph.file.file, spec)


@pytest.mark.parametrize(("name", "attentions"), [("sd35-medium", 3), ("longcat", 2)])
def test_tensorrt_rtx_builds_the_denoiser_with_every_attention_one_kernel(
    export: Callable[[str], Exported], tmp_path: Path, name: str, attentions: int
) -> None:
    """For a GPU that is not here: dual attention, and text of 512 tokens with rotary embeddings."""
    pytest.importorskip("tensorrt_rtx")
    order = Order(open_library("tensorrt-rtx"), lowered(export(name).bundle, tmp_path), "bf16", "8.9", 2)
    serialized, report = build(order, "denoiser")
    assert len(serialized) == report.engine_bytes > 10_000
    assert (report.attentions, report.fusable, report.fused) == (attentions,) * 3
    assert report.fell_apart == 0
    report.require_attention("denoiser")
