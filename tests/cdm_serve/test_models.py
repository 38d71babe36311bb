"""Several models in one server, and their coming and going while requests are in work."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from fastapi.testclient import TestClient

from cdm_serve.app import create_app
from cdm_serve.main import main, opened_bundles
from cdm_serve.settings import ServeSettings
from engines.base import EngineOptions
from engines.bundle import Bundle
from engines.cli import UsageError
from engines.fake import FakeEngine, fake_bundle
from tests.cdm_serve.helpers import PATIENCE_S, App, Gate, error_of, listening, wait_until


@pytest.fixture(scope="module")
def others(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders of bundles by name; one has another size and other steps."""
    made = {}
    for name, options in {
        "small": {"sizes": ((64, 64),), "steps": (1, 2), "default_steps": 2},
        "org/large": {"sizes": ((256, 256),)},
    }.items():
        folder = tmp_path_factory.mktemp("bundle")
        fake_bundle(folder, name=name, **options)  # type: ignore[arg-type]
        made[name] = folder
    return made


@pytest.fixture
def app(bundle: Bundle) -> Iterator[App]:
    app = App(bundle, Gate(), admin_open=True)
    with app.client:
        wait_until(app.service.runner.ready.is_set)
        yield app
        app.gate.open()


def load(app: App, folder: Path) -> Any:
    return app.client.post("/admin/models", json={"bundle": str(folder)})


def draw(app: App, **asked: Any) -> Any:
    return app.client.post("/generate", json={"prompt": "cat", "seed": 1, "response_format": "json", **asked})


def names(app: App) -> list[str]:
    return app.client.get("/info").json()["models"]


def test_loaded_model_is_served_by_every_api(app: App, others: dict[str, Path]) -> None:
    assert names(app) == ["fake"]
    loaded = load(app, others["small"])
    assert loaded.json() == {"name": "small", "state": "ready", "warmed": [12, 12]}
    assert names(app) == ["fake", "small"]
    assert app.client.get("/info", params={"model": "small"}).json()["steps"] == [1, 2]
    small = draw(app, model="small").json()
    assert (small["model"], small["width"], small["images"][0]["steps"]) == ("small", 64, 2)
    assert draw(app).json()["model"] == "fake"
    answer = app.client.post("/v1/images/generations", json={"prompt": "cat", "model": "small"})
    assert answer.json()["size"] == "64x64"
    assert [model["id"] for model in app.client.get("/v1/models").json()["data"]] == ["fake", "small"]
    prompt = {"name": "prompt", "datatype": "BYTES", "shape": [1], "data": ["cat"]}
    infer = app.client.post(
        "/v2/models/small/infer", json={"inputs": [prompt], "outputs": [{"name": "seed"}]}
    )
    assert infer.json()["model_name"] == "small"
    counted = app.models.metrics.registry.get_sample_value
    assert counted("cdm_pictures_total", {"model": "small", "outcome": "finished"}) == 3
    assert counted("cdm_pictures_total", {"model": "fake", "outcome": "finished"}) == 1


def test_limits_are_each_model_s_own(app: App, others: dict[str, Path]) -> None:
    load(app, others["small"])
    assert draw(app, steps=4).status_code == 200
    error = error_of(draw(app, model="small", steps=4))
    assert error["message"] == "steps=4 is not offered; allowed: 1, 2"
    error = error_of(draw(app, model="nope"))
    assert (error["code"], error["param"]) == ("model_not_found", "model")
    assert error["message"] == 'model="nope" is not served here; name one of "fake", "small", or none'


