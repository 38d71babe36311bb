"""Real compiled models that were cut off, altered or emptied on disk: made anew, told by file name, and used as before.

OpenVINO's are in `tests/cdm_serve/test_fault_caches.py`, AOTInductor's in `test_aotinductor.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

import engines.quantize
from engines.base import EngineOptions
from engines.bundle import Bundle, load_bundle
from engines.onnxruntime import OnnxRuntimeEngine
from engines.tensorrt_build import Order, cached
from engines.tensorrt_library import open_library
from tests.engines.pictures import Job, draw

EMOJI = Path(__file__).resolve().parents[2] / "cdm_serve" / "bundles" / "emoji"
Damage = Callable[[bytes], bytes]
DAMAGE: dict[str, Damage] = {
    "cut off": lambda data: data[: len(data) // 2],
    "one bit": lambda data: data[:100] + bytes([data[100] ^ 1]) + data[101:],
    "emptied": lambda data: b"",
}


@pytest.fixture(scope="module")
def bundle() -> Bundle:
    return load_bundle(EMOJI)


def test_damaged_int8_graphs_are_quantized_anew(
    bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """One graph is harmed in each way; those that are whole are not made again."""
    options = EngineOptions("onnxruntime", "int8", threads=1, cache_dir=tmp_path)
    latent, size = bundle.manifest.latent, bundle.manifest.default_size
    job = Job("red apple", 1, 1, (size.height // latent.downscale, size.width // latent.downscale))
    good = draw(OnnxRuntimeEngine(bundle, options), [job]).tobytes()
    blobs = {path.stem: path for path in tmp_path.rglob("*.blob")}
    whole = {name: path.read_bytes() for name, path in blobs.items()}
    quantize = engines.quantize.quantize
    for (how, harm), name in zip(DAMAGE.items(), sorted(blobs), strict=True):
        made: list[str] = []

        def counted(path: Path, made: list[str] = made) -> bytes:
            made.append(path.stem)
            return quantize(path)

        monkeypatch.setattr(engines.quantize, "quantize", counted)
        blobs[name].write_bytes(harm(whole[name]))
        caplog.clear()
        assert draw(OnnxRuntimeEngine(bundle, options), [job]).tobytes() == good, how
        assert made == [name]
        assert [record.getMessage() for record in caplog.records] == [
            f"{blobs[name]} is damaged, its model is compiled anew"
        ]
        assert blobs[name].read_bytes()[32:100] == whole[name][32:100]


@pytest.mark.parametrize("how", DAMAGE)
def test_damaged_tensorrt_rtx_engine_is_built_anew(
    bundle: Bundle, tmp_path: Path, caplog: pytest.LogCaptureFixture, how: str
) -> None:
    """Its bytes differ from build to build: what was built is what comes back."""
    pytest.importorskip("tensorrt_rtx")
    order = Order(open_library("tensorrt-rtx"), bundle, "f32", "8.9", 1)
    store = order.cache(tmp_path)
    first, report = cached(order, store, "text_encoder", bytes)
    (blob,) = tmp_path.rglob("text_encoder.blob")
    assert cached(order, store, "text_encoder", bytes) == (first, report)
    assert caplog.text == ""
    blob.write_bytes(DAMAGE[how](blob.read_bytes()))
    second, _ = cached(order, store, "text_encoder", bytes)
    assert [record.getMessage() for record in caplog.records] == [
        f"{blob} is damaged, its model is compiled anew"
    ]
    caplog.clear()
    assert cached(order, store, "text_encoder", bytes)[0] == second
    assert caplog.text == ""


def test_tensorrt_rtx_engine_without_its_report_is_built_anew(
    bundle: Bundle, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    pytest.importorskip("tensorrt_rtx")
    order = Order(open_library("tensorrt-rtx"), bundle, "f32", "8.9", 1)
    store = order.cache(tmp_path)
    cached(order, store, "text_encoder", bytes)
    next(tmp_path.rglob("text_encoder.report.blob")).unlink()
    _, report = cached(order, store, "text_encoder", bytes)
    assert "the stored text_encoder cannot be used, it is compiled anew: what was said of it" in caplog.text
    assert cached(order, store, "text_encoder", bytes)[1] == report
