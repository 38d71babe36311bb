"""The Open Inference Protocol as `tritonclient` speaks it to a real server process."""

from __future__ import annotations

import asyncio
import io
from collections.abc import Iterator
from typing import Any

import httpx
import numpy as np
import pytest
import tritonclient.http as triton
from numpy.typing import NDArray
from PIL import Image
from tritonclient.http import aio
from tritonclient.utils import InferenceServerException

from benchmarks.server import Server
from cdm_serve.kserve_schemas import DEFAULT_OUTPUTS, INPUTS, OUTPUTS
from engines.bundle import Bundle
from engines.noise import MAX_SEED

NUMPY = {"BYTES": np.object_, "INT32": np.int32, "INT64": np.int64}


@pytest.fixture(scope="module")
def server(bundle: Bundle) -> Iterator[Server]:
    with Server(["--engine", "fake", "--bundle", str(bundle.root)]) as server:
        yield server


@pytest.fixture
def client(server: Server) -> Iterator[triton.InferenceServerClient]:
    with triton.InferenceServerClient(f"127.0.0.1:{server.port}") as client:
        yield client


def tensor(name: str, values: list[Any], binary: bool = True) -> triton.InferInput:
    datatype = INPUTS[name].datatype
    given = triton.InferInput(name, [len(values)], datatype)
    return given.set_data_from_numpy(np.array(values, NUMPY[datatype]), binary_data=binary)


def wanted(*names: str, binary: bool = True) -> list[triton.InferRequestedOutput]:
    return [triton.InferRequestedOutput(name, binary_data=binary) for name in names]


def pixels(file: bytes) -> NDArray[np.uint8]:
    with Image.open(io.BytesIO(file)) as image:
        assert image.format == "PNG"
        return np.asarray(image)


def test_client_finds_server_and_model_live_and_ready(client: triton.InferenceServerClient) -> None:
    assert client.is_server_live()
    assert client.is_server_ready()
    assert client.is_model_ready("fake")
    assert client.is_model_ready("fake", "1")
    assert not client.is_model_ready("fake", "2")
    assert not client.is_model_ready("other")


def test_metadata_and_config_describe_what_infer_takes_and_gives(
    client: triton.InferenceServerClient, server: Server
) -> None:
    assert "binary_tensor_data" in client.get_server_metadata()["extensions"]
    metadata, config = client.get_model_metadata("fake"), client.get_model_config("fake", "1")
    assert (metadata["name"], metadata["versions"], config["name"]) == ("fake", ["1"], "fake")
    assert [given["name"] for given in metadata["inputs"]] == list(INPUTS)
    assert [given["name"] for given in config["input"] if not given["optional"]] == ["prompt"]
    info = httpx.get(f"{server.url}/info").json()
    assert config["parameters"]["steps"]["string_value"] == ", ".join(map(str, info["steps"]))
    assert config["parameters"]["max_images"]["string_value"] == str(info["max_images"])
    result = client.infer("fake", [tensor("prompt", ["cat"] * 2)], outputs=wanted(*OUTPUTS))
    for described in metadata["outputs"]:
        given = result.get_output(described["name"])
        assert given["datatype"] == described["datatype"]
        assert len(given["shape"]) == len(described["shape"])
        sizes = zip(given["shape"], described["shape"], strict=True)
        assert all(expected in (-1, size) for size, expected in sizes)


def test_nothing_but_a_prompt_gives_pixels_seed_and_steps_as_bytes(
    client: triton.InferenceServerClient,
) -> None:
    result = client.infer("fake", [tensor("prompt", ["red apple"])], request_id="order 7")
    answer = result.get_response()
    assert (answer["model_name"], answer["model_version"], answer["id"]) == ("fake", "1", "order 7")
    assert [output["name"] for output in answer["outputs"]] == list(DEFAULT_OUTPUTS)
    assert all("binary_data_size" in output["parameters"] for output in answer["outputs"])
    image = result.as_numpy("image")
    assert (image.dtype, image.shape) == (np.uint8, (1, 128, 128, 3))
    assert result.as_numpy("steps").tolist() == [4]
    again = client.infer(
        "fake", [tensor("prompt", ["red apple"]), tensor("seed", result.as_numpy("seed").tolist())]
    )
    other = client.infer("fake", [tensor("prompt", ["red apple"])])
    assert np.array_equal(again.as_numpy("image"), image)
    assert other.as_numpy("seed") != result.as_numpy("seed")