def test_unloading_answers_everybody_it_had_accepted(bundle: Bundle, others: dict[str, Path]) -> None:
    app = App(bundle, Gate(), admin_open=True)
    with app.client:
        wait_until(app.service.runner.ready.is_set)
        assert load(app, others["small"]).status_code == 200
        app.gate.close()
        old = app.service
        with ThreadPoolExecutor(4) as pool:
            waiting = [pool.submit(draw, app, seed=seed) for seed in range(3)]
            wait_until(lambda: old.permits.in_use == 3)
            leaving = pool.submit(app.client.delete, "/admin/models/fake")
            wait_until(lambda: names(app) == ["small"])
            states = {m["name"]: m["state"] for m in app.client.get("/admin/models").json()["models"]}
            assert states == {"small": "ready", "fake": "draining"}
            assert error_of(draw(app, model="fake"))["code"] == "model_not_found"
            assert not leaving.done()
            app.gate.open()
            assert [answer.result().status_code for answer in waiting] == [200, 200, 200]
            assert leaving.result().json() == {"unloaded": "fake"}
        assert draw(app).json()["model"] == "small"
        assert app.client.get("/readyz").status_code == 200
        text = app.client.get("/metrics").text
        assert 'cdm_cost_seconds{batch="1",height="",model="small"' in text
        assert 'cdm_cost_seconds{batch="1",height="",model="fake"' not in text
        assert 'cdm_model_info{device="cpu",model="fake"' not in text
        assert 'cdm_pictures_in_work{model="fake"}' not in text
        assert 'cdm_pictures_total{model="fake",outcome="finished"} 3.0' in text


def test_model_of_the_same_name_replaces_it_without_a_gap(
    app: App, tmp_path: Path, others: dict[str, Path]
) -> None:
    fake_bundle(tmp_path, name="fake", steps=(1, 2, 3), default_steps=3)
    app.gate.close()
    with ThreadPoolExecutor(2) as pool:
        before = pool.submit(draw, app)
        app.gate.wait()
        loading = pool.submit(load, app, tmp_path)
        wait_until(lambda: app.client.get("/admin/models").json()["models"][-1]["state"] == "warming")
        # The device is taken by the picture before it; whoever comes now still goes to the old one.
        assert app.client.get("/info").json()["steps"] == [1, 2, 3, 4, 6, 8]
        app.gate.open()
        assert before.result().json()["images"][0]["steps"] == 4
        assert loading.result().status_code == 200
    assert names(app) == ["fake"]
    assert draw(app).json()["images"][0]["steps"] == 3
    wait_until(lambda: len(app.client.get("/admin/models").json()["models"]) == 1)
    assert 'cdm_model_info{device="cpu",model="fake"' in app.client.get("/metrics").text


def test_last_model_stays_and_unknown_ones_are_not_found(app: App) -> None:
    error = error_of(app.client.delete("/admin/models/fake"))
    assert (error["code"], "only one" in error["message"]) == ("invalid_value", True)
    assert error_of(app.client.delete("/admin/models/nope"))["code"] == "model_not_found"
    assert draw(app).status_code == 200


