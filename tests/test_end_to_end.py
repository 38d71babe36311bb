"""The whole product once through, small: a teacher of the real classes, CDM, export, server, picture."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from fastapi.testclient import TestClient
from numpy.typing import NDArray
from PIL import Image

from cdm_serve.app import create_app
from cdm_serve.images import read_parameters
from cdm_serve.settings import ServeSettings
from engines.base import load_engine
from engines.bundle import load_bundle
from engines.export.main import main as cdm_export
from tests.tiny_sd3 import build_tiny_sd3
from training.main import main as cdm_train

PROMPTS = ("red apple", "green apple", "woman firefighter", "face with tears")
TOLERANCE = 1
"""Levels of 255 by which a picture may change with the company in its batch, in float32."""


@pytest.fixture(scope="module")
def bundle_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("product")
    teacher = build_tiny_sd3(root / "teacher")
    prompts, run = root / "prompts.txt", root / "run"
    prompts.write_text("\n".join(PROMPTS), encoding="utf-8")
    distil = f"emoji-cdm --teacher {teacher} --prompts {prompts} --out {run}"
    few = "--steps 4 --batch 2 --n-max 3 --sample-every 0"
    assert cdm_train(f"{distil} {few}".split()) == 0  # four fake-teacher steps, two student steps
    assert cdm_export([str(run / "student"), "--out", str(root / "bundle"), "--name", "tiny"]) == 0
    return root / "bundle"


@pytest.fixture(scope="module", params=["onnxruntime", "openvino"])
def client(request: pytest.FixtureRequest, bundle_folder: Path) -> Iterator[TestClient]:
    settings = ServeSettings(
        bundle=(bundle_folder,),
        engine=request.param,
        precision="f32",
        threads=1,
        max_batch=4,
        embedding_cache=2,
    )
    engine = load_engine(load_bundle(bundle_folder), settings.engine_options())
    app = create_app(settings, engine)
    with TestClient(app) as client:
        assert app.state.models.default.runner.ready.wait(120)
        yield client
    engine.close()


def _picture(client: TestClient, **body: object) -> NDArray[np.int16]:
    response = client.post("/generate", json=body)
    assert response.status_code == 200, response.text
    image = Image.open(io.BytesIO(response.content))
    assert image.size == (64, 64)
    assert response.headers["x-steps"] == str(body["steps"])
    assert read_parameters(response.content)["prompt"] == body["prompt"]
    return np.asarray(image.convert("RGB")).astype(np.int16)


def test_student_of_two_updates_is_exported_and_served(client: TestClient) -> None:
    first = _picture(client, prompt="red apple", seed=1, steps=4)
    assert np.array_equal(first, _picture(client, prompt="red apple", seed=1, steps=4))
    assert not np.array_equal(first, _picture(client, prompt="red apple", seed=2, steps=4))


def test_same_seed_alone_and_in_a_batch_of_mixed_step_counts_is_the_same_picture(client: TestClient) -> None:
    bodies = [
        {"prompt": PROMPTS[i % len(PROMPTS)], "seed": i, "steps": steps}
        for i, steps in enumerate((1, 2, 4, 8) * 3)
    ]
    alone = [_picture(client, **body) for body in bodies]
    with ThreadPoolExecutor(len(bodies)) as pool:
        together = list(pool.map(lambda body: _picture(client, **body), bodies))
    assert _mean_batch(client.get("/metrics").text) > 1, (
        "the requests never met in a batch: this test has shown nothing"
    )
    for one, other in zip(alone, together, strict=True):
        assert int(np.abs(one - other).max()) <= TOLERANCE


def _mean_batch(metrics: str) -> float:
    values = {
        line.split()[0].split("{")[0]: float(line.split()[1])
        for line in metrics.splitlines()
        if 'stage="denoise"' in line and ("_sum" in line or "_count" in line) and "cdm_batch_size" in line
    }
    return values["cdm_batch_size_sum"] / values["cdm_batch_size_count"]


def test_bundle_says_where_it_comes_from(bundle_folder: Path) -> None:
    provenance = json.loads((bundle_folder / "bundle.json").read_text())["provenance"]
    assert provenance["steps_trained"] == 4
    assert provenance["recipe"] == "emoji_cdm"
    assert "teacher" in provenance["teacher"]
