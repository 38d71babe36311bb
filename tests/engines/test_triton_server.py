"""A real Triton Inference Server on loopback: the pictures of ONNX Runtime, and clear words where it cannot be.

The server comes from the wheel nvidia-pytriton (`make triton`), and has the Python backend only: that the ONNX Runtime
backend would take its configuration is seen from how far the server gets without one.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from tritonclient.grpc import InferenceServerClient

from benchmarks.server import ServerError, free_port
from benchmarks.tritonserver import SHARED, TritonServer, why_not
from engines import triton_memory
from engines.base import Engine, EngineOptions, GraphEngine, load_engine
from engines.bundle import Bundle
from engines.errors import ExecutionError, RuntimeUnavailable
from engines.export.main import main as cdm_export
from engines.triton import TritonEngine
from engines.triton_memory import plain_input
from engines.triton_repository.repository import write_repository
from engines.triton_repository.settings import RepositorySettings
from tests.engines.pictures import Job, draw, starting_noise, worst
from tests.engines.triton_helpers import JOBS, options, regions

pytestmark = pytest.mark.skipif(bool(why_not()), reason=why_not() or "a server runs here")

ODD = Job("green apple", 6, 3, size=(6, 10))


@pytest.fixture(scope="module")
def reference(bundle: Bundle) -> Engine:
    return load_engine(bundle, EngineOptions("onnxruntime", threads=1))


@pytest.fixture(scope="module")
def server(bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TritonServer]:
    """Batches of up to 4, each run as it was sent; the repository is what the command line writes."""
    out = tmp_path_factory.mktemp("triton") / "repository"
    flags = (
        "--triton-backend python --triton-threads 1 --triton-max-batch 4 --no-triton-dynamic-batching "
        "--triton-warm-up 1,4"
    )
    assert cdm_export([str(bundle.root), "--to", "triton", "--out", str(out), *flags.split()]) == 0
    with TritonServer(out) as started:
        yield started


@pytest.fixture(scope="module", params=["shared memory", "mixed", "plain"])
def engine(request: pytest.FixtureRequest, bundle: Bundle, server: TritonServer) -> Iterator[Engine]:
    """All tensors in shared memory; the large ones; none."""
    with pytest.MonkeyPatch.context() as patch:
        # The tiny model's tensors are small: some are above 1 KiB, none is above what is small outside of tests.
        patch.setattr(triton_memory, "SMALL_BYTES", 0 if request.param == "shared memory" else 1024)
        loaded = TritonEngine(bundle, options(server), shared_memory=request.param != "plain")
        assert (loaded._region is None) == (request.param == "plain")
        yield loaded
        loaded.close()


# pictures


@pytest.mark.parametrize("job", [*JOBS, ODD], ids=str)
def test_picture_is_the_one_of_onnxruntime(engine: Engine, reference: Engine, job: Job) -> None:
    picture = draw(engine, [job])
    assert picture.std() > 20
    assert worst(picture, draw(reference, [job])) == 0


def test_batch_of_mixed_steps_is_the_one_of_onnxruntime(engine: Engine, reference: Engine) -> None:
    assert worst(draw(engine, JOBS), draw(reference, JOBS)) == 0


def test_every_component_gives_what_onnxruntime_gives(engine: TritonEngine, reference: TritonEngine) -> None:
    random = np.random.default_rng(0)
    for component, part in engine.manifest.components.items():
        known = {"batch": 3, "height": 6, "width": 10, **engine.manifest.text_lengths}
        inputs = {}
        for name, spec in part.inputs.items():
            shape = [known[dim] if isinstance(dim, str) else dim for dim in spec.shape]
            values = random.uniform(0, 1, shape) if spec.dtype == "float32" else random.integers(0, 50, shape)
            inputs[name] = values.astype(spec.dtype)
        found, wanted = engine.run(component, inputs), reference.run(component, inputs)
        assert list(found) == list(wanted)
        for name in wanted:
            np.testing.assert_array_equal(found[name], wanted[name])


def test_outputs_outlive_the_next_call(engine: Engine) -> None:
    conditioning = engine.encode([engine.tokenize(job.prompt) for job in JOBS])
    kept = [[array.copy() for array in row] for row in conditioning]
    x, _ = engine.denoise([starting_noise(engine, job) for job in JOBS], [1.0] * 4, [0.5] * 4, conditioning)
    before = [array.copy() for array in x]
    engine.denoise(x, [0.5] * 4, [0.2] * 4, conditioning)
    assert all(np.array_equal(a, b) for a, b in zip(x, before, strict=True))
    rows = zip(conditioning, kept, strict=True)
    assert all(np.array_equal(a, b) for row in rows for a, b in zip(*row, strict=True))


def test_calls_leave_nothing_in_the_server_s_log(engine: Engine, server: TritonServer) -> None:
    before = len(server.log)
    draw(engine, JOBS)
    assert server.log[before:] == ""


def test_info_says_who_executes(engine: Engine, server: TritonServer) -> None:
    info = engine.info
    assert (info.runtime, info.version, info.precision, info.max_batch) == ("triton", "2.51.0", "f32", 4)
    assert info.device == f"triton 2.51.0 at {server.url} (CPU)"


def test_load_engine_finds_it_by_name(bundle: Bundle, server: TritonServer, reference: Engine) -> None:
    engine = load_engine(bundle, options(server, max_batch=2))
    assert engine.info.max_batch == 2  # ours, where it is the smaller
    assert worst(draw(engine, JOBS[:2]), draw(reference, JOBS[:2])) == 0
    engine.close()


def test_invariant_batches_give_the_same_bytes_in_any_company(bundle: Bundle, server: TritonServer) -> None:
    engine = TritonEngine(bundle, options(server, invariant_batch=3))
    together = draw(engine, JOBS)
    for row, job in enumerate(JOBS):
        assert np.array_equal(draw(engine, [job])[0], together[row])
    engine.close()


# shared memory


def test_close_gives_the_memory_back_on_both_sides(bundle: Bundle, server: TritonServer) -> None:
    here, there = set(SHARED.glob("cdm-*")), regions(server)
    engine = TritonEngine(bundle, options(server))
    (ours,) = regions(server) - there
    assert set(SHARED.glob("cdm-*")) - here == {SHARED / ours}
    engine.close()
    assert regions(server) == there
    assert set(SHARED.glob("cdm-*")) == here
    engine.close()  # again does nothing


@pytest.mark.parametrize("obstacle", ["full", "elsewhere"])
def test_without_shared_memory_tensors_go_in_the_request(
    bundle: Bundle,
    server: TritonServer,
    reference: Engine,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    obstacle: str,
) -> None:
    if obstacle == "full":

        def full(*_: object) -> None:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(triton_memory.os, "posix_fallocate", full)  # type: ignore[attr-defined]
    else:  # the server looks for what another machine has
        register = InferenceServerClient.register_system_shared_memory
        monkeypatch.setattr(
            InferenceServerClient,
            "register_system_shared_memory",
            lambda self, name, key, size, **given: register(self, name, f"{key}-not", size, **given),
        )
    here = set(SHARED.glob("cdm-*"))
    engine = TritonEngine(bundle, options(server))
    assert "without shared memory" in caplog.text
    assert set(SHARED.glob("cdm-*")) == here
    assert worst(draw(engine, JOBS), draw(reference, JOBS)) == 0
    engine.close()


# mistakes


def test_a_model_that_is_not_there_is_named_with_those_that_are(bundle: Bundle, server: TritonServer) -> None:
    manifest = bundle.manifest.model_copy(update={"name": "pear"})
    other = Bundle(bundle.root, manifest, bundle.sha256)
    with pytest.raises(
        RuntimeUnavailable, match=r"has no model 'pear-text_encoder' \(it has: .*-denoiser.*--to triton"
    ):
        TritonEngine(other, options(server))


def test_a_model_of_other_weights_or_tensors_is_refused(bundle: Bundle, server: TritonServer) -> None:
    def changed(component: str, **update: object) -> Bundle:
        part = bundle.manifest.components[component].model_copy(update=update)
        components = {**bundle.manifest.components, component: part}
        return Bundle(
            bundle.root, bundle.manifest.model_copy(update={"components": components}), bundle.sha256
        )

    decoder = bundle.manifest.components["decoder"]
    x, image = decoder.inputs["x"], decoder.outputs["image"]
    graph = decoder.graphs["float32"]
    other = graph.model_copy(update={"file": graph.file.model_copy(update={"sha256": "0" * 64})})
    cases = {
        r"decoder: version 1 has other weights; write the repository again": {"graphs": {"float32": other}},
        r"takes x, not latent, x": {"inputs": {"x": x, "latent": x}},
        r"takes x as TYPE_FP32, not TYPE_FP16": {"inputs": {"x": x.model_copy(update={"dtype": "float16"})}},
        r"gives image of dimensions \[-1, -1, 3\], not \[-1, -1, 4\]": {
            "outputs": {"image": image.model_copy(update={"shape": (*image.shape[:3], 4)})}
        },
    }
    for sentence, update in cases.items():
        with pytest.raises(RuntimeUnavailable, match=sentence):
            TritonEngine(changed("decoder", **update), options(server))


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({"triton_url": ""}, r"the triton runtime needs triton_url, HOST:PORT"),
        ({"triton_url": "http://127.0.0.1:8000"}, r"triton_url='http://.*' is no address; give HOST:PORT"),
        ({"threads": 2}, r"threads=2 means nothing to triton"),
        ({"cache_dir": Path("cache")}, r"cache_dir=cache means nothing to triton"),
        ({"precision": "bf16"}, r"precision='bf16' is not what the Triton server at .* runs, which is f32"),
        ({"invariant_batch": 5}, r"invariant_batch=5 exceeds the 4 pictures"),
    ],
)
def test_options_that_it_cannot_follow_are_refused(
    bundle: Bundle, server: TritonServer, given: dict[str, object], sentence: str
) -> None:
    with pytest.raises(RuntimeUnavailable, match=sentence):
        TritonEngine(bundle, EngineOptions("triton", **{"triton_url": server.url, **given}))  # type: ignore[arg-type]


def test_nobody_there_is_one_sentence(bundle: Bundle) -> None:
    url = f"127.0.0.1:{free_port()}"
    with pytest.raises(RuntimeUnavailable, match=rf"no Triton server answers gRPC at {url} \(.*\); start it"):
        TritonEngine(bundle, EngineOptions("triton", triton_url=url))


def test_what_a_model_cannot_run_is_an_execution_error_with_its_reason(
    engine: TritonEngine, reference: Engine
) -> None:
    ids = np.full((1, engine.manifest.text_lengths["text_encoder_length"]), 10**6)  # beyond the vocabulary
    with pytest.raises(ExecutionError, match=r"triton failed in text_encoder at batch 1: .*indices"):
        engine._checked("text_encoder", 1, {"input_ids": ids})
    assert worst(draw(engine, JOBS[:1]), draw(reference, JOBS[:1])) == 0  # and it goes on


# other backends


def test_a_runtime_of_ours_runs_in_the_python_backend(bundle: Bundle, tmp_path: Path) -> None:
    settings = RepositorySettings(backend="python", runtime="openvino", threads=1)
    write_repository(bundle, tmp_path / "repository", settings)
    theirs = load_engine(bundle, EngineOptions("openvino", "f32", threads=1))
    assert isinstance(theirs, GraphEngine)
    name, x = f"{bundle.manifest.name}-decoder", starting_noise(theirs, ODD)[None]
    # Every model's process loads the whole bundle; one is enough.
    with (
        TritonServer(
            tmp_path / "repository", ["--model-control-mode=explicit", f"--load-model={name}"]
        ) as server,
        InferenceServerClient(server.url) as client,
    ):
        picture = client.infer(name, [plain_input("x", x)]).as_numpy("image")
    assert worst(picture, theirs.run("decoder", {"x": x})["image"]) <= 1


def test_the_server_takes_the_configuration_for_onnxruntime_and_lacks_only_the_backend(
    bundle: Bundle, tmp_path: Path
) -> None:
    write_repository(
        bundle, tmp_path / "repository", RepositorySettings(warm_up=(1, 8), preferred_batches=(4, 8))
    )
    with (
        pytest.raises(ServerError, match=r"ended with exit code 1") as found,
        TritonServer(tmp_path / "repository"),
    ):
        pass
    message = str(found.value)
    assert message.count("unable to find backend library for backend 'onnxruntime'") >= 4, message
