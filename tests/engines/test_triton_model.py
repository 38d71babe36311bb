"""`model.py` of a Triton repository, on a double of ONNX Runtime."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import MagicMock

import pytest

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