def test_what_cannot_be_loaded_changes_nothing(
    app: App, tmp_path: Path, others: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    error = error_of(load(app, tmp_path))
    assert (error["code"], error["param"]) == ("invalid_value", "bundle")
    assert str(tmp_path) in error["message"]
    fake_bundle(tmp_path, name="broken")
    manifest = json.loads((tmp_path / "bundle.json").read_text())
    (tmp_path / "bundle.json").write_text(json.dumps(manifest | {"format_version": 99}))
    assert "99" in error_of(load(app, tmp_path))["message"]
    fake_bundle(tmp_path, name="steps", steps=(16,), default_steps=16)
    assert "--max-steps=8" in error_of(load(app, tmp_path))["message"]

    def fails(*_: Any) -> Any:
        raise RuntimeError("no memory")

    with monkeypatch.context() as patch:
        patch.setattr(FakeEngine, "decode", fails)
        response = load(app, others["small"])
    assert response.status_code == 500
    assert error_of(response)["code"] == "load_failed"
    assert "no memory" in error_of(response)["message"]
    assert names(app) == ["fake"]
    assert draw(app).status_code == 200
    assert app.client.get("/livez").status_code == 200
    assert load(app, others["small"]).status_code == 200


def test_name_with_a_slash_comes_and_goes(app: App, others: dict[str, Path]) -> None:
    assert load(app, others["org/large"]).json()["name"] == "org/large"
    assert app.client.get("/v1/models/org/large").json()["id"] == "org/large"
    assert app.client.delete("/admin/models/org/large").json() == {"unloaded": "org/large"}
    assert names(app) == ["fake"]


@pytest.mark.parametrize(("method", "path"), [("GET", ""), ("POST", ""), ("DELETE", "/fake")])
def test_admin_is_closed_without_keys(
    serve: Callable[..., App], others: dict[str, Path], method: str, path: str
) -> None:
    app = serve()
    response = app.client.request(method, f"/admin/models{path}", json={"bundle": str(others["small"])})
    assert response.status_code == 403
    assert "--admin-open" in error_of(response)["message"]
    assert names(app) == ["fake"]


def test_stopping_while_a_model_is_loaded_ends(bundle: Bundle, others: dict[str, Path]) -> None:
    app = App(bundle, Gate(), admin_open=True)
    with ThreadPoolExecutor(2) as pool, listening(app) as url:
        app.gate.close()
        picture = pool.submit(draw_at, url)
        app.gate.wait()  # it has the device, so that the newcomer's warm-up cannot end
        loading = pool.submit(load_at, url, others["small"])
        wait_until(lambda: any(model.state == "warming" for model in app.models.statuses()))
        app.models.drain_soon()
        app.gate.open()
        assert loading.result(PATIENCE_S) == 503
        assert picture.result(PATIENCE_S) == 200


def draw_at(url: str) -> int:
    return httpx.post(f"{url}/generate", json={"prompt": "cat"}, trust_env=False, timeout=60).status_code


def load_at(url: str, folder: Path) -> int:
    body = {"bundle": str(folder)}
    return httpx.post(f"{url}/admin/models", json=body, trust_env=False, timeout=60).status_code


def test_openai_client_names_a_model(bundle: Bundle, others: dict[str, Path]) -> None:
    app = App(bundle, Gate(), admin_open=True)
    with (
        listening(app) as url,
        openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client,
    ):
        assert load_at(url, others["small"]) == 200
        assert client.images.generate(prompt="cat", model="small").size == "64x64"
        assert {model.id for model in client.models.list()} == {"fake", "small"}
        with pytest.raises(openai.NotFoundError, match="not served here"):
            client.images.generate(prompt="cat", model="dall-e-3")


def test_two_engines_are_served_from_the_start_and_closed_at_the_end(
    bundle: Bundle, others: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = ServeSettings(engine="fake", bundle=(bundle.root, others["small"]), max_batch=2)
    closed: list[str] = []
    monkeypatch.setattr(FakeEngine, "close", lambda engine: closed.append(engine.manifest.name))
    with opened_bundles(settings) as bundles:
        engines = [FakeEngine(each, EngineOptions(max_batch=2)) for each in bundles]
    with TestClient(create_app(settings, *engines)) as client:
        wait_until(lambda: client.get("/readyz").status_code == 200)
        assert client.get("/info").json()["models"] == ["fake", "small"]
    assert sorted(closed) == ["fake", "small"]


def test_two_bundles_of_one_name_are_refused(bundle: Bundle, capsys: pytest.CaptureFixture[str]) -> None:
    engines = [FakeEngine(bundle, EngineOptions()) for _ in range(2)]
    with pytest.raises(UsageError, match="two bundles have the name 'fake'"):
        create_app(ServeSettings(engine="fake"), *engines)
    flags = ["--engine", "fake", "--port", "0", *["--bundle", str(bundle.root)] * 2]
    assert main(flags) == 2
    assert "two bundles have the name" in capsys.readouterr().err