def test_rows_of_mixed_steps_are_the_pictures_that_generate_gives(
    client: triton.InferenceServerClient, server: Server
) -> None:
    prompts, seeds, steps = ["red apple", "blue häuser 🍎", "cat"], [7, MAX_SEED, 0], [4, 1, 8]
    inputs = [tensor("prompt", prompts), tensor("seed", seeds), tensor("steps", steps)]
    inputs += [tensor("width", [128]), tensor("height", [64])]
    result = client.infer("fake", inputs, outputs=wanted("steps", "encoded", "image", "seed"))
    assert [output["name"] for output in result.get_response()["outputs"]] == [
        "steps",
        "encoded",
        "image",
        "seed",
    ]
    assert (result.as_numpy("steps").tolist(), result.as_numpy("seed").tolist()) == (steps, seeds)
    assert result.as_numpy("image").shape == (3, 64, 128, 3)
    for row, (prompt, seed, count) in enumerate(zip(prompts, seeds, steps, strict=True)):
        body = {"prompt": prompt, "seed": seed, "steps": count, "width": 128, "height": 64}
        file = httpx.post(f"{server.url}/generate", json=body).content
        assert np.array_equal(result.as_numpy("image")[row], pixels(file))
        assert result.as_numpy("encoded")[row] == file


@pytest.mark.parametrize("binary_in", [True, False])
@pytest.mark.parametrize("binary_out", [True, False])
def test_json_and_binary_tensors_say_the_same(
    client: triton.InferenceServerClient, binary_in: bool, binary_out: bool
) -> None:
    given = {"prompt": ["cat", "hund ß"], "seed": [5, 6], "steps": [2, 1], "width": [64], "height": [64]}
    plain = client.infer("fake", [tensor(name, values) for name, values in given.items()])
    inputs = [tensor(name, values, binary_in) for name, values in given.items()]
    result = client.infer("fake", inputs, outputs=wanted(*DEFAULT_OUTPUTS, binary=binary_out))
    for name in DEFAULT_OUTPUTS:
        assert ("data" in result.get_output(name)) != binary_out
        assert np.array_equal(result.as_numpy(name), plain.as_numpy(name))


@pytest.mark.parametrize("algorithm", ["gzip", "deflate"])
def test_compressed_request_is_the_same_request(client: triton.InferenceServerClient, algorithm: str) -> None:
    inputs = [tensor("prompt", ["cat"]), tensor("seed", [3])]
    plain = client.infer("fake", inputs)
    compressed = client.infer(
        "fake", inputs, request_compression_algorithm=algorithm, response_compression_algorithm=algorithm
    )
    assert np.array_equal(compressed.as_numpy("image"), plain.as_numpy("image"))


def test_requests_in_flight_together_are_each_their_own(server: Server) -> None:
    with triton.InferenceServerClient(f"127.0.0.1:{server.port}", concurrency=4) as client:
        pending = [
            client.async_infer("fake", [tensor("prompt", ["cat"]), tensor("seed", [i])]) for i in range(8)
        ]
        together = [each.get_result() for each in pending]
        for seed, result in enumerate(together):
            alone = client.infer("fake", [tensor("prompt", ["cat"]), tensor("seed", [seed])])
            assert np.array_equal(result.as_numpy("image"), alone.as_numpy("image"))


def test_asyncio_client_is_served_and_refused_alike(server: Server) -> None:
    async def talk() -> tuple[Any, Any]:
        async with aio.InferenceServerClient(f"127.0.0.1:{server.port}") as client:
            assert await client.is_model_ready("fake")
            result = await client.infer("fake", [tensor("prompt", ["cat"]), tensor("steps", [2])])
            with pytest.raises(InferenceServerException) as caught:
                await client.infer("fake", [tensor("prompt", ["cat"]), tensor("steps", [5])])
            return result, caught.value

    result, error = asyncio.run(talk())
    assert result.as_numpy("image").shape == (1, 128, 128, 3)
    assert (error.status(), "steps=5" in error.message()) == ("400", True)


