"""`cdm-bench bundle`: are a bundle's pictures those of its torch student, and does the evaluator see a difference?

Every prompt is drawn from the same noise by the student in float32 torch and by the bundle on each runtime and
precision. PSNR says how far a picture is from the student's, the scores whether it is as good as that one.

With a dataset, prompts and scores are those of `cdm-train evaluate`: half of them captions of training pictures, half
held-out ones, alignment among 100 captions, Fréchet distance to real pictures. Without one, the evaluator alone: how
similar a picture is to its own caption, and the distance of its features from the torch student's pictures.

    cdm-bench bundle --bundle bundles/emoji --student runs/emoji-cdm/student --prompts 200
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field, field_validator

from benchmarks.report import show
from engines.base import Engine, EngineOptions, load_engine
from engines.bundle import Bundle, Manifest, load_bundle
from engines.cli import CommandSettings, UsageError
from engines.errors import RuntimeUnavailable
from engines.export.verify import EQUAL_DB
from engines.families.base import Family, FamilyError, load_family
from engines.noise import noise
from training import metrics
from training.emoji.dataset import EmojiDataset
from training.evalset import Scorer, choose
from training.evaluator import ASSETS, Evaluator
from training.sampling import decode, sample

PROMPTS = ASSETS.parent / "sample_prompts.txt"
"""Prompts of where there is no dataset, repeated with other seeds."""

NEED_DATA = ("alignment", "Fréchet")
"""Scores that compare with captions and real pictures of a dataset."""

REFERENCE = "torch float32"

Pictures = NDArray[np.uint8]


class BundleBenchSettings(CommandSettings, env_prefix="CDM_BENCH_BUNDLE_"):
    """Compare a bundle's pictures with its torch student's, per runtime and precision: PSNR, and the evaluator's view.

    Both draw the same prompts from the same noise.
    """

    bundle: Path = Field(description="bundle folder")
    student: Path = Field(description="the diffusers folder that it was exported from")
    prompts: int = Field(100, ge=4, description="prompts; one picture each")
    steps: int = Field(0, ge=0, description="steps of a picture; 0: the bundle's default")
    engines: list[str] = Field(
        ["openvino:bf16", "openvino:f32", "onnxruntime:f32", "onnxruntime:int8"],
        min_length=1,
        description="engines to compare, as runtime:precision",
    )
    data: Path = Field(
        Path("data/emoji"), description="dataset folder with captions and real pictures; may be absent"
    )
    evaluator: Path | None = Field(None, description="evaluator folder; none: the one that ships")
    choices: int = Field(
        100, ge=2, description="captions that a picture's own must win against, itself included"
    )
    batch: int = Field(8, ge=1, le=64, description="pictures made at once")
    threads: int = Field(0, ge=0, description="threads of torch and of the engines; 0 lets each choose")
    seed: int = Field(0, ge=0, le=1_000_000, description="seed of prompts, distractors and starting noise")

    @field_validator("engines")
    @classmethod
    def _are_engines(cls, value: list[str]) -> list[str]:
        for name in value:
            if len(name.split(":")) != 2 or not all(name.split(":")):
                raise ValueError(f"{name!r} is no engine; write runtime:precision, as openvino:bf16")
        return value


@dataclass(frozen=True)
class Exam:
    """What is drawn, and what judges it. Without `scorer` there is no dataset."""

    captions: list[str]
    seeds: list[int]
    evaluator: Evaluator
    scorer: Scorer | None


def run(settings: BundleBenchSettings) -> int:
    """Draw, compare, print the table and the JSON line.

    Raises:
        UsageError: the student is no folder of a known family or of other latents than the bundle's, or no such steps.
        TrainingError: no readable evaluator, or a dataset too small for so many prompts.
    """
    if settings.threads:
        torch.set_num_threads(settings.threads)
    bundle = load_bundle(settings.bundle)
    steps = settings.steps or bundle.manifest.default_steps
    if steps not in bundle.manifest.schedules:
        raise UsageError(f"--steps={steps}: the bundle has schedules for {sorted(bundle.manifest.schedules)}")
    exam = _exam(settings)
    sigmas = bundle.manifest.sigmas(steps)
    reference = student_pictures(settings, bundle.manifest, exam, sigmas)
    rows: list[dict[str, Any]] = [{"pictures of": REFERENCE, **scores(exam, reference, reference)}]
    absent: dict[str, str] = {}
    for name in settings.engines:
        try:
            made = bundle_pictures(settings, bundle, name, exam, sigmas)
        except RuntimeUnavailable as error:
            absent[name] = str(error)
            continue
        found = np.array([psnr(a, b) for a, b in zip(made, reference, strict=True)])
        rows.append(
            {
                "pictures of": name.replace(":", " "),
                "PSNR mean": float(found.mean()),
                "PSNR min": float(found.min()),
                "equal": int((made == reference).all(axis=(1, 2, 3)).sum()),
                **scores(exam, made, reference),
            }
        )
    if len(rows) == 1:
        raise UsageError(f"--engines: none of them runs here: {'; '.join(absent.values())}")
    show(
        "bundle",
        rows,
        bundle=bundle.manifest.name,
        student=settings.student.resolve().name,
        steps=steps,
        size=bundle.manifest.default_size.model_dump(),
        prompts=len(exam.captions),
        data=exam.scorer is not None,
        scores_left_out=(
            {} if exam.scorer else dict.fromkeys(NEED_DATA, f"no dataset in {settings.data.as_posix()}")
        ),
        choices=settings.choices if exam.scorer else None,
        absent=absent,
    )
    return 0


def _exam(settings: BundleBenchSettings) -> Exam:
    evaluator = Evaluator.load(settings.evaluator or ASSETS)
    if settings.data.is_dir():
        chosen = choose(EmojiDataset.load(settings.data), settings.prompts, settings.choices, settings.seed)
        return Exam(chosen.captions, chosen.seeds, evaluator, Scorer(evaluator, chosen))
    print(
        f"no dataset in {settings.data}: {' and '.join(NEED_DATA)} are left out", file=sys.stderr, flush=True
    )
    lines = [line for line in PROMPTS.read_text(encoding="utf-8").splitlines() if line.strip()]
    captions = [lines[number % len(lines)] for number in range(settings.prompts)]
    return Exam(
        captions,
        [settings.seed * 1_000_003 + number for number in range(settings.prompts)],
        evaluator,
        None,
    )


def student_pictures(
    settings: BundleBenchSettings, manifest: Manifest, exam: Exam, sigmas: Sequence[float]
) -> Pictures:
    """The torch student's in float32, of the bundle's default size: uint8 `(P, height, width, 3)`.

    Raises:
        UsageError: it cannot be loaded, or its latents are not the bundle's.
    """
    print(f"drawing with {REFERENCE}", file=sys.stderr, flush=True)
    family = _load(settings.student)
    latent, size = manifest.latent, manifest.default_size
    own = (family.name, family.latent_channels, family.downscale)
    if own != (manifest.family, latent.channels, latent.downscale):
        raise UsageError(
            f"--student={settings.student} is a {own[0]} with {own[1]} latent channels at a factor of {own[2]}, and "
            f"the bundle a {manifest.family} with {latent.channels} at {latent.downscale}; name the folder that it was "
            "exported from"
        )
    family.latent_size = (size.height // latent.downscale, size.width // latent.downscale)
    parts = []
    for rows in _batches(len(exam.captions), settings.batch):
        conditioning = family.encode(exam.captions[rows])
        parts.append(decode(family, sample(family, conditioning, sigmas, exam.seeds[rows])))
    return np.concatenate(parts)


def _load(student: Path) -> Family:
    try:
        return load_family(student)
    except FamilyError as error:
        raise UsageError(f"--student: {error}") from error


def bundle_pictures(
    settings: BundleBenchSettings, bundle: Bundle, engine: str, exam: Exam, sigmas: Sequence[float]
) -> Pictures:
    """The bundle's on one runtime and precision: uint8 `(P, height, width, 3)`."""
    print(f"drawing with {engine}", file=sys.stderr, flush=True)
    runtime, precision = engine.split(":")
    loaded = load_engine(
        bundle, EngineOptions(runtime, precision, settings.threads, max_batch=settings.batch)
    )
    try:
        return np.concatenate(
            [
                _draw(loaded, exam.captions[rows], exam.seeds[rows], sigmas)
                for rows in _batches(len(exam.captions), settings.batch)
            ]
        )
    finally:
        loaded.close()


