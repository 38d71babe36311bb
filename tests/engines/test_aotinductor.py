"""AOTInductor packages, compiled for this machine's CPU: the same pictures, found again, and run by torch alone."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch._inductor.config
from numpy.typing import NDArray

from engines import aotinductor
from engines.aotinductor import AOTInductorEngine
from engines.base import EngineOptions, load_engine
from engines.bundle import Bundle
from engines.cache import CompiledCache
from engines.errors import ExecutionError, RuntimeUnavailable
from tests.engines.pictures import Job, draw, worst
from tests.engines.weights import with_weights

ROOT = Path(__file__).resolve().parents[2]

JOBS = [Job("red apple", 1, 4), Job("woman firefighter", 2, 2), Job("", 3, 5), Job("🍎", 5, 1)]
ODD = [Job("green apple", 6, 3, size=(6, 10)), Job("Face", 7, 3, size=(6, 10))]

COMPONENTS = ["text_encoder", "text_encoder_2", "denoiser", "decoder"]

FROM_ONNXRUNTIME = 2
"""Of 255; the graphs' float16 weights are part of it."""

Options = Callable[..., EngineOptions]


@pytest.fixture(scope="module")
def bundle(bundle: Bundle, student: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return with_weights(bundle, student, tmp_path_factory.mktemp("weights") / "tiny")


@pytest.fixture(scope="module")
def cache_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("packages")


@pytest.fixture(scope="module")
def options(cache_dir: Path) -> Options:
    def options(**given: Any) -> EngineOptions:
        return EngineOptions(
            **{"runtime": "aotinductor", "precision": "f32", "threads": 1, "cache_dir": cache_dir, **given}
        )

    return options


@pytest.fixture(scope="module")
def engine(bundle: Bundle, options: Options) -> Any:
    """Compiled for real, once; all other engines of this file find its packages, or take them for new ones."""
    with torch._inductor.config.patch({"aot_inductor.compile_wrapper_opt_level": "O0"}):  # half the time
        loaded = load_engine(bundle, options())
    yield loaded
    loaded.close()


@pytest.fixture
def builds(monkeypatch: pytest.MonkeyPatch, engine: AOTInductorEngine) -> list[tuple[str, str]]:
    """What is compiled from now on (component, precision): the packages there already are taken for new ones."""
    packages = {name: engine._cache.load(name) for name in COMPONENTS}
    asked: list[tuple[str, str]] = []

    def build(bundle: Bundle, component: str, precision: str, device: object, fused: object) -> bytes:
        asked.append((component, precision))
        package = packages[component]
        assert package is not None
        return package

    monkeypatch.setattr("engines.aotinductor_build.build", build)
    return asked


@pytest.fixture(scope="module")
def reference(bundle: Bundle) -> Callable[[list[Job]], NDArray[np.uint8]]:
    runtime = load_engine(bundle, EngineOptions("onnxruntime", "f32", threads=1))
    return lambda jobs: draw(runtime, jobs)


@pytest.mark.slow
def test_pictures_equal_onnxruntimes_alone_and_in_a_batch_of_mixed_steps(
    engine: AOTInductorEngine, reference: Callable[[list[Job]], NDArray[np.uint8]]
) -> None:
    for jobs in (JOBS, ODD):
        theirs, together = reference(jobs), draw(engine, jobs)
        assert theirs.std() > 20
        assert worst(together, theirs) <= FROM_ONNXRUNTIME
        for row, job in enumerate(jobs):  # a batch of one is what compilers make constants of
            assert worst(draw(engine, [job])[0], together[row]) <= 1, job


@pytest.mark.slow
@pytest.mark.parametrize("group", [1, 3])
def test_invariant_batches_give_the_same_bytes_in_any_company(
    bundle: Bundle, options: Options, builds: list[tuple[str, str]], group: int
) -> None:
    engine = load_engine(bundle, options(invariant_batch=group))
    together = draw(engine, JOBS)
    for row, job in enumerate(JOBS):
        assert np.array_equal(draw(engine, [job])[0], together[row]), job
    engine.close()
    assert builds == []  # a package is of any batch


@pytest.mark.slow
def test_what_compiled_code_would_not_notice_is_refused(engine: AOTInductorEngine) -> None:
    conditioning = engine.encode([engine.tokenize("red apple")])
    with pytest.raises(ExecutionError, match="denoiser takes latents"):
        engine.denoise([engine.put(np.zeros((8, 7, 7), np.float32))], [1.0], [0.5], conditioning)
    with pytest.raises(ExecutionError, match="denoiser takes x of shape"):
        engine.denoise([engine.put(np.zeros((3, 8, 8), np.float32))], [1.0], [0.5], conditioning)
    assert draw(engine, JOBS[:1]).shape == (1, 64, 64, 3)


@pytest.mark.slow
def test_info_says_what_runs(engine: AOTInductorEngine) -> None:
    info = engine.info
    assert (info.runtime, info.version, info.precision) == ("aotinductor", torch.__version__, "f32")
    assert (info.threads, info.max_batch) == (1, 8)


TORCH_ALONE = """
import sys
from importlib.machinery import PathFinder

class Without(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        if name.split(".")[0] in ("accelerate", "diffusers", "onnx", "onnxscript", "safetensors", "transformers"):
            return None
        return super().find_spec(name, path, target)

sys.meta_path[sys.meta_path.index(PathFinder)] = Without

from pathlib import Path
import numpy as np
import torch
from engines.base import EngineOptions, load_engine
from engines.bundle import load_bundle
from tests.engines.pictures import Job, draw

torch.set_num_threads(1)
options = EngineOptions("aotinductor", "f32", threads=1, cache_dir=Path(sys.argv[2]))
try:
    engine = load_engine(load_bundle(Path(sys.argv[1])), options)
except Exception as error:
    raise SystemExit(str(error))
np.save(sys.argv[3], draw(engine, [Job("red apple", 1, 4)]))
"""


def torch_alone(bundle: Bundle, cache_dir: Path, out: Path) -> subprocess.CompletedProcess[str]:
    """In a process with neither a model library nor a compiler."""
    return subprocess.run(
        [sys.executable, "-c", TORCH_ALONE, bundle.root, cache_dir, out],
        cwd=ROOT, env={**os.environ, "CXX": "no-such-compiler"}, capture_output=True, text=True, check=False,
    )  # fmt: skip


@pytest.mark.slow
def test_packages_that_are_there_need_torch_alone(
    engine: AOTInductorEngine, bundle: Bundle, cache_dir: Path, tmp_path: Path
) -> None:
    done = torch_alone(bundle, cache_dir, tmp_path / "alone.npy")
    assert (done.returncode, done.stderr) == (0, "")
    assert np.array_equal(np.load(tmp_path / "alone.npy"), draw(engine, [Job("red apple", 1, 4)]))


def test_packages_that_are_not_there_need_the_extra(bundle: Bundle, tmp_path: Path) -> None:
    done = torch_alone(bundle, tmp_path / "empty", tmp_path / "alone.npy")
    assert done.returncode == 1
    assert done.stderr.startswith("aotinductor needs the package 'diffusers' once")
    assert "install the extra 'train'" in done.stderr


@pytest.mark.slow
def test_packages_are_found_again_and_damaged_ones_made_anew(
    bundle: Bundle, options: Options, engine: AOTInductorEngine, builds: list[tuple[str, str]]
) -> None:
    blobs = {blob.stem: blob for blob in engine._cache.folder.rglob("*.blob")}  # type: ignore[union-attr]
    assert set(blobs) == set(COMPONENTS)
    load_engine(bundle, options()).close()
    assert builds == []
    blobs["decoder"].write_bytes(blobs["decoder"].read_bytes()[:-1])
    load_engine(bundle, options()).close()
    assert builds == [("decoder", "f32")]
    load_engine(bundle, options()).close()
    assert builds == [("decoder", "f32")]


@pytest.mark.slow
def test_package_that_does_not_load_is_made_anew(
    bundle: Bundle,
    options: Options,
    engine: AOTInductorEngine,
    builds: list[tuple[str, str]],
    caplog: pytest.LogCaptureFixture,
) -> None:
    engine._cache.store("text_encoder", b"no package")
    again = load_engine(bundle, options())
    assert builds == [("text_encoder", "f32")]
    assert "the stored text_encoder cannot be used" in caplog.text
    assert worst(draw(again, JOBS[:1]), draw(engine, JOBS[:1])) == 0
    again.close()


@pytest.mark.slow
def test_whatever_shapes_the_code_is_in_the_key(
    bundle: Bundle,
    options: Options,
    engine: AOTInductorEngine,
    builds: list[tuple[str, str]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def folder(of: Bundle = bundle, **given: Any) -> str:
        loaded = load_engine(of, options(**given))
        loaded.close()
        assert loaded.cache_folder is not None
        return loaded.cache_folder.name

    manifest = bundle.manifest
    one_size = manifest.model_copy(update={"sizes": manifest.sizes[:1]})
    other_model = manifest.model_copy(update={"model": manifest.model[1:]})
    found = [folder(), folder(precision="bf16"), folder(threads=2)]
    torch.set_num_threads(1)
    found += [folder(Bundle(bundle.root, changed, "")) for changed in (one_size, other_model)]
    for target, name, value in (
        (torch, "__version__", "2.99"),
        (aotinductor.processor, "flags", lambda: frozenset({"amx_fp8"})),
        (aotinductor.processor, "name", lambda: "Another CPU"),
        (aotinductor, "_code", lambda: "other"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(target, name, value)
            found.append(folder())
    assert found[0] == engine.cache_folder.name  # type: ignore[union-attr]
    assert len(set(found)) == len(found)
    assert len(builds) == (len(found) - 1) * len(COMPONENTS)


def test_the_code_that_makes_a_package_is_all_there() -> None:
    assert all((Path(aotinductor.__file__).parent / source).exists() for source in aotinductor.SOURCES)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"precision": "int8"}, "precision='int8' is not one of aotinductor's: auto, f32, bf16"),
        ({"fused_kernels": True}, "fused_kernels need an NVIDIA GPU"),
    ],
)
def test_what_means_nothing_here_is_refused(
    bundle: Bundle, options: Options, given: dict[str, Any], message: str
) -> None:
    with pytest.raises(RuntimeUnavailable, match=message):
        load_engine(bundle, options(**given))


def test_bundle_without_weights_is_refused_with_the_remedy(bundle: Bundle, options: Options) -> None:
    bare = Bundle(bundle.root, bundle.manifest.model_copy(update={"model": ()}), bundle.sha256)
    with pytest.raises(RuntimeUnavailable, match=r"lacks the model's own weights.*--weights"):
        load_engine(bare, options())


@pytest.mark.slow
def test_without_a_compiler_the_remedy_is_told_and_nothing_is_kept(
    bundle: Bundle, options: Options, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    with (
        torch._inductor.config.patch({"cpp.cxx": ("no-such-compiler",)}),
        pytest.raises(
            RuntimeUnavailable, match=r"aotinductor cannot compile the text_encoder here: .*\(g\+\+\)"
        ),
    ):
        load_engine(bundle, options(cache_dir=tmp_path))
    assert not list(tmp_path.rglob("*.blob"))
    assert CompiledCache(next(tmp_path.iterdir())).load("text_encoder") is None
