"""From a recipe's settings to a student folder: load, embed, distil, draw grids, export."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from engines.export.source import find_student
from engines.families.base import Family, FamilyError, load_family
from training import checkpoint
from training.adapter import AdapterRecord, save_adapter
from training.config import CDMConfig, ConsistencyConfig, FinetuneConfig, OptimConfig
from training.consistency import Consistency
from training.cpu_kernels import keep_freed_memory
from training.distill import Distillation, Method, distill
from training.embedding_cache import EmbeddingCache
from training.embeddings import EmbeddingTable, embed_prompts
from training.environment import record_start
from training.errors import Collapsed, TrainingError
from training.grid import tile
from training.lora import fold
from training.means import Values
from training.merge import with_lora
from training.parallel import Parallel
from training.probe import Probe
from training.prompts import Prompts
from training.recipes import RUNTIME_FIELDS, DistilSettings, TrainSettings
from training.report.write import write_report
from training.requirements import (
    Need,
    checkpoint_bytes,
    require_components,
    require_disk,
    require_embeddings,
    require_family,
    require_model,
    require_optimizer,
    require_parity_shift,
    require_prompts,
    require_resolution,
    require_shardable,
    stored_numbers,
)
from training.roles import Computing, Roles
from training.run import Run, config_sha256, numpy_generator
from training.sampling import decode, sample, sample_renoise
from training.student_folder import (
    StudentProvenance,
    TeacherHashes,
    keep_teacher,
    teacher_bytes,
    teacher_licences,
    write_student,
)
from training.trackers import Trackers, require_tracker
from training.watchdog import Watchdog

GRID_PROMPTS = 8
GRID_STEPS = (1, 2, 4)
GRID_STEPS_GUIDED, GRID_GUIDANCE = (28,), 4.0
"""Of a model that is fine-tuned, not distilled."""
GRID_STREAM = 1000
"""Far from the streams of `training.distill`."""


class MakeMethod(Protocol):
    """What a run's networks learn: made once all is loaded."""

    def __call__(self, family: Family, roles: Roles, table: EmbeddingTable) -> Method: ...


def train(settings: TrainSettings, prompts: Prompts) -> int:
    """Distil by the settings' own objective; see `run_session`."""
    config, passes, micro = settings.config(), settings.pass_batch, settings.micro_batch

    def method(family: Family, roles: Roles, table: EmbeddingTable) -> Method:
        if isinstance(config, ConsistencyConfig):
            return Consistency(family, config, roles, prompts, table, passes, micro)
        assert isinstance(config, CDMConfig)
        return Distillation(family, config, roles, prompts, table, passes, micro)

    return run_session(settings, config, prompts, method)


