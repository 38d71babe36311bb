"""What the acceptance makes of copies, times and errors: which pass, and which are rows that failed."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.acceptance_copies import judge, parse_trace
from benchmarks.acceptance_parity import Examined, alone_row, component_rows, errors, picture_rows, psnr
from benchmarks.acceptance_report import Missed
from benchmarks.acceptance_times import alternate, time_rows
from engines.export.tolerance import Tolerance

WHO = Examined("torch f32", "torch", "f32", own_weights=True)
STORED = Examined("openvino f32", "openvino", "f32", own_weights=False)
LOW = Examined("torch bf16", "torch", "bf16", own_weights=True)


# copies


def test_a_step_may_send_up_sigmas_and_nothing_else() -> None:
    sigmas = [("HtoD", 16), ("DtoD", 1 << 20), ("HtoD", 16)]
    assert judge(sigmas, 4) == "ok"
    assert judge([*sigmas, ("DtoH", 4)], 4) == "failed: 4 bytes came down to the host in a step; none may"
    assert judge([*sigmas, ("HtoD", 1)], 4).startswith("failed: 33 bytes went up to the device in a step")
    assert judge([], 4) == "failed: not even σ was seen to go up, so nothing was observed"


def test_copies_are_read_from_a_trace() -> None:
    events = [
        {"cat": "gpu_memcpy", "name": "Memcpy HtoD (Pinned -> Device)", "args": {"bytes": 16}},
        {"cat": "gpu_memcpy", "name": "Memcpy DtoD (Device -> Device)", "args": {"bytes": 4096}},
        {"cat": "kernel", "name": "void cutlass::Kernel"},
        {"cat": "cuda_runtime", "name": "cudaMemcpyAsync", "args": {"bytes": 16}},
    ]
    assert parse_trace(json.dumps({"traceEvents": events})) == [("HtoD", 16), ("DtoD", 4096)]


# times


class Clock:
    """An operator whose steps take `ms`; at batch 8 it fails from the `fails`-th call on."""

    def __init__(self, ms: float, fails: int = 1 << 30) -> None:
        self.ms, self.fails = ms, fails
        self.asked: list[int] = []

    def call(self, operation: str, *, batch: int, size: Any, steps: int) -> Any:
        self.asked.append(batch)
        if batch == 8 and self.asked.count(8) >= self.fails:
            raise Missed("out of memory")
        ms = 1e6 if self.asked.count(batch) == 1 else self.ms  # warming up
        return {"step ms": [ms * batch] * 3, "picture ms": [ms * batch * steps]}

    def close(self) -> None:
        pass


def test_contenders_take_turns_and_ratios_are_to_the_baseline() -> None:
    ours, theirs = Clock(2.0, fails=2), Clock(3.0)
    found = alternate({"ours": ours, "theirs": theirs}, [(1, 64, 64), (8, 64, 64)], steps=4, rounds=5)
    assert (len(theirs.asked), ours.asked.count(1), ours.asked.count(8)) == (12, 6, 2)
    first, second = time_rows("ours", found["ours"], "theirs", found["theirs"])
    assert (first["step ms p50"], first["step ms IQR"], first["picture ms p50"]) == (2.0, 0.0, 8.0)
    assert (first["step, × over theirs"], first["picture, × over theirs"], first["n"]) == (1.5, 1.5, 5)
    assert second == {"what": "ours", "result": "failed: out of memory", "size": "64x64", "batch": 8}
    assert [row["result"] for row in time_rows("theirs", found["theirs"], "theirs", found["theirs"])] == [
        "ok",
        "ok",
    ]


# parity


def write_references(folder: Path) -> dict[str, Any]:
    random = np.random.default_rng(0)
    x = random.standard_normal((2, 4, 8, 8)).astype(np.float32)
    arrays = {
        "input.x": x,
        "original.x_next": x * 2,
        "original.x0": x,
        "stored.x_next": x * 2.01,
        "stored.x0": x,
    }
    np.savez(folder / "denoiser-00.npz", **arrays)
    image = random.integers(0, 255, (2, 8, 8, 3)).astype(np.uint8)
    np.savez(folder / "picture-00.npz", noise=x, image=image)
    return {"x": x, "image": image}


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path, dict[str, Any]]:
    references, outputs = tmp_path / "references", tmp_path / "outputs"
    references.mkdir()
    outputs.mkdir()
    return references, outputs, write_references(references)


@pytest.mark.parametrize(
    ("who", "scale", "result"),
    [
        (WHO, 2 + 1e-6, "ok"),
        (WHO, 2 + 1e-4, "failed: .* error 4.99e-05; at most 1e-05"),
        (STORED, 2.01, "ok"),
        (STORED, 2.0, "failed: .* against torch with stored weights"),
        (LOW, 2.02, "ok"),
        (LOW, 2.1, "failed: .* error 5.00e-02; at most 2e-02"),
        (WHO, float("nan"), "failed: denoiser at batch 2 on torch f32: x_next is not finite"),
    ],
)  # fmt: skip
def test_each_runtime_is_held_to_the_weights_that_it_runs(
    folders: tuple[Path, Path, Any], who: Examined, scale: float, result: str
) -> None:
    references, outputs, arrays = folders
    np.savez(outputs / "denoiser-00.npz", x_next=arrays["x"] * scale, x0=arrays["x"])
    (row,) = component_rows(references, outputs, who, Tolerance())
    assert re.match(result, row["result"]), row
    if row["result"] == "ok":
        assert (row["what"], row["shapes"]) == (f"{who.label}: denoiser", 1)
        assert 0 < row["rel L2, original weights"] < 1.1e-2
        assert ("rel L2, stored weights" in row) == (who.precision == "f32")


def test_a_missing_answer_is_a_row_that_failed(folders: tuple[Path, Path, Any]) -> None:
    references, outputs, arrays = folders
    (row,) = component_rows(references, outputs, WHO, Tolerance())
    assert row["result"].startswith("failed: ")
    with pytest.raises(Missed, match=r"x0 is nothing, not \(2, 4, 8, 8\)"):
        errors({"x_next": arrays["x"]}, {"x0": arrays["x"]})
    with pytest.raises(Missed, match="holds no references"):
        list(component_rows(outputs, outputs, WHO, Tolerance()))


def test_pictures_are_held_to_the_least_psnr(folders: tuple[Path, Path, Any]) -> None:
    references, outputs, arrays = folders
    image = arrays["image"]
    for found, result, decibel in (
        (image, "ok", 99.0),
        (255 - image, "failed: pictures of 4 steps on torch f32: PSNR", None),
        (image[:1], r"failed: pictures are (1, 8, 8, 3)", None),
    ):
        np.savez(outputs / "picture-00.npz", image=found)
        (row,) = picture_rows(references, outputs, WHO, 4, Tolerance())
        assert row["result"].startswith(result)
        assert decibel is None or row["PSNR dB"] == decibel
    np.savez(outputs / "picture-00.npz", image=255 - image)
    (low,) = picture_rows(references, outputs, LOW, 4, Tolerance())
    assert low["result"] == "ok", "in bfloat16 it is reported, and components are bounded"
    assert psnr(image, image) == 99.0


def test_rows_that_are_swapped_in_a_batch_are_found(tmp_path: Path) -> None:
    batched, alone = tmp_path / "batched", tmp_path / "alone"
    x = np.random.default_rng(0).standard_normal((2, 4)).astype(np.float32)
    for folder, rows in ((batched, x), (alone, x + np.float32(1e-7))):
        folder.mkdir()
        np.savez(folder / "denoiser-00.npz", x_next=rows, x0=rows)
    row = alone_row(batched, alone, WHO, Tolerance())
    assert (row["rows"], row["rel L2"] < 1e-6) == (2, True)
    np.savez(alone / "denoiser-00.npz", x_next=x[::-1], x0=x)
    with pytest.raises(Missed, match=r"off from itself alone by .*; at most 2e-02"):
        alone_row(batched, alone, LOW, Tolerance())
    (alone / "denoiser-00.npz").unlink()
    with pytest.raises(Missed, match="no rows"):
        alone_row(batched, alone, LOW, Tolerance())
