"""Recipes of two phases: fine-tune a teacher, and then distil it, or let the student distilled before follow it.

cdm-train finetune --teacher T --pictures my-pictures --out runs/mine
cdm-train sd3-cdm --teacher runs/mine/model --prompts prompts.txt                       # a student of it, afresh
cdm-train finetune-student --teacher runs/mine/model --student S --prompts mine.txt --general prompts.txt
"""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

from pydantic import Field

from training.config import FinetuneConfig, KeepConfig
from training.recipes import PromptedSettings, TrainSettings, emoji_cdm, read_or_emoji, settings_of


def finetune() -> FinetuneConfig:
    """Flow matching of every weight, on few pictures: 1000 batches of 16."""
    return FinetuneConfig(steps=1000, batch=16)


def keep() -> KeepConfig:
    """The second phase: the student follows its teacher, fine-tuned before, and keeps what it could do."""
    return KeepConfig(steps=1001, warmup=50)


def emoji_keep() -> KeepConfig:
    """The same for the bundled model."""
    return KeepConfig(**{**emoji_cdm().model_dump(), "steps": 400, "warmup": 20, "fake_warmup": 50})


class KeepSettings(PromptedSettings, KeepConfig):  # type: ignore[misc]
    """Fine-tune a distilled student towards its fine-tuned teacher, without blurring it; the same command resumes."""

    student: Path = Field(description="the distilled student to start from: a diffusers folder")
    general: list[Path] = Field(
        min_length=1,
        description="prompts on which the student stays what it was: lists (.txt, .jsonl, .parquet), or folders",
    )

    def config(self) -> KeepConfig:
        """The part that decides what is learnt."""
        return KeepConfig(**{name: getattr(self, name) for name in KeepConfig.model_fields})


class FinetuneSettings(TrainSettings, FinetuneConfig):  # type: ignore[misc]
    """Fine-tune a model by flow matching on captioned pictures (a teacher; for students: finetune-student)."""

    product: ClassVar[str] = "model"

    teacher: Path = Field(description="the model to fine-tune: a local diffusers folder, or a hub id")
    pictures: Path = Field(
        description="folder with metadata.jsonl (`file_name`, `text` a line), or from `cdm-train emoji-data`"
    )

    out: Path = Field(description="run folder; the model is written to OUT/model, a LoRA to OUT/adapter")

    def config(self) -> FinetuneConfig:
        """The part that decides what is learnt."""
        return FinetuneConfig(**{name: getattr(self, name) for name in FinetuneConfig.model_fields})


EmojiKeepSettings = settings_of(
    KeepSettings, emoji_keep, "CDM_EMOJI_FINETUNE_STUDENT_",
    {"general": [Path("data/emoji")], "out": Path("runs/emoji-finetune-student")},
)  # fmt: skip
FinetuneStudentSettings = settings_of(
    KeepSettings, keep, "CDM_FINETUNE_STUDENT_", {"out": Path("runs/finetune-student")}
)
FinetuneTeacherSettings = settings_of(
    FinetuneSettings, finetune, "CDM_FINETUNE_", {"out": Path("runs/finetune")}
)


def train_keep(settings: KeepSettings) -> int:
    """Fine-tune a student on prompt lists, keeping it on general ones."""
    from training.tuning import train_student

    return train_student(settings, read_or_emoji(settings.prompts), read_or_emoji(settings.general))


def train_finetune(settings: FinetuneSettings) -> int:
    """Fine-tune a model on pictures."""
    from training.tuning import train_on_pictures

    return train_on_pictures(settings)
