"""`cdm-bench triton` times every call both ways; and where no Triton server can run, it says why."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import tritonserver
from benchmarks.server import ServerError
from benchmarks.triton import TritonBenchSettings, run
from benchmarks.tritonserver import TritonServer, why_not
from engines.bundle import Bundle

STUBS = "lib/python3.11/site-packages/pytriton/tritonserver/python_backend_stubs"


@pytest.mark.skipif(bool(why_not()), reason=why_not() or "a server runs here")
def test_every_call_is_timed_in_requests_in_shared_memory_and_in_process(
    tiny_bundle: Bundle, capsys: pytest.CaptureFixture[str]
) -> None:
    run(TritonBenchSettings(bundle=tiny_bundle.root, batches=[1, 2], kib=[1, 64], rounds=1))
    document = json.loads(capsys.readouterr().out.splitlines()[-1])
    components = [f"{name}, batch {n}" for name in tiny_bundle.manifest.components for n in (1, 2)]
    assert [row["call"] for row in document["rows"]] == [
        "1 KiB there and back", "64 KiB there and back", *components,
    ]  # fmt: skip
    assert document["server"] == "triton 2.51.0"
    for row in document["rows"]:
        assert row["n"] == 1
        assert row["in request ms"] > 0 < row["shared ms"]
        if row["call"] in components:
            assert row["shared adds"] == pytest.approx(row["shared ms"] - row["in process ms"], abs=0.01)


def test_why_no_server_runs_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tritonserver, "VENV", tmp_path)
    assert why_not().startswith(
        "nvidia-pytriton is not installed; run `make triton`, or name its environment in CDM_"
    )
    with pytest.raises(ServerError, match=r"nvidia-pytriton is not installed"), TritonServer(tmp_path):
        pass
    stub = tmp_path / STUBS / "2.7" / "triton_python_backend_stub"
    stub.parent.mkdir(parents=True)
    stub.touch()
    assert "has Python backends for 2.7, not for 3." in why_not()


def test_a_library_that_the_backend_lacks_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tritonserver, "VENV", tmp_path)
    tools = tmp_path / "bin"
    tools.mkdir()
    (tools / "ldd").write_text("#!/bin/sh\necho '  libpython3.so.1.0 => not found'\n", encoding="utf-8")
    (tools / "ldd").chmod(0o755)
    monkeypatch.setenv("PATH", str(tools))
    version = f"{tritonserver.sys.version_info.major}.{tritonserver.sys.version_info.minor}"
    stub = tmp_path / STUBS / version / "triton_python_backend_stub"
    stub.parent.mkdir(parents=True)
    stub.touch()
    assert why_not() == (
        "Triton's Python backend lacks a library: libpython3.so.1.0 => not found "
        f"(Debian: apt-get install libpython{version})"
    )
