"""`cdm-bench ablation`: short runs of its whole path, and what its table compares."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from benchmarks.ablation_plots import draw
from benchmarks.main import main
from training.report.read import Curve, Log


def bench(capsys, *arguments: object) -> dict:
    assert main(["ablation", *map(str, arguments)]) == 0
    return json.loads(capsys.readouterr().out.rstrip().splitlines()[-1])


@pytest.mark.slow
def test_rows_are_distilled_measured_and_not_run_again(
    tiny_model, tiny_data, tiny_evaluator, tmp_path, capsys
):
    arguments = [
        "--teacher", tiny_model, "--data", tiny_data, "--evaluator", tiny_evaluator, "--choices", 10, "--count", 8,
        "--steps", 2, "--out", tmp_path, "--rows", '["full CDM", "DMD2"]',
    ]  # fmt: skip
    found = bench(capsys, *arguments, "--seeds", 0, "--ladder", '["DMD2"]')
    assert [row["objective"] for row in found["rows"]] == ["full CDM", "DMD2"]
    assert [row["schedule"] for row in found["ladder"]] == [*"123468", "unshifted", "shift 3", "late"]
    for row, variant in zip(found["rows"], ("cdm", "dmd2"), strict=True):
        folder = tmp_path / f"{variant}-0"
        assert float(row["frechet"]) > 0
        config = json.loads((folder / "config.json").read_text())
        assert (config["variant"], config["steps"], config["seed"]) == (variant, 2, 0)
        assert (folder / "student").is_dir()
        assert not (folder / "checkpoints").exists()

    def students() -> dict[Path, int]:
        return {path: path.stat().st_mtime_ns for path in tmp_path.glob("*/student/**/*") if path.is_file()}

    before = students()
    again = bench(
        capsys, *arguments, "--seeds", 0, "--ladder", '["full CDM"]'
    )  # measures what is missing, only
    assert again["rows"] == found["rows"]
    assert {row["objective"] for row in again["ladder"]} == {"full CDM"}
    assert before == students()
    picture = tmp_path.parent / "ablation.png"
    both = ["--ladder", '["full CDM", "DMD2"]', "--plot", picture]
    table = bench(capsys, *arguments, "--seeds", "0,1", "--no-train", *both)
    with Image.open(picture) as image:
        assert image.size == (1215, 684)
    assert table["ladder"] == again["ladder"] + found["ladder"]  # seed 1 is not there
    assert len(list(tmp_path.iterdir())) == 2


def measured(folder: Path, frechet: float, alignment: float = 0.5) -> None:
    group = {"frechet": frechet, "alignment": alignment}
    row = {"diversity": 0.2, "scores": dict.fromkeys(("overall", "seen", "heldout"), group)}
    folder.mkdir()
    (folder / "quality.json").write_text(json.dumps({"4": row}))


def test_seeds_are_averaged_and_compared_with_full_cdms_of_the_same_seed(tmp_path, capsys):
    for seed, (full, other) in enumerate([(10, 12), (20, 23), (40, None)]):
        measured(tmp_path / f"cdm-{seed}", full)
        if other:
            measured(tmp_path / f"dynamic-{seed}", other, 0.25 * (seed + 1))
    found = bench(capsys, "--out", tmp_path, "--no-train", "--seeds", "0,1,2", "--ladder", "[]")
    full, other = found["rows"]
    assert (full["seeds"], full["frechet"], full["frechet, to full CDM's"]) == (3, "23.33 ± 15.00", "")
    assert (other["seeds"], other["frechet"], other["alignment"]) == (2, "17.50 ± 5.50", "0.375 ± 0.125")
    assert other["frechet, to full CDM's"] == "+2.50 ± 0.50"


def test_a_row_that_is_not_there_is_told(capsys):
    assert main(["ablation", "--rows", '["full"]']) == 2
    assert "there is no row 'full'; rows: full CDM," in capsys.readouterr().err


def test_the_plot_has_a_line_per_row_the_mean_of_its_seeds():
    logs = []
    for seed in (0, 1):
        log = Log()
        for step in range(20):
            log.curves.setdefault("fake", Curve()).add(step, seed + 1.0)
        logs.append(log)
    ladder = {"DMD2": {2: {"frechet": [10, 14], "alignment": [0.5], "diversity": [0.1]}}}
    figure = draw(ladder, {"full CDM": logs, "DMD2": logs[:1]})
    frechet, fake = figure.axes[0].lines, figure.axes[5].lines
    assert [(line.get_label(), list(line.get_ydata())) for line in frechet] == [("DMD2", [12])]
    assert {line.get_label(): line.get_ydata()[-1] for line in fake} == {"full CDM": 1.5, "DMD2": 1}
    assert frechet[0].get_color() == fake[1].get_color()
    assert not figure.axes[4].lines  # nobody logged a distance
