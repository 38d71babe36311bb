"""Tables of call times: read whole or refused in a sentence, followed by the fake engine and by no other."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from engines.base import EngineOptions, load_engine
from engines.bundle import Bundle
from engines.call_costs import read_cost_table
from engines.errors import CostTableError, RuntimeUnavailable
from engines.fake import FakeEngine, fake_bundle
from engines.noise import noise

SIZE = {"width": 64, "height": 32}
ROWS: list[dict[str, Any]] = [
    {"stage": "encode", "batch": 1, "seconds": 0.5},
    {"stage": "denoise", **SIZE, "batch": 2, "seconds": 2.0},
    {"stage": "denoise", **SIZE, "batch": 4, "seconds": 3.0},
    {"stage": "decode", **SIZE, "batch": 1, "seconds": 0.25},
    {"stage": "denoise", "width": 8, "height": 8, "batch": 1, "seconds": 9.0},
    {"stage": "decode", "width": 8, "height": 8, "batch": 1, "seconds": 9.0},
]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return fake_bundle(tmp_path_factory.mktemp("fake"))


def written(folder: Path, rows: Any) -> Path:
    path = folder / "costs.json"
    path.write_text(json.dumps({"name": "x", "source": "given", "rows": rows}), encoding="utf-8")
    return path


def test_unmeasured_batches_lie_on_the_line_and_beyond_it_cost_per_picture(tmp_path: Path) -> None:
    table = read_cost_table(written(tmp_path, ROWS))
    seconds = table.first_size()
    assert [seconds("denoise", batch) for batch in (1, 2, 3, 4, 8)] == [1.0, 2.0, 2.5, 3.0, 6.0]
    assert seconds("encode", 3) == 1.5
    assert table.sizes == [(64, 32), (8, 8)]


def test_fake_engine_waits_for_what_the_table_says(bundle: Bundle, tmp_path: Path) -> None:
    slept: list[float] = []
    options = EngineOptions(runtime="fake", fake_costs=written(tmp_path, ROWS))
    engine = FakeEngine(bundle, options, sleep=slept.append)
    codes = engine.encode([engine.tokenize("a")])
    x, _ = engine.denoise([noise(1, (4, 8, 8))] * 3, [1.0] * 3, [0.0] * 3, codes * 3)
    engine.decode(x[:2])
    assert slept == [0.5, 2.5, 0.5]


@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
def test_real_runtime_cannot_be_told_how_long_to_take(bundle: Bundle, tmp_path: Path, runtime: str) -> None:
    options = EngineOptions(runtime=runtime, fake_costs=written(tmp_path, ROWS))
    with pytest.raises(RuntimeUnavailable, match=rf"fake_costs=.* means nothing to the {runtime} runtime"):
        load_engine(bundle, options)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (ROWS[1:], "encode must have a row"),
        (ROWS[:3], "denoise and decode rows of the same sizes"),
        ([*ROWS, ROWS[0]], "encode of batch 1 is there twice"),
        ([*ROWS, {"stage": "decode", "batch": 2, "seconds": 1.0}], "stage=decode needs width and height"),
        ([*ROWS, {**ROWS[0], **SIZE, "batch": 2}], "stage=encode has no width and height"),
        ([{**ROWS[0], "seconds": -1.0}], "rows.0.seconds: Input should be greater than or equal to 0"),
        ([{**ROWS[0], "batch": 0}], "rows.0.batch: Input should be greater than or equal to 1"),
        ([{**ROWS[0], "stage": "upscale"}], "rows.0.stage"),
        (7, "rows: Input should be a valid"),
    ],
)
def test_what_is_no_table_is_told(tmp_path: Path, rows: Any, message: str) -> None:
    with pytest.raises(CostTableError) as raised:
        read_cost_table(written(tmp_path, rows))
    assert message in str(raised.value)
    assert "is no cost table" in str(raised.value)


def test_missing_table_is_told(tmp_path: Path) -> None:
    with pytest.raises(CostTableError, match=r"no-such\.json cannot be read: No such file"):
        read_cost_table(tmp_path / "no-such.json")
