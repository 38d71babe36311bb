"""Laws of `cdm-train evaluate` and `cdm-train samples`, run on a tiny model, dataset and evaluator."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from training.emoji.dataset import EmojiDataset
from training.errors import TrainingError
from training.evalset import Scorer, choose, pictures
from training.evaluator import Evaluator
from training.main import main
from training.prompts import read_prompts
from training.samples import PROMPTS, held_out


@pytest.fixture(scope="module")
def data(tiny_data: Path) -> EmojiDataset:
    return EmojiDataset.load(tiny_data)


def run(tiny_model, tiny_data, tiny_evaluator, *more):
    arguments = ["evaluate", str(tiny_model), "--data", str(tiny_data), "--evaluator", str(tiny_evaluator)]
    return main([*arguments, "--count", "8", "--choices", "10", "--diversity-prompts", "2", *more])


def test_evaluate_prints_a_table_then_one_json_line_and_writes_it(
    tiny_model, tiny_data, tiny_evaluator, tmp_path, capsys
):
    out = tmp_path / "results" / "tiny.json"
    assert (
        run(tiny_model, tiny_data, tiny_evaluator, "--steps", "1,2", "--guidance", "2", "--out", str(out))
        == 0
    )
    printed = capsys.readouterr().out
    last = json.loads(printed.rstrip().splitlines()[-1])
    assert last == json.loads(out.read_text())
    assert [row["name"] for row in last["rows"]] == [
        "real pictures", "autoencoder round trip", "tiny, 1 step, guidance 2", "tiny, 2 steps, guidance 2"
    ]  # fmt: skip
    for row in last["rows"]:
        assert f"| {row['name']} |" in printed
        for group, pictures_in in (("overall", 8), ("seen", 4), ("heldout", 4)):
            assert row["scores"][group]["pictures"] == pictures_in
            assert 0 <= row["scores"][group]["alignment"] <= 1
            assert row["scores"][group]["frechet"] > 0
    made = last["rows"][2:]
    assert [row["nfe"] for row in made] == [2, 4]
    assert all(row["diversity"] > 0 and row["seconds_per_picture"] > 0 for row in made)
    real, blank = last["rows"][0]["scores"]["overall"], made[0]["scores"]["overall"]
    assert real["frechet"] < blank["frechet"]
    assert real["alignment"] > blank["alignment"]


def test_a_recorded_result_reaches_the_provenance_that_export_reads(
    tiny_model, tiny_data, tiny_evaluator, tmp_path, capsys
):
    from engines.export.export import read_provenance

    model = tmp_path / "tiny"
    shutil.copytree(tiny_model, model)
    (model / "provenance.json").unlink(missing_ok=True)
    short = ("--no-baselines", "--steps", "1", "--record")
    assert run(model, tiny_data, tiny_evaluator, *short) == 2
    assert "leave --record out" in capsys.readouterr().err
    known = {
        "teacher": "t",
        "recipe": "r",
        "config_sha256": "c",
        "steps_trained": 3,
        "metrics": {"samples": 7},
    }
    (model / "provenance.json").write_text(json.dumps(known))
    assert run(model, tiny_data, tiny_evaluator, *short) == 0
    printed = json.loads(capsys.readouterr().out.rstrip().splitlines()[-1])
    provenance = read_provenance(model)
    assert provenance.metrics == {"samples": 7, "evaluate": printed}
    assert (provenance.teacher, provenance.steps_trained) == ("t", 3)


def test_the_same_command_measures_the_same_numbers(tiny_model, tiny_data, tiny_evaluator, capsys):
    results = []
    for batch in ("3", "8"):
        run(
            tiny_model,
            tiny_data,
            tiny_evaluator,
            "--steps",
            "2",
            "--no-baselines",
            "--dtype",
            "float32",
            "--batch",
            batch,
        )
        results.append(json.loads(capsys.readouterr().out.rstrip().splitlines()[-1])["rows"])
    assert len(results[0]) == 1
    first, second = (rows[0]["scores"]["overall"] for rows in results)
    assert first["alignment"] == second["alignment"]
    assert first["frechet"] == pytest.approx(second["frechet"], rel=1e-2)


def test_prompts_are_half_seen_and_half_held_out_and_share_no_picture_with_the_reference(data):
    chosen = choose(data, 8, 10, seed=0)
    splits = [data.records[row].split for row in chosen.prompts_P]
    assert splits[:4] == ["train"] * 4
    assert "train" not in splits[4:]
    assert len(set(chosen.prompts_P)) == 8
    assert not set(chosen.prompts_P) & set(chosen.reference_R)
    assert chosen.reference_groups["seen"].sum() == chosen.reference_groups["heldout"].sum() > 0
    assert len(set(chosen.seeds)) == 8


def test_the_choice_depends_on_the_seed_alone(data):
    first, again, other = (choose(data, 8, 10, seed) for seed in (1, 1, 2))
    assert (first.prompts_P == again.prompts_P).all()
    assert (first.reference_R == again.reference_R).all()
    assert (first.distractors_PK == again.distractors_PK).all()
    assert (first.prompts_P != other.prompts_P).any()
    assert not set(first.seeds) & set(other.seeds)


@pytest.mark.parametrize("count", [2, 16])
def test_a_count_the_data_cannot_give_is_refused_with_the_limit(data, count):
    with pytest.raises(TrainingError, match=f"--count={count}: .* the data has 8.* take 4 to 14"):
        choose(data, count, 10, seed=0)


def test_pictures_of_other_prompts_align_worse_than_the_right_ones(data, tiny_evaluator):
    scorer = Scorer(Evaluator.load(tiny_evaluator), choose(data, 8, 16, seed=0))
    real = pictures(data, scorer.chosen.prompts_P)
    right = scorer.score(real)["overall"]["alignment"]
    wrong = scorer.score(np.roll(real, 3, axis=0))["overall"]["alignment"]
    assert right >= wrong + 0.25


def test_a_missing_model_is_one_sentence_and_exit_2(tiny_data, tiny_evaluator, tmp_path, capsys):
    assert run(tmp_path / "none", tiny_data, tiny_evaluator) == 2
    assert "is not a diffusers folder" in capsys.readouterr().err


def test_samples_draw_a_column_per_step_count_and_a_row_of_the_last(tiny_model, tiny_data, tmp_path, capsys):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text(
        "solid red circle\noutline red cross\n\nsolid black bar\nnever seen words\nsolid blue bar\n"
    )
    arguments = [
        "samples",
        "--teacher",
        str(tiny_model),
        "--student",
        str(tiny_model),
        "--prompts",
        str(prompts),
    ]
    sheet, row = tmp_path / "docs" / "sheet.png", tmp_path / "docs" / "row.png"
    assert main([*arguments, "--data", str(tiny_data), "--teacher-steps", "2", "--student-steps", "1,2",
                 "--out", str(sheet), "--row", str(row), "--row-count", "3", "--dtype", "float32"]) == 0  # fmt: skip
    whole, strip = np.asarray(Image.open(sheet)), np.asarray(Image.open(row))
    assert whole.shape == (40 + 3 * 64, 2 * (150 + 3 * 64) + 24, 3)
    assert strip.shape[1] == 3 * 64
    # Seen prompts come first, so the sheet's first row is the row's first picture; the last column is the student at 2.
    first = whole[40 : 40 + 64, 150 + 2 * 64 : 150 + 3 * 64]
    assert np.array_equal(first, strip[:64, :64])
    # Teacher with guidance and student without it, at 2 steps each, are not the same picture.
    assert not np.array_equal(whole[40 : 40 + 64, 150 : 150 + 64], first)


def test_samples_work_with_a_teacher_alone(tiny_model, tiny_data, tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("solid red circle\n")
    assert main(["samples", "--teacher", str(tiny_model), "--prompts", str(prompts), "--data", str(tiny_data),
                 "--teacher-steps", "1", "--out", str(tmp_path / "sheet.png")]) == 0  # fmt: skip
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.size == (150 + 64, 40 + 64)


def test_held_out_prompts_are_looked_up_in_the_dataset(data):
    prompts = ["solid red circle", "outline red cross", "solid black circle", "something else"]
    assert held_out(data, prompts) == [False, True, True, False]


def test_an_empty_or_missing_prompts_file_is_refused(tmp_path):
    (tmp_path / "empty.txt").write_text("\n\n")
    with pytest.raises(TrainingError, match="holds no prompts; put at least one in it"):
        read_prompts(tmp_path / "empty.txt")
    with pytest.raises(TrainingError, match="cannot be read"):
        read_prompts(tmp_path / "none.txt")


def test_the_prompts_that_ship_are_24_of_many_kinds():
    prompts = read_prompts(PROMPTS).texts
    assert len(set(prompts)) == len(prompts) == 24


def test_a_step_count_below_one_is_refused(tiny_model, tiny_data, tiny_evaluator, capsys):
    assert run(tiny_model, tiny_data, tiny_evaluator, "--steps", "4,0") == 2
    assert "--steps" in capsys.readouterr().err
