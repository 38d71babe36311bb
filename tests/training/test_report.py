"""`cdm-train report`: one page that opens anywhere, of a run in whatever state it is."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import pytest
from PIL import Image

from engines.cli import run_command
from tests.training.html_walk import walk
from training.environment import record_start
from training.errors import TrainingError
from training.main import main
from training.report.write import ReportSettings, report, write_report

EVIL = "<script>alert('&\"')</script>"
KEYS = (
    "fake",
    "fake_norm",
    "student",
    "ca",
    "dm",
    "cdm",
    "ca_weight",
    "cos_ca_dm",
    "x0_mean",
    "x0_std",
    "lr_student",
)


def build_run(folder: Path, steps: int = 60, prompt: str = "a red apple") -> Path:
    """A run folder as a killed and resumed distillation leaves it, without its weights."""
    (folder / "samples").mkdir(parents=True)
    config = {"n_max": 5, "steps": 100, "batch": 4, "clip": 1.0, "weight_floor": 0.1, "prompts": prompt}
    (folder / "config.json").write_text(json.dumps(config))
    lines = [
        {"step": step, "time": 1e9 + 2 * step + (500 if step >= 30 else 0)}
        | {key: math.sin(step / 5 + number) + 2 for number, key in enumerate(KEYS)}
        for step in range(steps)
    ]
    lines.insert(20, {"step": 20, "time": 1e9 + 40, "event": "warning", "text": "latents drift"})
    (folder / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    starts = [
        {"step": 0, "time": 1e9 - 10, "recipe": "emoji_cdm", "command": "cdm-train emoji-cdm"},
        {"step": 30, "time": 1e9 + 550, "cpu": "a processor"},
    ]
    (folder / "environment.json").write_text(json.dumps(starts))
    for step in (20, 40):
        Image.new("RGB", (16, 8), (step, 90, 90)).save(folder / "samples" / f"step-{step:08d}.png")
        (folder / "checkpoints" / f"step-{step:08d}").mkdir(parents=True)
    listing = {"rows_are_steps": [1], "columns": [prompt, "two"]}
    (folder / "samples" / "prompts.json").write_text(json.dumps(listing))
    return folder


def page_of(run: Path):
    return walk(write_report(run).read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def distilled(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("report")
    (folder / "p.txt").write_text(f"red apple\n{EVIL}\n")
    words = ["--steps", "6", "--batch", "2", "--n-max", "2", "--warmup", "1", "--sample-every", "3"]
    paths = ["--teacher", str(tiny_model), "--prompts", str(folder / "p.txt"), "--out", str(folder / "run")]
    assert main(["emoji-cdm", *paths, *words]) == 0
    record_start(folder / "run", 0, recipe="emoji_cdm")
    return folder / "run"


def test_a_distillations_page_has_a_curve_of_every_logged_number(distilled):
    text = write_report(distilled).read_text(encoding="utf-8")
    page = walk(text)
    logged = {key for line in (distilled / "log.jsonl").read_text().splitlines() for key in json.loads(line)}
    drawn = re.findall(r"<figure class=\"chart\">\n<figcaption>.*?<code>(\w+)</code>", text)
    assert sorted(drawn) == sorted(logged - {"step", "time"})
    assert len(drawn) > 15
    assert len(page.all("polyline")) >= 2 * len(drawn)


def test_a_distillations_page_shows_its_pictures_settings_and_files(distilled):
    page = page_of(distilled)
    assert [image["alt"] for image in page.all("img")] == [
        f"pictures after iteration {step}" for step in (3, 6)
    ]
    assert all(image["src"].startswith("data:image/png;base64,") for image in page.all("img"))
    assert EVIL in page.text_in("li")
    assert page.text_in("h1") == ["run"]
    told = " ".join(text for _, text in page.texts)
    assert json.loads((distilled / "config.json").read_text())["teacher_sha256"] in told
    assert "emoji_cdm" in told
    assert {"config.json", "log.jsonl", "student/transformer/"} <= set(page.text_in("code"))


def test_settings_that_differ_from_the_recipes_are_marked(distilled):
    text = write_report(distilled).read_text(encoding="utf-8")
    changed = set(re.findall(r'<tr class="changed"><td class="text"><code>(\w+)</code>', text))
    assert {"steps", "batch", "n_max", "warmup", "prompts"} <= changed
    assert not {"weight_ca", "tau_low", "teacher", "teacher_sha256"} & changed


def test_a_variants_settings_are_held_against_its_recipes(tmp_path):
    run = build_run(tmp_path / "run")
    (run / "student").mkdir()
    (run / "student" / "provenance.json").write_text('{"recipe": "emoji_cdm dmd2"}')
    text = write_report(run).read_text(encoding="utf-8")
    assert '<tr class="changed"><td class="text"><code>n_max</code></td><td class="text value">5</td>' in text
    assert "Training report · emoji_cdm dmd2" in walk(text).text_in("p")


def test_everything_from_the_run_is_escaped(tmp_path):
    run = build_run(tmp_path / "run<b>", prompt=EVIL)
    with (run / "log.jsonl").open("a") as file:
        file.write(json.dumps({"step": 70, "time": 1e9, EVIL: 1.0}) + "\n")
        file.write(json.dumps({"step": 71, "event": EVIL, "text": EVIL}) + "\n")
    (run / "evaluations").mkdir()
    (run / "evaluations" / "a<b>.json").write_text(json.dumps([{"name": EVIL, "nfe": 1, EVIL: 2.0}]))
    (run / "student").mkdir()
    provenance = {
        "teacher": EVIL,
        "recipe": EVIL,
        "licences": [EVIL],
        "metrics": {EVIL: {"rows": [{"name": EVIL}]}},
    }
    (run / "student" / "provenance.json").write_text(json.dumps(provenance))
    (run / "<i>.txt").write_text("")
    text = write_report(run).read_text(encoding="utf-8")
    page = walk(text)
    assert len(page.all("script")) == 1
    assert EVIL not in text
    assert sum(EVIL in content for _, content in page.texts) >= 8


def test_a_resume_and_a_warning_are_marked_in_every_curve(tmp_path):
    run = build_run(tmp_path / "run")
    text = write_report(run).read_text(encoding="utf-8")
    page = walk(text)
    charts = text.count('<figure class="chart">')
    assert charts == len(KEYS) + 1  # and the speed
    assert text.count('<g class="mark resume">') == text.count('<g class="mark warning">') == charts
    assert text.count('<g class="mark checkpoint">') == 2 * charts
    titles = page.text_in("title")
    assert titles.count("iteration 30: resumed") == titles.count("iteration 20: latents drift") == charts
    place = re.search(r'class="mark resume"><line x1="([\d.]+)"', text)
    assert float(place[1]) == pytest.approx(44 + 30 / 59 * 348, abs=0.1)
    # 10 s and 29 intervals of 2 s before the kill; 10 s and 29 intervals after the resume; the pause is no work.
    assert "2 min 16 s" in page.text_in("b")


def test_steps_that_were_run_twice_are_drawn_once(tmp_path):
    run = build_run(tmp_path / "run")
    with (run / "log.jsonl").open("a") as file:
        for step in range(10, 15):
            file.write(json.dumps({"step": step, "time": 2e9 + step, "ca": 9.0}) + "\n")
    text = write_report(run).read_text(encoding="utf-8")
    drawn = re.search(r"<code>ca</code>.*?class=\"raw\" points=\"(.*?)\"", text, re.DOTALL)[1]
    places = [float(point.split(",")[0]) for point in drawn.split()]
    assert places == sorted(set(places))
    assert len(places) == 15


def test_a_damaged_line_is_told_and_a_half_written_one_awaited(tmp_path):
    run = build_run(tmp_path / "run")
    lines = (run / "log.jsonl").read_text().splitlines()
    lines[5], lines[7] = '{"step": 5, "ti', "[1]"
    (run / "log.jsonl").write_text("\n".join(lines) + '\n{"step": 60, "fa')
    page = page_of(run)
    assert "log.jsonl: 2 line(s) could not be read and are left out" in page.text_in("li")


def test_values_that_are_not_finite_are_events(tmp_path):
    run = build_run(tmp_path / "run")
    with (run / "log.jsonl").open("a") as file:
        file.write('{"step": 60, "time": 2000000000, "ca": NaN, "dm": 1.0}\n')
    page = page_of(run)
    assert "ca = nan" in page.text_in("td")
    assert "ca = nan" in page.text_in("p")  # at the top: it is why the run ended
    with (run / "log.jsonl").open("a") as file:
        file.write(
            '{"step": 61, "time": 2000000001, "ca": 1.0}\n{"step": 62, "time": 2000000002, "ca": 1.0}\n'
        )
    assert "ca = nan" not in page_of(run).text_in("p")  # it went on


@pytest.mark.parametrize("left_out", ["samples", "log.jsonl", "environment.json", "config.json"])
def test_a_run_without_some_of_its_files_has_a_page(tmp_path, left_out):
    run = build_run(tmp_path / "run")
    for path in sorted((run / left_out).glob("*")):
        path.unlink()
    path = run / left_out
    path.rmdir() if path.is_dir() else path.unlink()
    page = page_of(run)
    assert page.text_in("h1") == ["run"]
    sections = {attributes["id"] for attributes in page.all("section") if "id" in attributes}
    gone = {"samples": {"samples"}, "log.jsonl": {"curves"}, "environment.json": {"environment"}}
    assert not gone.get(left_out, {"settings"}) & sections
    assert "files" in sections


def test_a_run_just_begun_says_so(tmp_path):
    (tmp_path / "config.json").write_text('{"steps": 10}')
    page = page_of(tmp_path)
    assert "Nothing is logged yet." in page.text_in("p")
    assert "iterations, not complete" in page.text_in("span")


@pytest.mark.parametrize(
    "name", ["config.json", "environment.json", "samples/prompts.json", "samples/step-00000020.png"]
)
def test_a_damaged_file_is_told_and_the_rest_shown(tmp_path, name):
    run = build_run(tmp_path / "run")
    (run / name).write_text("{")
    page = page_of(run)
    (note,) = [text for text in page.text_in("li") if Path(name).name in text]
    assert "not" in note
    assert page.all("polyline")


@pytest.mark.parametrize(
    ("make", "message"), [(True, "holds neither config.json nor log.jsonl"), (False, "is no folder")]
)
def test_a_folder_without_a_run_is_a_clear_error(tmp_path, capsys, make, message):
    folder = tmp_path / "none"
    if make:
        folder.mkdir()
    words = [str(folder)]
    assert run_command(ReportSettings, report, words, "cdm-train report", user_errors=(TrainingError,)) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "the --out of a `cdm-train` recipe" in error
    assert error.count("\n") == 1


def test_the_command_writes_where_it_is_told_and_says_so(tmp_path, capsys):
    run = build_run(tmp_path / "run")
    out = tmp_path / "new" / "page.html"
    assert run_command(ReportSettings, report, [str(run), "--out", str(out), "--grids", "1"]) == 0
    assert capsys.readouterr().out == f"{out}\n"
    page = walk(out.read_text(encoding="utf-8"))
    assert [image["alt"] for image in page.all("img")] == ["pictures after iteration 40"]
    assert not (run / "report.html").exists()


def test_the_report_of_a_reported_run_does_not_count_itself(tmp_path):
    run = build_run(tmp_path / "run")
    first = write_report(run).read_text(encoding="utf-8")
    again = write_report(run).read_text(encoding="utf-8")
    assert re.sub(r"Written .* by", "", again) == re.sub(r"Written .* by", "", first)


def test_a_long_runs_page_stays_small(tmp_path):
    run = build_run(tmp_path / "run", steps=12_000)
    for grid in (run / "samples").glob("*.png"):
        grid.unlink()
    assert (run / "log.jsonl").stat().st_size > 2_500_000
    assert write_report(run).stat().st_size < 700_000


def test_wide_grids_are_shrunk_and_thinned_out(tmp_path):
    run = build_run(tmp_path / "run")
    for step in range(100, 130):
        Image.new("RGB", (1800, 90), (step, 0, 0)).save(run / "samples" / f"step-{step:08d}.png")
    images = page_of(run).all("img")
    assert len(images) == 24
    assert (images[0]["alt"], images[-1]["alt"]) == tuple(
        f"pictures after iteration {step}" for step in (20, 129)
    )
    assert images[-1]["src"].startswith("data:image/webp;base64,")
    assert (images[-1]["width"], images[-1]["height"]) == ("1600", "80")


def rows(*values: float) -> list[dict]:
    return [
        {"name": f"student, {steps} steps", "nfe": steps, "seconds_per_picture": 0.1,
         "scores": {group: {"alignment": value, "alignment_error": 0.02, "frechet": 20 - 10 * value}
                    for group in ("overall", "seen", "heldout")}}
        for steps, value in zip((1, 2, 4), values, strict=True)
    ]  # fmt: skip


def test_evaluations_are_tables_with_the_best_of_each_column_marked(tmp_path):
    run = build_run(tmp_path / "run")
    (run / "evaluations").mkdir()
    real = {"name": "real pictures", "scores": {"overall": {"alignment": 0.99, "frechet": 1.0}}}
    (run / "evaluations" / "at-40.json").write_text(
        json.dumps({"rows": [real, *rows(0.5, 0.7, 0.6)], "seed": 3})
    )
    (run / "evaluations" / "other.json").write_text(json.dumps([{"name": "x", "score": {"hps": 0.25}}]))
    (run / "evaluations" / "broken.json").write_text("[]")
    text = write_report(run).read_text(encoding="utf-8")
    page = walk(text)
    assert page.text_in("caption") == ["at-40", "other"]
    best = re.findall(r'<td class="best">(.*?)</td>', text)
    assert best == [*["70.0% ± 2.0%"] * 3, *["13.00"] * 3]
    assert "99.0%" in page.text_in("td")
    assert {"score.hps", "0.25"} <= set(page.text_in("th") + page.text_in("td"))
    assert "best alignment: student, 2 steps, Fréchet 13.00" in page.text_in("span")
    assert [text for text in page.text_in("li") if "evaluations/broken.json could not be read" in text]
