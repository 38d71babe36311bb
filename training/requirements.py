"""What must hold before the first step, each a question with a clear answer: a mistake found after hours is too late.

    require_prompts(prompts.texts, config.batch)
    require_model(family)
    require_embeddings(family, table)
    require_disk(out, [Need("3 checkpoints", 9_000_000_000), …])

All raise `TrainingError`, which says what was wrong, what is needed and what to do.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Collection, Iterable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from engines.families.base import FAMILIES, INDEX, Conditioning, Family
from training.config import ConsistencyConfig, OptimConfig
from training.embeddings import EmbeddingTable
from training.errors import TrainingError
from training.report.words import size
from training.rollout import family_shift


def require_prompts(texts: Sequence[str], batch: int) -> None:
    """A batch's worth of distinct prompts, at least."""
    distinct = len(set(texts))
    if not distinct:
        raise TrainingError("there are no prompts; give a list with at least as many as --batch")
    if distinct < batch:
        raise TrainingError(
            f"{distinct} distinct prompts are fewer than --batch={batch}: every step would see the same ones several "
            f"times; give more prompts, or --batch={distinct} or less"
        )


def require_components(folder: Path) -> None:
    """Every component that the folder's index names is there, with its configuration and weights; nothing is loaded."""
    try:
        entries = json.loads((folder / INDEX).read_text(encoding="utf-8")).items()
    except (OSError, ValueError, AttributeError) as error:
        raise TrainingError(
            f"{folder / INDEX} cannot be read ({error}); --teacher takes a local diffusers folder"
        ) from error
    named = [name for name, entry in entries if isinstance(entry, list) and entry[0] is not None]
    for name in named:
        part = folder / name
        if not part.is_dir():
            raise TrainingError(
                f"{folder} lacks its component {name}, which {INDEX} names; save or download it again"
            )
        weighted = name in ("transformer", "vae") or name.startswith("text_encoder")
        if weighted and not any(part.glob("*.safetensors")):
            raise TrainingError(
                f"{part} has no weights (*.safetensors), only {_listed(file.name for file in part.iterdir())}; save or "
                "download it again, with safetensors"
            )
        for file in sorted(part.glob("*.safetensors")):
            try:
                with safe_open(file, "pt"):
                    pass
            except SafetensorError as error:
                raise TrainingError(f"{file} is damaged ({error}); save or download it again") from error


def require_resolution(side: int, unit: int, table: int | None) -> None:
    """Pictures of `side`² have a whole number of tokens of `unit`² pixels, and no more than `table`² of them."""
    if side % unit:
        raise TrainingError(
            f"--resolution={side}: pictures of this teacher have sides of multiples of {unit}"
        )
    if table is not None and side > table * unit:
        raise TrainingError(
            f"--resolution={side}: the teacher's position table ends at {table * unit}; give at most that"
        )


def require_model(family: Family) -> None:
    """Transformer and autoencoder speak of the same latents, and the latents fall into whole patches."""
    made = int(getattr(family.vae.config, "latent_channels", 0))
    if made != family.latent_channels:
        raise TrainingError(
            f"the autoencoder's latents have {made} channels, the transformer takes {family.latent_channels}; use the "
            "autoencoder that the transformer was trained with"
        )
    patch = family.patch_size
    if any(side % patch for side in family.latent_size):
        height, width = family.latent_size
        raise TrainingError(
            f"latents of {height}×{width} do not fall into the transformer's patches of {patch}×{patch}; give a "
            f"--resolution that is a multiple of {patch * family.downscale}"
        )


def require_embeddings(family: Family, table: EmbeddingTable) -> None:
    """The transformer takes the table's rows: one forward of one prompt would say the same, minutes later."""
    config, row = family.transformer.config, table.empty
    wanted = {
        "encoder_hidden_states": getattr(config, "joint_attention_dim", None),
        "pooled_projections": getattr(config, "pooled_projection_dim", None),
    }
    for name, width in wanted.items():
        if name in row and width is not None and row[name].shape[-1] != width:
            raise TrainingError(
                f"embeddings {name} are {_shape(row[name])} per prompt, the transformer takes a width of {width}; "
                "these are another model's: delete the embedding folder, or use the teacher's own text encoders"
            )
    _require_finite(row)


