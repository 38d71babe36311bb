"""What the machine has is read where the system says it, and nothing is loaded for it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from engines import processor


def test_gpus_are_those_of_nvidias_driver(tmp_path: Path) -> None:
    nvidia, devices = tmp_path / "gpus", tmp_path / "dev"
    devices.mkdir()
    (devices / "nvidiactl").touch()
    assert processor.gpus(nvidia, devices) == ()
    (devices / "dxg").touch()
    assert processor.gpus(nvidia, devices) == ("unknown",)
    for number in (0, 11):
        (devices / f"nvidia{number}").touch()
    assert processor.gpus(nvidia, devices) == ("unknown",) * 3
    for number, model in enumerate(("NVIDIA L4", "NVIDIA H100 80GB HBM3")):
        folder = nvidia / f"0000:0{number}:00.0"
        folder.mkdir(parents=True)
        (folder / "information").write_text(f"Model: \t\t {model}\nIRQ:   \t\t 16\n", encoding="utf-8")
    assert processor.gpus(nvidia, devices) == ("NVIDIA L4", "NVIDIA H100 80GB HBM3")


@pytest.mark.parametrize(("limit", "counts"), [("1000000\n", True), ("max\n", False), (f"{10**18}\n", False)])
def test_memory_is_the_containers_where_that_is_less(tmp_path: Path, limit: str, counts: bool) -> None:
    machine = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    (tmp_path / "memory.max").write_text(limit, encoding="ascii")
    limits = (tmp_path / "memory.max", tmp_path / "absent")
    assert processor.memory_bytes(limits) == (1000000 if counts else machine)
