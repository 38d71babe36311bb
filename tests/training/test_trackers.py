"""Curves for others to watch: what TensorBoard and W&B show is the run as it finally went, whatever was killed."""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from training.errors import TrainingError
from training.trackers import Trackers

CONFIG = {"batch": 4, "prompts": Path("a|b.txt")}


def picture(value: int = 7) -> np.ndarray:
    return np.full((6, 5, 3), value, np.uint8)


def accumulated(folder: Path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(
        str(folder / "tensorboard"), size_guidance={"scalars": 0, "images": 0, "tensors": 0}
    )
    return found.Reload()


def write(folder: Path, steps: range, offset: float = 0.0) -> Trackers:
    trackers = Trackers.start("tensorboard", folder, CONFIG, step=steps.start)
    for step in steps:
        trackers.log(step, {"ca": step + offset, "cdm_norm": 1.0, "odd": 2.0})
        if step % 4 == 3:
            trackers.image(step, "samples", picture())
    return trackers


def test_tensorboard_shows_every_number_under_its_group(tmp_path):
    write(tmp_path, range(5)).close()
    found = accumulated(tmp_path)
    assert set(found.Tags()["scalars"]) == {"Losses/ca", "Gradient norms/cdm_norm", "Other/odd"}
    assert [(event.step, event.value) for event in found.Scalars("Losses/ca")] == [
        (s, float(s)) for s in range(5)
    ]
    (shown,) = found.Images("samples")
    assert (shown.step, shown.width, shown.height) == (3, 5, 6)
    assert found.Tags()["tensors"] == ["config/text_summary"]
    assert b"a|b.txt" in found.Tensors("config/text_summary")[0].tensor_proto.string_val[0]
    assert [path.name for path in (tmp_path / "tensorboard").iterdir() if path.is_dir()] == []


def test_after_a_resume_tensorboard_shows_no_step_twice(tmp_path):
    killed = write(
        tmp_path, range(12)
    )  # not closed: the process was killed after step 11, its checkpoint was at 6
    write(tmp_path, range(6, 10), offset=0.5).close()
    found = accumulated(tmp_path)
    assert [(event.step, event.value) for event in found.Scalars("Losses/ca")] == [
        (step, step + (0.5 if step >= 6 else 0)) for step in range(10)
    ]
    assert [event.step for event in found.Images("samples")] == [3, 7]
    killed.close()


def test_a_run_killed_before_its_first_checkpoint_begins_anew(tmp_path):
    killed = write(tmp_path, range(5), offset=0.5)
    write(tmp_path, range(3)).close()
    assert [(e.step, e.value) for e in accumulated(tmp_path).Scalars("Losses/ca")] == [
        (s, float(s)) for s in range(3)
    ]
    killed.close()


def test_none_writes_nothing_and_closing_twice_is_allowed(tmp_path):
    trackers = Trackers.start("none", tmp_path, CONFIG)
    trackers.log(0, {"ca": 1.0})
    trackers.image(0, "samples", picture())
    trackers.close()
    trackers.close()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("kind", "extra"), [("tensorboard", "train"), ("wandb", "wandb")])
def test_a_missing_package_is_named_with_its_extra(tmp_path, monkeypatch, kind, extra):
    monkeypatch.setitem(sys.modules, kind, None)
    with pytest.raises(TrainingError, match=rf"--tracker={kind} needs .*'{kind}'.*cdm-serve\[{extra}\]"):
        Trackers.start(kind, tmp_path, CONFIG)


def test_a_damaged_wandb_state_says_what_to_do(tmp_path):
    pytest.importorskip("wandb")
    (tmp_path / "wandb.json").write_text('{"id": "a"}')
    with pytest.raises(TrainingError, match=r"wandb\.json .* delete it to begin a new W&B run"):
        Trackers.start("wandb", tmp_path, CONFIG)


@pytest.mark.parametrize(
    ("environment", "said"),
    [({}, "there is no API key"), ({"WANDB_API_KEY": "short"}, "API key"), ({"WANDB_MODE": "offline"}, None)],
)
def test_who_is_not_let_into_wandb_is_told_before_anything_is_loaded(tmp_path, environment, said):
    pytest.importorskip("wandb")
    clean = {name: value for name, value in os.environ.items() if not name.startswith("WANDB_")}
    done = subprocess.run(
        [sys.executable, "-c", "from training.trackers import require_tracker; require_tracker('wandb')"],
        env={**clean, "HOME": str(tmp_path), "NETRC": str(tmp_path / "netrc"), **environment},
        cwd=Path(__file__).parents[2], capture_output=True, text=True, check=False, timeout=120,
    )  # fmt: skip
    assert (done.returncode == 0) == (said is None), done.stderr
    if said:
        last = done.stderr.strip().splitlines()[-1]
        assert "TrainingError: --tracker=wandb: W&B does not start" in last
        assert said in last
        assert "wandb login" in last


# A process of its own each: W&B leaves a service behind in the one that starts it. Nothing closes the first.
WANDB_RUN = """
import sys
from pathlib import Path
import numpy as np
from training.trackers import Trackers
folder, start, end = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
trackers = Trackers.start("wandb", folder, {"batch": 4}, step=start)
for step in range(start, end):
    trackers.log(step, {"ca": float(step)})
trackers.image(end - 1, "samples", np.zeros((4, 4, 3), np.uint8))
raise SystemExit(3)
"""


def wandb_records(path: Path) -> Iterator:
    """Records of a `.wandb` file: a LevelDB log (7 bytes of head; blocks of 32 KiB) of protocol buffers."""
    from wandb.proto import wandb_internal_pb2

    data, position, whole = path.read_bytes(), 7, b""
    while position + 7 <= len(data):
        if (room := 32768 - position % 32768) < 7:
            position += room
            continue
        _, length, kind = struct.unpack_from("<IHB", data, position)
        if kind == 0:
            return
        whole += data[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(whole)
            whole = b""
            yield record


def test_after_a_resume_wandb_has_no_step_twice(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    for words in (("0", "12"), ("6", "20")):
        done = subprocess.run(
            [sys.executable, "-c", WANDB_RUN, str(tmp_path), *words], capture_output=True, text=True
        )
        assert done.returncode == 3, done.stderr
    files = sorted(tmp_path.glob("wandb/offline-run-*/*.wandb"))
    assert len(files) == 2
    records = [record for file in files for record in wandb_records(file)]
    runs = {record.run.run_id for record in records if record.WhichOneof("record_type") == "run"}
    assert runs == {json.loads((tmp_path / "wandb.json").read_text())["id"]}
    seen = {}
    for record in records:
        if record.WhichOneof("record_type") == "history":
            items = {
                (item.key or item.nested_key[0]): json.loads(item.value_json) for item in record.history.item
            }
            if "Losses/ca" in items:
                assert record.history.step.num not in seen
                seen[record.history.step.num] = items["Losses/ca"]
    assert seen == {step: step for step in range(20)}
