"""`cdm-train emoji-cdm` whole: a tiny teacher in, a diffusers folder of a student out."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from engines.families.base import load_family
from training.config import CDMConfig
from training.errors import TrainingError
from training.main import main
from training.recipes import EmojiCDMSettings, emoji_cdm, sd3_cdm
from training.run import config_sha256

SMALL = (
    "--steps",
    "4",
    "--batch",
    "2",
    "--n-max",
    "2",
    "--warmup",
    "1",
    "--lr-student",
    "0.01",
    "--sample-every",
    "4",
)


@pytest.fixture(scope="module")
def teacher(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("teacher") / "tiny"
    shutil.copytree(tiny_model, folder)
    (folder / "provenance.json").write_text(json.dumps({"licences": ["MIT", "CC-BY-4.0"], "other": 1}))
    return folder


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("prompts") / "p.txt"
    path.write_text("red apple\ngreen apple\n")
    return path


@pytest.fixture(scope="module")
def run(teacher: Path, prompts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("run") / "out"
    arguments = ["emoji-cdm", "--teacher", str(teacher), "--prompts", str(prompts), "--out", str(out), *SMALL]
    assert main([*arguments, "--export-every", "2"]) == 0
    return out


def test_the_student_is_a_folder_like_its_teachers_with_other_weights(run, teacher):
    student, source = load_family(run / "student"), load_family(teacher)
    assert type(student) is type(source)
    a, b = (dict(family.transformer.state_dict()) for family in (student, source))
    assert a.keys() == b.keys()
    assert any(not torch.equal(a[name], b[name]) for name in a)
    assert all(value.dtype == torch.float32 for value in a.values())
    for module in ("vae", "text_encoder"):
        x, y = ((folder / module / "config.json").read_text() for folder in (run / "student", teacher))
        assert {**json.loads(x), "_name_or_path": ""} == {**json.loads(y), "_name_or_path": ""}


def test_the_student_holds_the_averaged_weights(run):
    from training import checkpoint

    average = checkpoint.latest(run / "checkpoints").tensors("student_ema")
    saved = dict(load_family(run / "student").transformer.named_parameters())
    assert average.keys() == saved.keys()
    for name, value in average.items():
        assert torch.equal(value, saved[name].detach()), name


def test_provenance_says_where_the_student_comes_from(run, teacher):
    from engines.export.export import read_provenance

    written = json.loads((run / "student" / "provenance.json").read_text())
    settings = json.loads((run / "config.json").read_text())
    config = {name: settings[name] for name in CDMConfig.model_fields}
    assert written["config_sha256"] == config_sha256(config)
    assert (written["recipe"], written["steps_trained"], written["metrics"]) == ("emoji_cdm", 4, {})
    assert written["licences"] == ["MIT", "CC-BY-4.0"]
    assert written["teacher"].startswith("tiny (transformer sha256 ")
    assert read_provenance(run / "student").licences == ("MIT", "CC-BY-4.0")


def test_what_is_not_trained_is_shared_with_the_copy_of_the_teacher_not_written_again(run):
    for name in ("vae", "text_encoder"):
        mine, kept = (next((run / folder / name).glob("*.safetensors")) for folder in ("student", "teacher"))
        assert mine.samefile(kept)


def test_checkpoints_that_are_there_need_no_more_room(run, teacher, prompts, monkeypatch, capsys):
    import training.requirements as requirements

    written = sum(file.stat().st_size for file in (run / "checkpoints").glob("step-*/*"))
    model = 2 * sum(file.stat().st_size for file in (run / "student" / "transformer").glob("*.safetensors"))
    given = ["emoji-cdm", "--teacher", str(teacher), "--prompts", str(prompts), "--out", str(run), *SMALL]
    for room, code in ((model + 2.1 * written, 0), (model + 1.9 * written, 2)):
        monkeypatch.setattr(
            requirements.shutil, "disk_usage", lambda path, free=room: SimpleNamespace(free=free)
        )
        assert main(given) == code
    assert "keep fewer checkpoints" in capsys.readouterr().err


def test_a_grid_shows_fixed_prompts_at_one_two_and_four_steps(run):
    with Image.open(run / "samples" / "step-00000004.png") as grid:
        assert grid.size == (8 * 64, 3 * 64)
    assert len(json.loads((run / "samples" / "prompts.json").read_text())["columns"]) == 8


def test_the_same_command_again_changes_nothing(run, teacher, prompts):
    from training.student_folder import record_metrics

    record_metrics(run / "student", "evaluate", {"rows": [1]})
    provenance = json.loads((run / "student" / "provenance.json").read_text())
    log = (run / "log.jsonl").read_text()
    weights = (run / "student" / "transformer" / "diffusion_pytorch_model.safetensors").read_bytes()
    assert (
        main(["emoji-cdm", "--teacher", str(teacher), "--prompts", str(prompts), "--out", str(run), *SMALL])
        == 0
    )
    assert (run / "log.jsonl").read_text() == log
    assert (run / "student" / "transformer" / "diffusion_pytorch_model.safetensors").read_bytes() == weights
    assert json.loads((run / "student" / "provenance.json").read_text()) == provenance
    assert not list(run.glob(".student*"))


def test_another_teachers_weights_are_refused_in_the_same_folder(run, teacher, prompts, tmp_path, capsys):
    from safetensors.torch import load_file, save_file

    other = tmp_path / "tiny"
    shutil.copytree(teacher, other)
    file = other / "transformer" / "diffusion_pytorch_model.safetensors"
    save_file({name: value + 1 for name, value in load_file(file).items()}, file)
    assert (
        main(["emoji-cdm", "--teacher", str(other), "--prompts", str(prompts), "--out", str(run), *SMALL])
        == 2
    )
    assert "teacher_sha256" in capsys.readouterr().err


def test_a_student_keeps_the_text_encoders_and_autoencoder_it_was_trained_with(
    teacher, prompts, tmp_path, capsys
):
    from safetensors.torch import load_file, save_file

    source, out = tmp_path / "tiny", tmp_path / "out"
    shutil.copytree(teacher, source)
    vae = Path("vae") / "diffusion_pytorch_model.safetensors"
    before = load_file(source / vae)

    def command(folder: Path, *more: str) -> list[str]:
        return [
            "emoji-cdm",
            "--teacher",
            str(folder),
            "--prompts",
            str(prompts),
            "--out",
            str(out),
            *SMALL,
            *more,
        ]

    assert main(command(source, "--steps", "2")) == 0
    save_file({name: value + 1 for name, value in before.items()}, source / vae)  # another model in its place
    assert main(command(source)) == 2
    assert f"--teacher {out / 'teacher'}" in capsys.readouterr().err
    assert main(command(out / "teacher")) == 0
    written = load_file(out / "student" / vae)
    assert written.keys() == before.keys()
    assert all(torch.equal(written[name], before[name]) for name in before)


def test_a_teacher_that_changes_while_it_is_copied_is_refused(teacher, tmp_path):
    from training.student_folder import TeacherHashes, keep_teacher

    source = tmp_path / "tiny"
    shutil.copytree(teacher, source)
    hashes = TeacherHashes.of(source)
    (source / "vae" / "config.json").write_text("{}")
    with pytest.raises(TrainingError, match="changed while it was copied"):
        keep_teacher(source, hashes, tmp_path / "kept")
    assert [path.name for path in tmp_path.iterdir()] == ["tiny"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            ["--teacher", "no-such-folder"],
            "no-such-folder is not a diffusers folder (nothing is there) and not a hub id",
        ),
        (["--prompts", "none.txt"], "none.txt cannot be read"),
        (["--lr-student", "0"], "--lr-student=0"),
        (["--anchor-low", "0.99"], "anchor_low=0.99 is above anchor_high=0.95"),
        (["--lr-studnet", "1"], "did you mean --lr-student"),
    ],
)
def test_a_mistake_is_one_clear_line_and_leaves_nothing(teacher, prompts, tmp_path, capsys, change, message):
    out = tmp_path / "out"
    base = {
        "--teacher": str(teacher),
        "--prompts": str(prompts),
        "--out": str(out),
        "--batch": "2",
        change[0]: change[1],
    }
    assert main(["emoji-cdm", *(word for pair in base.items() for word in pair)]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not out.exists()


def test_a_recipes_values_are_its_commands_defaults():
    defaults = {name: info.default for name, info in EmojiCDMSettings.model_fields.items()}
    assert emoji_cdm().model_dump().items() <= defaults.items()


def test_the_sd3_recipe_is_the_published_one():
    config = sd3_cdm()
    assert (config.n_max, config.steps, config.student_every, config.batch) == (28, 4001, 2, 128)
    assert (config.lr_student, config.lr_fake, config.guidance, config.weight_floor) == (1e-5, 5e-6, 7.0, 0.1)
    assert (config.anchor_low, config.anchor_high, config.tau_low, config.tau_high) == (
        0.25,
        0.95,
        0.02,
        0.98,
    )
    assert (config.fake_merge, config.ema_decay, config.warmup, config.clip) == (0.999, 0.999, 100, 1.0)
    assert (config.adam_beta1, config.adam_beta2, config.adam_eps, config.weight_decay) == (
        0.9,
        0.999,
        1e-8,
        1e-4,
    )
    assert (config.weight_ca, config.weight_dm, config.weight_cdm) == (1.0, 1.0, 1.0)


def test_a_dry_run_prints_the_configuration(capsys):
    assert main(["emoji-cdm", "--teacher", "t", "--batch", "5", "--dry-run"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert (printed["batch"], printed["n_max"]) == (5, emoji_cdm().n_max)


def test_parity_with_a_teacher_of_another_shift_says_which(teacher, prompts, tmp_path, capsys):
    """The emoji recipe's authors' shift is 1.5, this teacher's own is 3."""
    arguments = [
        "emoji-cdm",
        "--teacher",
        str(teacher),
        "--prompts",
        str(prompts),
        "--out",
        str(tmp_path / "out"),
    ]
    assert main([*arguments, *SMALL, "--variant", "parity"]) == 2
    said = capsys.readouterr().err
    assert "1.5 for this recipe's teacher" in said
    assert "this one's is 3; give --anchor-shift 3" in said
    assert not (tmp_path / "out" / "log.jsonl").exists()
    assert main([*arguments, *SMALL, "--variant", "parity", "--anchor-shift", "3"]) == 0
