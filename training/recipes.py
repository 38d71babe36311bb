"""Recipes: functions that return a config. `cdm-train NAME` runs one; every field of it is a flag.

    config = emoji_cdm().model_copy(update={"weight_cdm": 0.0})

`--variant` puts another objective into a recipe (`training/variants.py`). Only here does distillation know of emoji: a
prompt source and default folders.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

from pydantic import Field, ValidationError, create_model

from engines.cli import CommandSettings
from training.config import CDMConfig, ConsistencyConfig, MachineConfig, OptimConfig
from training.errors import TrainingError
from training.trackers import Kind
from training.variants import Variant, changes
from training.watchdog import WatchdogConfig

if TYPE_CHECKING:
    from training.prompts import Prompts

CAPTIONS_PER_PICTURE = 4
"""Wordings drawn per picture for the emoji prompt list; equal ones are one prompt."""


def sd3_cdm() -> CDMConfig:
    """SD3-Medium as published: full fine-tuning at 1024², 4001 fake-teacher and 2000 student steps of 128 prompts."""
    return CDMConfig()


def sd35_cdm() -> CDMConfig:
    """SD3.5-Medium, with SD3-Medium's published settings: it was not published itself."""
    return sd3_cdm()


def longcat_cdm() -> CDMConfig:
    """LongCat-Image as published: 2001 fake-teacher and 1000 student steps of 64 prompts, all else as SD3-Medium."""
    return CDMConfig(steps=2001, batch=64)


def emoji_cdm() -> CDMConfig:
    """The full objective sized for the bundled 8–20 M parameter model on two CPU cores.

    Schedules are shorter (few-step students are run at 1–8 steps), and learning rates higher, as small models want.
    CA + DM aim at v_c + g·(v_c − v_∅), classifier-free guidance at scale g + 1: the 4 that the teacher is drawn with.
    """
    return CDMConfig(n_max=8, steps=500, batch=16, lr_student=1e-4, lr_fake=2e-4, guidance=3.0)


def emoji_consistency() -> ConsistencyConfig:
    """Consistency distillation of the bundled model: its teacher's guidance, and the budget of `emoji_cdm`.

    The teacher is fed sin(1000·σ), so its exact derivative is mostly ripples far finer than a sampler's step, and what
    follows them diverges (LOG); a difference over σ ± 0.02 does not see them.
    """
    return ConsistencyConfig(
        steps=500, batch=16, lr_student=1e-4, guidance=4.0, tangent_step=0.02, cooldown=150
    )


def sd3_consistency() -> ConsistencyConfig:
    """Consistency distillation with the budget of `sd3_cdm`; a baseline of ours, with no published numbers.

    SD3 is fed sin(1000·σ) as the emoji teacher is: `emoji_consistency` says why its derivative is a difference.
    """
    return ConsistencyConfig(tangent_step=0.02)


class TrainSettings(CommandSettings, MachineConfig, WatchdogConfig):  # type: ignore[misc]  # model_configs are merged
    """What every distillation asks beside its constants."""

    product: ClassVar[str] = "student"
    """Folder of the result, within OUT."""

    teacher: Path = Field(description="the teacher: a local diffusers folder, or a hub id such as org/name")
    teacher_lora: Path | None = Field(
        None, description="LoRA (file or folder) merged into the teacher before anything else"
    )
    out: Path = Field(description="run folder; the student is written to OUT/student")
    save_minutes: float = Field(5.0, gt=0, description="minutes between checkpoints")
    keep: int = Field(2, ge=1, description="newest checkpoints that are kept")
    sample_every: int = Field(
        250, ge=0, description="steps between sample grids in OUT/samples; 0 draws none"
    )
    export_every: int = Field(
        0, ge=0, description="steps between exports of the averaged student; 0: at the end only"
    )
    score_every: int = Field(
        0, ge=0, description="steps between scores, each with a checkpoint; the best is kept. 0: none"
    )
    tracker: Kind = Field(
        "tensorboard",
        description="where curves and grids are sent as well: OUT/tensorboard, Weights & Biases",
    )
    embeddings: Path = Field(
        Path("runs/embeddings"), description="cache of prompt embeddings, shared by runs"
    )
    max_embedding_gb: float = Field(1000.0, gt=0, description="most disk for prompt embeddings")

    def config(self) -> OptimConfig:
        """The part that decides what is learnt."""
        raise NotImplementedError

    def watchdog_config(self) -> WatchdogConfig:
        """What the watchdog may do, and when."""
        return WatchdogConfig(**{name: getattr(self, name) for name in WatchdogConfig.model_fields})

    def recipe(self) -> str:
        """What provenance calls it: `emoji_cdm` of the prefix `CDM_EMOJI_CDM_`."""
        return str(self.model_config["env_prefix"]).removeprefix("CDM_").rstrip("_").lower()


class PromptedSettings(TrainSettings):
    """What is learnt from prompts alone."""

    prompts: list[Path] = Field(
        min_length=1,
        description="prompt lists (.txt, .jsonl, .parquet; `prompt` and maybe `weight`), or folders of them",
    )