REFUSED: list[tuple[dict[str, Any], str, list[str]]] = [
    ({"model_name": "other"}, "404", ['"other"', '"fake"']),
    ({"model_version": "7"}, "404", ["'7'", "'1'"]),
    ({"outputs": ["latents"]}, "400", ['"latents"', "image, encoded, seed, steps"]),
    ({"outputs": ["seed", "seed"]}, "400", ["seed is there twice"]),
    ({"inputs": {}}, "400", ["prompt", "required"]),
    ({"inputs": {"prompt": []}}, "400", ["0 rows", "1 to 16"]),
    ({"inputs": {"prompt": ["cat"] * 17}}, "400", ["17 rows", "1 to 16"]),
    ({"inputs": {"prompt": ["cat", " "]}}, "400", ["row 1", "prompt is empty"]),
    ({"inputs": {"prompt": ["cat", "a" * 1001]}}, "400", ["row 1", "1001 characters", "1000"]),
    ({"inputs": {"prompt": [b"\xff"]}}, "400", ["prompt[0]", "UTF-8"]),
    ({"inputs": {"prompt": ["cat"] * 3, "seed": [1, 2]}}, "400", ["seed", "[2]", "[1]", "[3]"]),
    ({"inputs": {"prompt": ["cat"] * 2, "width": [64, 64]}}, "400", ["width", "[2]", "[1]"]),
    ({"inputs": {"prompt": ["cat"], "seed": [-1]}}, "400", ["seed=-1", str(MAX_SEED)]),
    ({"inputs": {"prompt": ["cat"] * 2, "steps": [4, 5]}}, "400", ["row 1", "steps=5", "1, 2, 3, 4, 6, 8"]),
    ({"inputs": {"prompt": ["cat"], "height": [65]}}, "400", ["height=65", "128×128"]),
    ({"inputs": {"prompt": ["cat"], "deadline_ms": [0]}}, "400", ["deadline_ms=0", "1 to 3600000"]),
    ({"inputs": {"prompt": ["cat"], "deadline_ms": [9]}, "timeout": 9}, "400", ["deadline_ms", "timeout"]),
    ({"timeout": -1}, "400", ["timeout=-1", "0"]),
    ({"priority": 11}, "400", ["priority=11", "10"]),
    ({"sequence_id": 5}, "400", ["sequence_id"]),
    ({"parameters": {"timout": 5}}, "400", ["timout"]),
]


@pytest.mark.parametrize(("asked", "status", "fragments"), REFUSED)
def test_refusal_reaches_the_client_with_its_status_and_message(
    client: triton.InferenceServerClient, asked: dict[str, Any], status: str, fragments: list[str]
) -> None:
    given = {"model_name": "fake", **asked}
    given["inputs"] = [
        tensor(name, values) for name, values in asked.get("inputs", {"prompt": ["cat"]}).items()
    ]
    given["outputs"] = wanted(*asked.get("outputs", DEFAULT_OUTPUTS))
    with pytest.raises(InferenceServerException) as caught:
        client.infer(**given)
    assert caught.value.status() == status
    assert all(fragment in caught.value.message() for fragment in fragments)
    assert len(caught.value.message()) < 400


def test_tensor_of_another_type_is_refused(client: triton.InferenceServerClient) -> None:
    steps = triton.InferInput("steps", [1], "INT64").set_data_from_numpy(np.array([4]))
    with pytest.raises(InferenceServerException, match='steps has datatype "INT64"; allowed: INT32'):
        client.infer("fake", [tensor("prompt", ["cat"]), steps])
    shared = triton.InferInput("prompt", [1], "BYTES")
    shared.set_shared_memory("region", 8)
    with pytest.raises(InferenceServerException, match=r"inputs\[0\].parameters.shared_memory"):
        client.infer("fake", [shared])


def test_what_the_protocol_has_and_we_have_not_is_an_error_of_its_kind(
    client: triton.InferenceServerClient,
) -> None:
    with pytest.raises(InferenceServerException, match="there is no /v2/repository/index"):
        client.get_model_repository_index()
    with pytest.raises(InferenceServerException, match=r"encoded .* binary_data=true"):
        client.infer("fake", [tensor("prompt", ["cat"])], outputs=wanted("encoded", binary=False))