def require_optimizer(config: OptimConfig) -> None:
    """What the optimizer needs is installed."""
    if config.optimizer == "adamw8bit" and find_spec("bitsandbytes") is None:
        raise TrainingError(
            "--optimizer=adamw8bit needs bitsandbytes, which is not installed; `pip install bitsandbytes`, or leave "
            "--optimizer at adamw"
        )


def require_parity_shift(family: Family, shift: float) -> None:
    """`--variant parity` shifts anchors as this teacher's scheduler does at the size that is trained.

    Raises:
        TrainingError: it does not.
    """
    own = family_shift(family)
    if abs(own - shift) > 1e-3 * own:
        raise TrainingError(
            f"--variant=parity passes anchors through the scheduler's shift, {shift:g} for this recipe's teacher at "
            f"its full size; this one's is {own:.5g}; give --anchor-shift {own:.5g}"
        )


def require_shardable(config: OptimConfig) -> None:
    """Optimizer and method work on sharded weights (FSDP)."""
    if config.optimizer == "adamw8bit":
        raise TrainingError(
            "--optimizer=adamw8bit keeps moments in blocks that cannot be sharded; give --optimizer adamw, or "
            "--parallel ddp"
        )
    if isinstance(config, ConsistencyConfig) and config.tangent_step == 0:
        raise TrainingError(
            "tangent_step=0 takes forward-mode derivatives, which FSDP's sharded weights do not have; give "
            "--parallel ddp, or --tangent-step 0.02"
        )


def require_family(folder: Path) -> None:
    """The folder's index names a pipeline that is known here."""
    try:
        named = json.loads((folder / INDEX).read_text(encoding="utf-8"))["_class_name"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise TrainingError(
            f"{folder / INDEX} cannot be read ({error}); --teacher takes a diffusers folder"
        ) from error
    if named not in FAMILIES:
        raise TrainingError(f"{folder} is a {named}; families known here: {', '.join(FAMILIES)}")


def require_same_shapes(student: Path, teacher: Path) -> None:
    """Both folders' transformers have the same tensors, by the headers of their files."""
    have, want = (tensor_shapes(folder / "transformer") for folder in (student, teacher))
    for name in sorted(have.keys() ^ want.keys()) or [name for name in want if have[name] != want[name]]:
        raise TrainingError(
            f"--student={student} has another shape than the teacher: {name} is {have.get(name, 'absent')} there and "
            f"{want.get(name, 'absent')} in the teacher; give the student that was distilled from this teacher's base"
        )


def tensor_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Of all tensors in a component's safetensors files, by name."""
    found: dict[str, tuple[int, ...]] = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as opened:
            found |= {name: tuple(opened.get_slice(name).get_shape()) for name in opened.keys()}  # noqa: SIM118
    return found


def stored_numbers(folder: Path) -> int:
    """How many numbers a component's safetensors files hold, by their headers alone; 0 where there are none."""
    return sum(math.prod(shape) for shape in tensor_shapes(folder).values())


class Need(NamedTuple):
    """Something that will be written."""

    what: str
    size: int
    """In bytes."""


def checkpoint_bytes(parameters: int, trained: int, roles: int, adam_bytes: int = 8) -> int:
    """Size of one checkpoint: average of the student, masters and moments of each of `roles`.

    `parameters` of the student's average, `trained` of one role, `adam_bytes` of its two moments per parameter.
    """
    return 4 * parameters + roles * trained * (4 + adam_bytes)


def require_disk(folder: Path, needs: Collection[Need]) -> None:
    """The file system of `folder` (it may not exist yet) has room for all `needs`."""
    existing = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    free, wanted = shutil.disk_usage(existing).free, sum(need.size for need in needs)
    if wanted > free:
        parts = ", ".join(f"{need.what} {size(need.size)}" for need in needs if need.size)
        raise TrainingError(
            f"{folder} needs {size(wanted)} ({parts}) and its disk has {size(free)} free; make room, "
            "keep fewer checkpoints, or put --out on another disk"
        )


def _require_finite(row: Conditioning) -> None:
    for name, value in row.items():
        if not bool(torch.isfinite(value).all()):
            raise TrainingError(
                f"embeddings {name} of the empty prompt are not finite; delete the embedding folder and run again"
            )


def _shape(value: Tensor) -> str:
    return "×".join(map(str, value.shape[1:]))


def _listed(names: Iterable[str]) -> str:
    found = sorted(names)
    return ", ".join(found[:3]) + (" …" if len(found) > 3 else "") if found else "nothing"