class DistilSettings(PromptedSettings, CDMConfig):  # type: ignore[misc]
    """Distil a teacher into a few-step student; the same command resumes."""

    variant: Variant = Field(
        "cdm", description="objective: CDM, the authors' code, an ablation, DMD2; flags that are given win"
    )

    def config(self) -> CDMConfig:
        """The recipe's constants, those of the variant, and those that were given, the later winning."""
        base = {name: getattr(self, name) for name in CDMConfig.model_fields}
        given = {name: base[name] for name in base if name in self.model_fields_set}
        varied = changes(self.variant, CDMConfig(**base), super().recipe().split("_")[0])
        return made(CDMConfig, {**base, **varied, **given})

    def recipe(self) -> str:
        """As for all, and the variant."""
        return super().recipe() + ("" if self.variant == "cdm" else f" {self.variant}")


Config = TypeVar("Config", bound=OptimConfig)


def made(kind: type[Config], values: Mapping[str, Any]) -> Config:
    """A config of values that were each right by themselves.

    Raises:
        TrainingError: together they are not.
    """
    try:
        return kind(**values)
    except ValidationError as error:
        raise TrainingError(str(error.errors()[0]["msg"]).removeprefix("Value error, ")) from error


class ConsistencySettings(PromptedSettings, ConsistencyConfig):  # type: ignore[misc]
    """Distil a teacher by continuous-time consistency; the same command resumes."""

    def config(self) -> ConsistencyConfig:
        """The part that decides what is learnt."""
        return ConsistencyConfig(**{name: getattr(self, name) for name in ConsistencyConfig.model_fields})


RUNTIME_FIELDS = (
    *(
        name
        for name in DistilSettings.model_fields
        if name not in CDMConfig.model_fields and name != "variant"
    ),
    "student",
    "general",
    "pictures",
)
"""Settings that a resumed run may change: they decide how it is run, not what it learns."""


def settings_of(
    kind: type[TrainSettings], recipe: Callable[[], OptimConfig], env_prefix: str, others: Mapping[str, Any],
    prompts_help: str = "",
) -> type[Any]:  # fmt: skip
    """Settings of `kind` with a recipe's values, and `others`, as defaults."""
    defaults = {**recipe().model_dump(), **others}
    fields = {}
    for name, value in defaults.items():
        info = kind.model_fields[name]
        description = prompts_help if name == "prompts" and prompts_help else info.description
        fields[name] = (info.annotation, info.merge_field_infos(info, default=value, description=description))
    created: type[Any] = create_model(  # type: ignore[call-overload]
        "RecipeSettings", __base__=kind, __doc__=kind.__doc__, __cls_kwargs__={"env_prefix": env_prefix}, **fields,
    )  # fmt: skip
    return created


_EMOJI = "dataset folder, from `cdm-train emoji-data`, or prompt lists (.txt, .jsonl, .parquet)"
SD3 = Path("stabilityai/stable-diffusion-3-medium-diffusers")
SD35 = Path("stabilityai/stable-diffusion-3.5-medium")
LONGCAT = Path("meituan-longcat/LongCat-Image")

EmojiCDMSettings = settings_of(
    DistilSettings, emoji_cdm, "CDM_EMOJI_CDM_",
    {"prompts": [Path("data/emoji")], "out": Path("runs/emoji-cdm")}, _EMOJI,
)  # fmt: skip
EmojiConsistencySettings = settings_of(
    ConsistencySettings, emoji_consistency, "CDM_EMOJI_CONSISTENCY_",
    {"prompts": [Path("data/emoji")], "out": Path("runs/emoji-consistency")}, _EMOJI,
)  # fmt: skip
SD3CDMSettings = settings_of(
    DistilSettings, sd3_cdm, "CDM_SD3_CDM_", {"teacher": SD3, "out": Path("runs/sd3-cdm")}
)
SD35CDMSettings = settings_of(
    DistilSettings, sd35_cdm, "CDM_SD35_CDM_", {"teacher": SD35, "out": Path("runs/sd35-cdm")}
)
LongCatCDMSettings = settings_of(
    DistilSettings, longcat_cdm, "CDM_LONGCAT_CDM_", {"teacher": LONGCAT, "out": Path("runs/longcat-cdm")}
)
SD3ConsistencySettings = settings_of(
    ConsistencySettings, sd3_consistency, "CDM_SD3_CONSISTENCY_",
    {"teacher": SD3, "out": Path("runs/sd3-consistency")},
)  # fmt: skip


def train_emoji(settings: PromptedSettings) -> int:
    """Run a recipe on emoji captions, or on prompt lists."""
    return _train(settings, read_or_emoji(settings.prompts))


def train_listed(settings: PromptedSettings) -> int:
    """Run a recipe on prompt lists."""
    from training.prompts import read_prompts

    return _train(settings, read_prompts(settings.prompts))


def read_or_emoji(paths: list[Path]) -> Prompts:
    """Emoji captions of a dataset folder, or prompt lists."""
    from training.prompts import read_prompts

    first = paths[0]
    if first == Path("data/emoji") and not first.exists():
        raise TrainingError(f"{first} is not there; run `cdm-train emoji-data`, or give --prompts a list")
    if len(paths) == 1 and (first / "dataset.json").is_file():
        return emoji_prompts(first)
    return read_prompts(paths)


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


def _train(settings: TrainSettings, prompts: Prompts) -> int:
    from training.session import train  # torch is not needed to show a command's help

    return train(settings, prompts)
