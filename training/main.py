"""`cdm-train`: everything between a data source and a student."""

from __future__ import annotations

from collections.abc import Sequence

from engines.commands import Command, run_commands

USER_ERRORS = (
    "training.errors:TrainingError",
    "training.emoji.fetch:DataError",
    "engines.families.base:FamilyError",
)

COMMANDS = {
    "emoji-data": Command(
        "training.emoji.build:EmojiDataSettings",
        "training.emoji.build:build",
        "fetch the icon sets and write the emoji data set",
        extra="train",
        epilog="cdm-train emoji-data\ncdm-train emoji-data --sets noto,twemoji --size 64 --out data/small",
        user_errors=("training.emoji.fetch:DataError",),
    ),
    "emoji-autoencoder": Command(
        "training.emoji.autoencoder:AutoencoderSettings",
        "training.emoji.autoencoder:train",
        "train the picture codec",
        extra="train",
        epilog="cdm-train emoji-autoencoder\ncdm-train emoji-autoencoder --steps 200 --out runs/try",
        user_errors=USER_ERRORS,
    ),
    "emoji-teacher": Command(
        "training.emoji.teacher:TeacherSettings",
        "training.emoji.teacher:train",
        "train the teacher by flow matching",
        extra="train",
        user_errors=USER_ERRORS,
    ),
    "emoji-evaluator": Command(
        "training.emoji.evaluator:EvaluatorSettings",
        "training.emoji.evaluator:train",
        "train the image-text encoder that judges pictures",
        extra="train",
        user_errors=USER_ERRORS,
    ),
    "emoji-cdm": Command(
        "training.recipes:EmojiCDMSettings",
        "training.recipes:train_emoji",
        "distil the teacher into a few-step student",
        extra="train",
        epilog="cdm-train emoji-cdm --teacher training/assets/teacher\n"
        "cdm-train emoji-cdm --teacher T --variant dmd2 --out runs/dmd2",
        user_errors=USER_ERRORS,
    ),
    "emoji-consistency": Command(
        "training.recipes:EmojiConsistencySettings",
        "training.recipes:train_emoji",
        "the same by consistency distillation, to compare with",
        extra="train",
        user_errors=USER_ERRORS,
    ),
    "sd3-cdm": Command(
        "training.recipes:SD3CDMSettings",
        "training.recipes:train_listed",
        "distil SD3-Medium, with the published settings",
        extra="train",
        epilog="cdm-train sd3-cdm --prompts prompts.txt --student-rank 64 --fake-rank 64\n"
        "accelerate launch -m training.main sd3-cdm --prompts prompts.txt --parallel fsdp",
        user_errors=USER_ERRORS,
    ),
    "sd35-cdm": Command(
        "training.recipes:SD35CDMSettings",
        "training.recipes:train_listed",
        "distil SD3.5-Medium, with SD3-Medium's settings",
        extra="train",
        user_errors=USER_ERRORS,
    ),
    "longcat-cdm": Command(
        "training.recipes:LongCatCDMSettings",
        "training.recipes:train_listed",
        "distil LongCat-Image, with the published settings",
        extra="train",
        user_errors=USER_ERRORS,
    ),
    "sd3-consistency": Command(
        "training.recipes:SD3ConsistencySettings",
        "training.recipes:train_listed",
        "SD3-Medium by consistency distillation, to compare with",
        extra="train",
        user_errors=USER_ERRORS,
    ),
    "finetune": Command(
        "training.recipes_tuning:FinetuneTeacherSettings",
        "training.recipes_tuning:train_finetune",
        "fine-tune a teacher by flow matching on captioned pictures",
        extra="train",
        epilog="cdm-train finetune --teacher T --pictures my-pictures --out runs/mine\n"
        "cdm-train finetune --teacher T --pictures P --student-rank 16 --student-alpha 16",
        user_errors=USER_ERRORS,
    ),
    "finetune-student": Command(
        "training.recipes_tuning:FinetuneStudentSettings",
        "training.recipes_tuning:train_keep",
        "fine-tune a distilled student towards its fine-tuned teacher, without blurring it",
        extra="train",
        epilog="cdm-train finetune-student --teacher runs/mine/model --student S --prompts mine.txt --general p.txt",
        user_errors=USER_ERRORS,
    ),
    "emoji-finetune-student": Command(
        "training.recipes_tuning:EmojiKeepSettings",
        "training.recipes_tuning:train_keep",
        "the same for the bundled student",
        extra="train",
        user_errors=USER_ERRORS,
    ),
    "evaluate": Command(
        "training.evaluate:EvaluateSettings",
        "training.evaluate:evaluate",
        "measure any diffusers folder at any step count",
        extra="train",
        epilog="cdm-train evaluate training/assets/teacher --steps 50 --steps 4 --guidance 4",
        user_errors=USER_ERRORS,
    ),
    "plan": Command(
        "training.plan:PlanSettings",
        "training.plan:plan",
        "memory by part and time per step of a recipe, before anything is loaded",
        extra="train",
        epilog="cdm-train plan sd3-cdm --gpus 8 --memory 80",
        user_errors=USER_ERRORS,
    ),
    "report": Command(
        "training.report.write:ReportSettings",
        "training.report.write:report",
        "write one HTML page of a run: curves, pictures, tables, settings",
        extra="train",
        epilog="cdm-train report runs/emoji-cdm",
        user_errors=USER_ERRORS,
    ),
    "samples": Command(
        "training.samples:SamplesSettings",
        "training.samples:samples",
        "draw fixed prompts with teacher and student, side by side",
        extra="train",
        epilog="cdm-train samples --teacher training/assets/teacher --out look.png",
        user_errors=USER_ERRORS,
    ),
}
"""A recipe is one line here; nothing is imported before its command is asked for."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the sub-command that `argv` (default: the process's arguments) begins with."""
    return run_commands(COMMANDS, argv, "cdm-train", "Distil a teacher into a few-step student.")


if __name__ == "__main__":
    raise SystemExit(main())
