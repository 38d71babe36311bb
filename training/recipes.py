"""Recipes: functions that return a config. `cdm-train NAME` runs one; every field of it is a flag.

    config = emoji_cdm().model_copy(update={"weight_cdm": 0.0})

A variant is a call and a change. Only here does distillation know of emoji: a prompt source and default folders.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import Field, create_model

from engines.cli import CommandSettings
from training.config import CDMConfig
from training.errors import TrainingError

if TYPE_CHECKING:
    from training.prompts import Prompts

CAPTIONS_PER_PICTURE = 4
"""Wordings drawn per picture for the emoji prompt list; equal ones are one prompt."""


def sd3_cdm() -> CDMConfig:
    """SD3-Medium as published: full fine-tuning at 1024², 4001 fake-teacher and 2000 student steps.

    What other recipes are measured against. No command runs it yet: that takes a device setting and gradient
    accumulation, for three networks of 2 billion parameters and a batch of 128.
    """
    return CDMConfig()


def emoji_cdm() -> CDMConfig:
    """The full objective sized for the bundled 8–20 M parameter model on two CPU cores.

    Schedules are shorter (few-step students are run at 1–8 steps), and learning rates higher, as small models want.
    CA + DM aim at v_c + g·(v_c − v_∅), classifier-free guidance at scale g + 1: the 4 that the teacher is drawn with.
    """
    return CDMConfig(n_max=8, steps=1000, batch=16, lr_student=1e-4, lr_fake=2e-4, guidance=3.0)


class DistilSettings(CommandSettings, CDMConfig):  # type: ignore[misc]  # two kinds of model_config, merged by pydantic
    """Distil a teacher into a few-step student; the same command resumes."""

    teacher: Path = Field(description="the teacher: a local diffusers folder")
    prompts: Path = Field(
        description="prompt list (.txt, one a line, or .jsonl with `prompt` and maybe `weight`)"
    )
    out: Path = Field(description="run folder; the student is written to OUT/student")
    save_minutes: float = Field(5.0, gt=0, description="minutes between checkpoints")
    sample_every: int = Field(
        250, ge=0, description="steps between sample grids in OUT/samples; 0 draws none"
    )
    export_every: int = Field(
        0, ge=0, description="steps between exports of the averaged student; 0: at the end only"
    )
    pass_batch: int = Field(128, ge=1, description="most samples in one no-gradient pass of a network")
    max_embedding_gb: float = Field(8.0, gt=0, description="most memory for prompt embeddings")
    threads: int = Field(1, ge=1, description="CPU threads")

    def config(self) -> CDMConfig:
        """The part that decides what is learnt."""
        return CDMConfig(**{name: getattr(self, name) for name in CDMConfig.model_fields})


RUNTIME_FIELDS = tuple(name for name in DistilSettings.model_fields if name not in CDMConfig.model_fields)
"""Settings that a resumed run may change: they decide how it is run, not what it learns."""


def _settings(
    recipe: Callable[[], CDMConfig], env_prefix: str, paths: dict[str, Path], prompts_help: str = ""
) -> type[DistilSettings]:
    """`DistilSettings` with a recipe's values, and `paths`, as defaults."""
    defaults = {**recipe().model_dump(), **paths}
    fields = {}
    for name, value in defaults.items():
        info = DistilSettings.model_fields[name]
        description = prompts_help if name == "prompts" and prompts_help else info.description
        fields[name] = (info.annotation, info.merge_field_infos(info, default=value, description=description))
    created: type[DistilSettings] = create_model(  # type: ignore[call-overload]
        "RecipeSettings", __base__=DistilSettings, __doc__=DistilSettings.__doc__,
        __cls_kwargs__={"env_prefix": env_prefix}, **fields,
    )  # fmt: skip
    return created


EmojiCDMSettings = _settings(
    emoji_cdm,
    "CDM_EMOJI_CDM_",
    {"prompts": Path("data/emoji"), "out": Path("runs/emoji-cdm")},
    "dataset folder, from `cdm-train emoji-data`, or a prompt list (.txt, .jsonl)",
)


def train_emoji(settings: DistilSettings) -> int:
    """Run `emoji_cdm`."""
    from training.prompts import read_prompts

    listed = not settings.prompts.is_dir()
    return _train(settings, "emoji_cdm", (read_prompts if listed else emoji_prompts)(settings.prompts))


def emoji_prompts(folder: Path) -> Prompts:
    """Captions of the training split: `CAPTIONS_PER_PICTURE` wordings of each picture, concepts weighted evenly.

    Raises:
        TrainingError: no dataset in `folder`.
    """
    import numpy as np

    from training.emoji.dataset import EmojiDataset, caption
    from training.emoji.fetch import DataError
    from training.prompts import Prompts

    try:
        data = EmojiDataset.load(folder)
    except DataError as error:
        raise TrainingError(str(error)) from error
    rows = data.indices("train")
    rng = np.random.default_rng(0)
    pairs = [
        (caption(data.records[row], rng), weight)
        for row, weight in zip(rows, data.concept_weights(rows), strict=True)
        for _ in range(CAPTIONS_PER_PICTURE)
    ]
    return Prompts.of(pairs, str(folder))


def _train(settings: DistilSettings, recipe: str, prompts: Prompts) -> int:
    from training.session import train  # torch is not needed to show a command's help

    return train(settings, recipe, prompts)
