"""`model.py` of a Triton repository, on a double of ONNX Runtime."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import pytest

from engines import base
from engines.fake import fake_bundle
from engines.triton_repository import model


def test_a_gpu_that_onnxruntime_cannot_use_is_an_error_and_tf32_is_off(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    session = MagicMock()
    session.get_providers.return_value = ["CPUExecutionProvider"]
    double = SimpleNamespace(SessionOptions=MagicMock(), InferenceSession=MagicMock(return_value=session))
    monkeypatch.setitem(sys.modules, "onnxruntime", double)
    with pytest.raises(RuntimeError, match="cannot use GPU 1: it has CPUExecutionProvider; install"):
        model.onnxruntime(Path("model.onnx"), 0, 1)
    cuda = ("CUDAExecutionProvider", {"device_id": 1, "use_tf32": "0"})
    assert double.InferenceSession.call_args.kwargs["providers"][0] == cuda


@pytest.mark.parametrize(
    ("shown", "gpu", "wanted"),
    [
        (None, 1, "1"),
        ("2,3", 1, "3"),
        (" 2 , GPU-5a1f", 1, "GPU-5a1f"),
        ("0,1", None, ""),
        (None, None, ""),
    ],
)
def test_a_runtime_of_cdm_serve_sees_its_instance_s_gpu_alone(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, shown: str | None, gpu: int | None, wanted: str
) -> None:
    """Seen from where the engine is loaded: runtimes take the first GPU that CUDA shows."""
    monkeypatch.setenv(model.VISIBLE, shown or "")
    if shown is None:
        monkeypatch.delenv(model.VISIBLE)
    monkeypatch.setattr(model, "count_gpus", lambda: 1)
    seen: list[str] = []

    class Graphs(base.GraphEngine):
        def run(self, component: str, inputs: Any) -> Any:
            return {component: inputs}

    Graphs.__abstractmethods__ = frozenset()

    def load(*_: object) -> Any:
        seen.append(os.environ[model.VISIBLE])
        return Graphs()  # type: ignore[abstract]

    monkeypatch.setattr(base, "load_engine", load)
    kind, number = ("CPU", "0") if gpu is None else ("GPU", str(gpu))
    names = {"runtime": "torch", "precision": "f32", "component": "decoder", "threads": "0"}
    config = {
        "input": [],
        "max_batch_size": 4,
        "parameters": {f"cdm_{name}": {"string_value": value} for name, value in names.items()},
    }
    monkeypatch.setitem(sys.modules, "triton_python_backend_utils", MagicMock())
    monkeypatch.setattr(model, "FOLDER", tmp_path)
    (tmp_path / "bundle").mkdir()
    fake_bundle(tmp_path / "bundle")
    instance = model.TritonPythonModel()
    instance.initialize(
        {
            "model_config": json.dumps(config),
            "model_instance_kind": kind,
            "model_instance_device_id": number,
        }
    )
    assert seen == [wanted]


@pytest.mark.parametrize(
    ("shown", "gpu", "count", "sentence"),
    [
        ("0", 1, 1, r"there is no GPU 1: the server was started with CUDA_VISIBLE_DEVICES=0"),
        ("2,3", 1, 2, r"GPU 1 cannot be chosen: with CUDA_VISIBLE_DEVICES=3 this process sees 2 GPUs, not 1"),
        ("2,3", 1, 0, r"this process sees 0 GPUs, not 1; either there is no such GPU, or something in the server's"),
        ("2,3", 1, None, ""),  # no driver: the runtime says so in its own words
    ],
)  # fmt: skip
def test_a_gpu_that_cannot_be_chosen_is_an_error(
    monkeypatch: pytest.MonkeyPatch, shown: str, gpu: int, count: int | None, sentence: str
) -> None:
    monkeypatch.setenv(model.VISIBLE, shown)
    monkeypatch.setattr(model, "count_gpus", lambda: count)
    if not sentence:
        model.see_only(gpu)
        return
    with pytest.raises(RuntimeError, match=sentence):
        model.see_only(gpu)
