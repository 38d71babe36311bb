"""Who must prove itself on an export is asked before anything is exported; what is served is what is compared."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from engines.bundle import Size
from engines.errors import ExportError
from engines.export import export, verify
from engines.export.export import ExportOptions, export_bundle
from engines.export.parity import Probe, open_session
from engines.export.plan import make_plan
from engines.export.verify import check_runtimes, served
from engines.families.base import load_family

SIZE, OTHER = Size(width=64, height=64), Size(width=80, height=48)


@pytest.mark.parametrize(
    ("runtimes", "message"),
    [
        ("opnvino", "--verify opnvino: there is no such runtime; allowed: openvino, onnxruntime, "),
        ("auto", "--verify auto: there is no such runtime; allowed: openvino, "),
        ("fake", "--verify fake: it runs no model; allowed: openvino, "),
        ("triton", "--verify triton: it runs what a Triton server has"),
        ("openvino:int3", "--verify openvino:int3: 'int3' is none of f32, bf16, int8"),
        ("torch", "--verify torch: torch runs the student's own folder; add --weights"),
        ("tensorrt", "--verify tensorrt: there is no NVIDIA GPU here; leave it out, or use --fusion-check"),
    ],
)
def test_a_runtime_that_cannot_prove_itself_is_refused_before_anything_is_exported(
    tiny_student: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, runtimes: str, message: str
) -> None:
    def never(*_: Any) -> Any:
        raise AssertionError("exported")

    monkeypatch.setattr(export, "run_stage", never)
    monkeypatch.setattr(verify.processor, "gpus", tuple)
    with pytest.raises(ExportError) as error:
        export_bundle(tiny_student, tmp_path / "out", ExportOptions(runtimes=("onnxruntime:int8", runtimes)))
    assert str(error.value).startswith(message)
    assert not list(tmp_path.iterdir())


def test_a_runtime_whose_package_is_missing_is_refused_by_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(verify.RUNTIMES, "mine", "no_such_package:Engine")
    with pytest.raises(
        ExportError, match="--verify mine: runtime 'mine' needs the package 'no_such_package'"
    ):
        check_runtimes(("mine",), weights=False)
    check_runtimes(("openvino:bf16", "torch"), weights=True)


def test_batches_that_serving_compiles_for_are_made_of_rows_that_were_answered() -> None:
    def probe(batch: int, size: Size, first: int) -> Probe:
        rows = torch.arange(first, first + batch, dtype=torch.float32)[:, None]
        return Probe(batch, size, {"x": rows}, answers={"original": {"y": rows.numpy() * 10}})

    probes = [probe(1, SIZE, 0), probe(2, SIZE, 1), probe(9, OTHER, 90), probe(5, SIZE, 3)]
    four, eight = served(probes, SIZE)
    assert (four.batch, eight.batch) == (4, 8)
    assert eight.inputs["x"][:, 0].tolist() == list(range(8))
    np.testing.assert_array_equal(four.answers["original"]["y"][:, 0], [0, 10, 20, 30])
    assert [item.batch for item in served(probes[:2], SIZE)] == []
    assert [item.batch for item in served([*probes[:2], probe(4, SIZE, 3)], SIZE)] == []


def test_schedules_are_those_of_the_default_size_where_the_shift_depends_on_it(tiny_student: Path) -> None:
    family = load_family(tiny_student, torch.float32, only=())
    config = family.scheduler.config
    assert not config.use_dynamic_shifting
    plan = make_plan(family, (OTHER, SIZE), (1,), 4, 0)
    assert plan.sigmas(4) == plan.sigmas(4, SIZE) == family.sigmas(4)
    family.scheduler.register_to_config(use_dynamic_shifting=True)
    assert plan.sigmas(4) == family.sigmas(4, (6, 10)) != plan.sigmas(4, SIZE) == family.sigmas(4, (8, 8))


def test_graph_that_onnx_runtime_refuses_is_told_by_its_name(tmp_path: Path) -> None:
    (tmp_path / "denoiser.onnx").write_bytes(b"no graph")
    with pytest.raises(ExportError, match=r"ONNX Runtime refuses denoiser\.onnx: "):
        open_session(tmp_path / "denoiser.onnx")