def run_session(
    settings: TrainSettings, config: OptimConfig, prompts: Prompts, method: MakeMethod,
    hashes_of: Mapping[str, str] | None = None,
) -> int:  # fmt: skip
    """Train, and write `OUT/student` (or `settings.product`). The teacher is copied to `OUT/teacher` and read there.

    `hashes_of`: of what else decides the result, beside teacher and prompts.

    Raises:
        TrainingError: an unusable teacher, another run's folder, embeddings that do not fit, or `Diverged`.
    """
    torch.set_num_threads(settings.threads)
    keep_freed_memory()
    parallel = Parallel.start(settings.device, settings.parallel)
    _preflight(settings, config, prompts, parallel)
    teacher = find_student(settings.teacher).folder
    require_family(teacher)
    require_components(teacher)
    if settings.teacher_lora is not None:
        if parallel.main:
            with_lora(teacher, settings.teacher_lora, settings.out / "teacher-lora")
        parallel.barrier()
        teacher = settings.out / "teacher-lora"
    licences = teacher_licences(teacher)
    hashes, kept = TeacherHashes.of(teacher), settings.out / "teacher"
    identity = {
        "teacher_sha256": hashes.transformer,
        "teacher_components_sha256": hashes.components,
        "prompts_sha256": prompts.sha256(),
        **(hashes_of or {}),
    }
    _same_teacher(settings, hashes)
    recorded = {**settings.model_dump(mode="json"), **config.model_dump(mode="json"), **identity}
    free = (*RUNTIME_FIELDS, *(() if config.cooldown else ("steps",)))
    run = Run(
        settings.out, recorded, config.steps, settings.save_minutes, free, settings.keep,
        parallel.main, parallel.agree, parallel.barrier,
    )  # fmt: skip
    require_disk(settings.out, _written(settings, config, teacher))
    if parallel.main:
        keep_teacher(teacher, hashes, kept)
    parallel.barrier()
    cache = EmbeddingCache.of(kept, getattr(torch, config.dtype), settings.embeddings)
    # Text encoders are loaded by all processes or by none: each checks its own share of the cache.
    absent = parallel.agree(bool(cache.missing(prompts.texts, parallel.rank, parallel.world)))
    family = _load(kept, None if absent else ("transformer", "vae"))
    set_resolution(family, config.resolution)
    if (
        isinstance(settings, DistilSettings)
        and settings.variant == "parity"
        and "anchor_shift" not in settings.model_fields_set
    ):
        require_parity_shift(family, settings.config().anchor_shift)
    require_model(family)
    drawn = settings.sample_every or settings.score_every or isinstance(config, FinetuneConfig)
    for module in (*family.text_modules().values(), *((family.vae,) if drawn else ())):
        nn.Module.to(module, parallel.device)
    table = embed_prompts(
        family, prompts.texts, cache, limit_gb=settings.max_embedding_gb,
        rank=parallel.rank, world=parallel.world, barrier=parallel.barrier,
    )  # fmt: skip
    require_embeddings(family, table)
    family.drop_text_encoders()
    computing = Computing(
        family.fsdp_units, family.lora_targets, settings.gradient_checkpointing, settings.compile
    )
    roles = Roles(family.transformer, config, parallel, computing)
    require_disk(settings.out, [Need("checkpoints", _checkpoints(settings) * roles.checkpoint_bytes())])
    work = method(family, roles, table)

    trackers: list[Trackers] = []

    def start(step: int) -> None:
        if parallel.main:
            record_start(settings.out, step, parallel.device, settings.recipe())
        trackers.append(Trackers.start(settings.tracker, settings.out, recorded, step))

    def export(done: int) -> None:
        weights = roles.student_weights()  # of all processes' shards
        if parallel.main:
            provenance = StudentProvenance(
                teacher=f"{teacher.resolve().name} (transformer sha256 {hashes.transformer[:12]})",
                recipe=settings.recipe(),
                config_sha256=config_sha256(config.model_dump(mode="json")),
                steps_trained=done,
                licences=licences,
            )
            if roles.adapters is not None and config.student_rank:
                targets, size = family.lora_targets[config.lora_targets], roles.adapters.sizes["student"]
                record = AdapterRecord(
                    hashes.transformer, settings.recipe(), done, size.rank, size.alpha, targets
                )
                save_adapter(settings.out / "adapter", weights, record)
                base = load_family(kept, torch.float32, only=("transformer",)).transformer
                weights = fold(dict(base.named_parameters()), weights, size.scale)
            write_student(kept, settings.out / settings.product, weights, provenance)

    def after(done: int, values: Values) -> None:
        trackers[0].log(done - 1, values)
        if settings.sample_every and (done % settings.sample_every == 0 or done == config.steps):
            sheet = draw_grid(settings.out / "samples" / f"step-{done:08d}.png", work, prompts, table)
            trackers[0].image(done - 1, "samples", sheet)
        if settings.export_every and done % settings.export_every == 0 and done < config.steps:
            export(done)

    probe = Probe(family, roles, prompts, table, settings.pass_batch) if settings.score_every else None

    def score(done: int) -> checkpoint.Score | None:
        if probe is None or (done % settings.score_every and done < config.steps):
            return None
        rated = probe.score()
        run.record(done - 1, score=rated.value)
        trackers[0].log(done - 1, {"score": rated.value}, "score")
        return rated

    try:
        done = distill(work, run, Watchdog(settings.watchdog_config()), start, after, score)
    except Collapsed as error:
        if (left := run.healthy()) is None:
            raise
        roles.restore(left)
        export(left.step)
        made = settings.out / settings.product
        raise Collapsed(f"{error}; {made} is the one of {left.path.name}") from error
    finally:
        for each in trackers:
            each.close()
        if parallel.main and trackers:
            write_report(settings.out)
    export(done)
    if parallel.main:
        if (best := checkpoint.best(run.folder / "checkpoints")) is not None and best.score is not None:
            print(f"best score: {best.path.name} ({best.score.value:.4g}, lower is better)")
        print(
            f"{settings.product} after {done} steps: {settings.out / settings.product}; {write_report(settings.out)}"
        )
    return 0


def _preflight(settings: TrainSettings, config: OptimConfig, prompts: Prompts, parallel: Parallel) -> None:
    """Everything that can be told before a teacher is downloaded, hashed, copied or loaded.

    Raises:
        TrainingError: settings that cannot be together, too few prompts, or a package that is missing.
    """
    parallel.require_divisible(config.batch)
    require_optimizer(config)
    if parallel.fsdp:
        require_shardable(config)
    if parallel.main:  # which alone has one
        require_tracker(settings.tracker)
    if isinstance(config, FinetuneConfig):  # a hundred pictures may share one caption
        if settings.score_every:
            raise TrainingError(
                f"--score-every={settings.score_every} compares a few-step student with its teacher, and fine-tuning "
                "has none; leave it out, and measure the model with `cdm-train evaluate`"
            )
    else:
        require_prompts(prompts.texts, config.batch)