def _draw(engine: Engine, captions: list[str], seeds: list[int], sigmas: Sequence[float]) -> Pictures:
    latent, size = engine.manifest.latent, engine.manifest.default_size
    shape = (latent.channels, size.height // latent.downscale, size.width // latent.downscale)
    conditioning = engine.encode([engine.tokenize(caption) for caption in captions])
    x, rows = [engine.put(noise(seed, shape)) for seed in seeds], len(seeds)
    for sigma, sigma_next in pairwise(sigmas):
        x, _ = engine.denoise(x, [sigma] * rows, [sigma_next] * rows, conditioning)
    return engine.decode(x)


def _batches(count: int, size: int) -> list[slice]:
    return [slice(at, at + size) for at in range(0, count, size)]


def psnr(picture: Pictures, reference: Pictures) -> float:
    """Of two pictures, in dB; `EQUAL_DB` at most, which equal ones have."""
    error = picture.astype(np.float64) - reference.astype(np.float64)
    mean_square = float(np.mean(error**2))
    return min(EQUAL_DB, 10 * math.log10(255**2 / mean_square)) if mean_square else EQUAL_DB


def scores(exam: Exam, made: Pictures, reference: Pictures) -> dict[str, float]:
    """What the evaluator says of one picture per prompt; the first two of the evaluator alone, the rest with data.

    `own caption`: mean cosine similarity of a picture and its caption. `to torch's`: Fréchet distance to `reference`.
    """
    seen, other = exam.evaluator.images(made), exam.evaluator.images(reference)
    similarity = np.einsum("pe,pe->p", seen.embedding, exam.evaluator.texts(exam.captions))
    found = {
        "own caption": float(similarity.mean()),
        "Fréchet to torch's": max(0.0, metrics.frechet_distance(seen.features, other.features)),
    }
    if exam.scorer is not None:
        overall = exam.scorer.score(made)["overall"]
        found |= {
            "alignment": overall["alignment"],
            "alignment ±": overall["alignment_error"],
            "Fréchet": overall["frechet"],
        }
    return found