def _written(settings: TrainSettings, config: OptimConfig, teacher: Path) -> list[Need]:
    """What a run will write, as far as files tell; of LoRA's checkpoints more is known once the networks are there."""
    numbers = stored_numbers(teacher / "transformer")
    roles = 2 if isinstance(config, CDMConfig) else 1
    trained = 0 if config.student_rank else numbers
    kept = settings.out / "teacher"
    return [
        Need("copy of the teacher", 0 if kept.is_dir() else teacher_bytes(teacher)),
        Need("student", 2 * 4 * numbers),  # the one that is replaced stays until the new one is whole
        Need("checkpoints", _checkpoints(settings) * checkpoint_bytes(trained, trained, roles)),
    ]


def _checkpoints(settings: TrainSettings) -> int:
    """How many more there will be at a time than lie there now: those kept, the best, and the one being written."""
    there = len(list((settings.out / "checkpoints").glob("step-*")))
    return max(1, settings.keep + 1 + bool(settings.score_every) - there)


def set_resolution(family: Family, side: int) -> None:
    """Train at pictures of `side`² (0: the family's own size).

    Raises:
        TrainingError: no whole number of tokens, or more than the transformer's position table holds.
    """
    if not side:
        return
    unit = family.downscale * family.patch_size
    require_resolution(side, unit, getattr(family.transformer.config, "pos_embed_max_size", None))
    family.latent_size = (side // family.downscale, side // family.downscale)


def draw_grid(path: Path, work: Method, prompts: Prompts, table: EmbeddingTable) -> NDArray[np.uint8]:
    """Fixed prompts and seeds × 1, 2 and 4 steps of the averaged student; `prompts.json` names the columns.

    A student of consistency is re-noised, as it is made for; a fine-tuned teacher is drawn in 28 guided steps. Every
    process draws it, for the weights may be sharded; the first one writes. The sheet: `(H, W, 3)`.
    """
    family, config = work.family, work.roles.config
    tuned = isinstance(config, FinetuneConfig)
    counts, guidance = (GRID_STEPS_GUIDED, GRID_GUIDANCE) if tuned else (GRID_STEPS, 1.0)
    columns = prompts.draw(numpy_generator(config.seed, 0, GRID_STREAM), GRID_PROMPTS)
    device, seeds = work.roles.parallel.device, range(GRID_PROMPTS)
    cond, uncond = table.rows(columns, device), table.unconditional(GRID_PROMPTS, device)

    def drawn(steps: int) -> Tensor:
        sigmas = family.sigmas(steps)
        if isinstance(config, ConsistencyConfig):
            return sample_renoise(family, cond, sigmas, seeds)
        return sample(family, cond, sigmas, seeds, guidance, uncond)

    teacher = family.transformer
    with work.roles.averaged() as student, student.active():
        family.transformer = student.net
        try:
            # One picture at a time: decoding eight of 1024² at once takes tens of GB.
            rows = [decode(family, latents_CHW[None]) for steps in counts for latents_CHW in drawn(steps)]
        finally:
            family.transformer = teacher
    sheet = tile(np.concatenate(rows), GRID_PROMPTS)
    if not work.roles.parallel.main:
        return np.asarray(sheet)
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path)
    listing: dict[str, Any] = {
        "rows_are_steps": counts, "columns": [prompts.texts[index] for index in columns]
    }  # fmt: skip
    text = json.dumps(listing, indent=2, ensure_ascii=False)
    path.with_name("prompts.json").write_text(text + "\n", encoding="utf-8")
    return np.asarray(sheet)


def _same_teacher(settings: TrainSettings, hashes: TeacherHashes) -> None:
    kept = settings.out / "teacher"
    begun = checkpoint.latest(settings.out / "checkpoints") is not None
    if begun and kept.is_dir() and TeacherHashes.of(kept) != hashes:
        raise TrainingError(
            f"--teacher={settings.teacher} (teacher_sha256 {hashes.transformer[:12]}) is not, or no longer, what "
            f"{settings.out} distils; go on with the copy kept there, --teacher {kept}, or use another --out"
        )


def _load(folder: Path, only: Collection[str] | None) -> Family:
    try:
        return load_family(folder, torch.float32, only)
    except FamilyError as error:
        raise TrainingError(f"--teacher: {error}") from error
