"""Prompts and pictures that are refused, whichever API asks for them."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
from PIL import Image

from cdm_serve.main import main
from cdm_serve.metrics import Metrics
from cdm_serve.safety import load_hook
from engines.cli import UsageError
from tests.cdm_serve.helpers import App, error_of

PROMPT = "xylophone of the quince"


class Judge:
    """The hook of these tests, and what it saw."""

    answer: ClassVar[Any] = True
    seen: ClassVar[list[tuple[np.ndarray, dict[str, Any]]]] = []


def judge(pixels: Any, facts: Any) -> Any:
    Judge.seen.append((pixels, facts))
    return Judge.answer(pixels, facts) if callable(Judge.answer) else Judge.answer


@pytest.fixture
def judged(serve: Callable[..., App], monkeypatch: pytest.MonkeyPatch) -> Callable[[Any], App]:
    """Start an app whose hook answers so, or is this function of pixels and facts."""
    monkeypatch.setattr(
        "cdm_serve.safety.load_hook", lambda _: judge
    )  # this module has no name to import it by

    def start(answer: Any, **settings: Any) -> App:
        Judge.answer, Judge.seen = answer, []
        return serve(safety_hook="my_filter:judge", **settings)

    return start


def ask_all(app: App, prompt: str = PROMPT) -> dict[str, Any]:
    """The answer of each API, and of each way to ask there."""
    infer = {"inputs": [{"name": "prompt", "datatype": "BYTES", "shape": [2], "data": ["cat", prompt]}]}
    asked = {
        "one": ("/generate", {"prompt": prompt}),
        "several": ("/generate", {"prompt": prompt, "num_images": 3}),
        "stream": ("/generate", {"prompt": prompt, "stream": True}),
        "previews": ("/generate", {"prompt": prompt, "stream": True, "previews": 2}),
        "openai": ("/v1/images/generations", {"prompt": prompt}),
        "openai stream": ("/v1/images/generations", {"prompt": prompt, "stream": True, "partial_images": 2}),
        "kserve": ("/v2/models/fake/infer", infer),
        "kserve raw": ("/v2/models/fake/infer", {**infer, "outputs": [{"name": "image"}]}),
    }
    return {name: app.client.post(path, json=body) for name, (path, body) in asked.items()}


def told(answer: Any) -> str:
    """The message of an error's answer in either envelope, or of an error event."""
    text = answer.text.rpartition("event: error\ndata: ")[2]
    error = json.loads(text)["error"]
    return str(error if isinstance(error, str) else error["message"])


# Prompts.


def test_refused_prompt_is_400_everywhere_and_tells_no_word(
    serve: Callable[..., App], tmp_path: Path
) -> None:
    path = tmp_path / "words.txt"
    path.write_text("\ufeff# of fruit\n\nQuince\nrotten  apple\n", encoding="utf-8")
    app = serve(block_list=path)
    before = app.metric("cdm_pictures_total", outcome="finished")
    for name, answer in ask_all(app).items():
        assert answer.status_code == 400, name
        assert "content policy" in told(answer)
        assert "quince" not in answer.text.lower()
    error = error_of(app.client.post("/generate", json={"prompt": "a ROTTEN-apple!"}))
    assert (error["code"], error["type"]) == ("content_policy_violation", "invalid_request_error")
    assert error["param"] == "prompt"
    assert app.metric("cdm_safety_refusals_total", check="block_list") == 9
    assert app.metric("cdm_pictures_total", outcome="finished") == before
    assert app.service.permits.in_use == 0
    for allowed in ("quinces", "apple, rotten", "rotten red apple", "of fruit"):
        assert app.client.post("/generate", json={"prompt": allowed}).status_code == 200, allowed


# Pictures.


def test_hook_sees_every_picture_as_it_is_sent_and_how_it_was_made(judged: Callable[..., App]) -> None:
    app = judged(np.True_)  # numpy's own yes is one
    answer = app.client.post("/generate", json={"prompt": PROMPT, "seed": 7, "steps": 2, "height": 64})
    ((pixels, facts),) = Judge.seen
    assert (pixels.dtype, pixels.shape) == (np.uint8, (64, 128, 3))
    assert np.array_equal(pixels, np.asarray(Image.open(io.BytesIO(answer.content))))
    assert facts == {"prompt": PROMPT, "seed": 7, "steps": 2, "width": 128, "height": 64, "model": "fake"}
    with pytest.raises(ValueError, match="read-only"):
        pixels[0] = 0
    assert {answer.status_code for answer in ask_all(app).values()} == {200}
    assert len(Judge.seen) == 1 + (1 + 3 + 4 + 3 + 1 + 3 + 2 + 2)  # previews are shown, too


def test_hook_cannot_change_what_is_written_into_the_picture(judged: Callable[..., App]) -> None:
    plain = judged(True).client.post("/generate", json={"prompt": PROMPT, "seed": 7}).content

    def forge(_: Any, facts: dict[str, Any]) -> bool:
        facts["prompt"] = "another"
        return True

    assert judged(forge).client.post("/generate", json={"prompt": PROMPT, "seed": 7}).content == plain


def test_refused_picture_is_400_everywhere_and_no_part_of_it_is_sent(judged: Callable[..., App]) -> None:
    app = judged(False)
    for name, answer in ask_all(app).items():
        assert answer.status_code == 400, name
        assert "content policy refuses the picture" in told(answer)
        assert "b64_json" not in answer.text
    error = error_of(app.client.post("/generate", json={"prompt": "cat"}))
    assert (error["code"], error["type"]) == ("content_policy_violation", "invalid_request_error")
    app.wait_until(lambda: app.service.permits.in_use == 0)


def test_picture_refused_after_its_previews_ends_the_stream_with_an_error(judged: Callable[..., App]) -> None:
    app = judged(lambda _, facts: facts["steps"] < 4)  # the picture itself has four
    body = {"prompt": "cat", "stream": True, "partial_images": 2}
    answer = app.client.post("/v1/images/generations", json=body)
    assert answer.text.count("event: image_generation.partial_image") == 2
    assert "completed" not in answer.text
    assert '"code": "content_policy_violation"' in answer.text
    assert app.metric("cdm_requests_total", endpoint="/v1/images/generations", outcome="invalid") == 1


def test_one_refused_picture_refuses_its_request_and_no_other(judged: Callable[..., App]) -> None:
    app = judged(lambda _, facts: facts["seed"] != 6)
    app.gate.close()
    with ThreadPoolExecutor(2) as pool:
        bad = pool.submit(app.client.post, "/generate", json={"prompt": "cat", "seed": 5, "num_images": 2})
        good = pool.submit(app.client.post, "/generate", json={"prompt": "cat", "seed": 7, "num_images": 2})
        app.wait_until(lambda: app.service.permits.in_use == 4)
        app.gate.open()
        assert (bad.result().status_code, good.result().status_code) == (400, 200)


def leave(*_: Any) -> Any:
    raise SystemExit("secret detail")


def stumble(*_: Any) -> Any:
    raise ZeroDivisionError("secret detail")


@pytest.mark.parametrize(
    ("answer", "fragment"),
    [
        (stumble, "ZeroDivisionError"),
        (leave, "SystemExit"),
        (None, "a NoneType"),
        (1, "an int"),
        ("yes", "a str"),
    ],
)
def test_hook_that_cannot_judge_lets_nothing_pass(
    judged: Callable[..., App], answer: Any, fragment: str
) -> None:
    app = judged(answer)
    for name, failed in ask_all(app).items():
        assert failed.status_code == 500, name
        assert "my_filter:judge" in told(failed)
        assert fragment.removeprefix("an ").removeprefix("a ") in told(failed)
        assert "secret" not in failed.text
        assert "b64_json" not in failed.text
    error = error_of(app.client.post("/generate", json={"prompt": "cat"}))
    assert (error["code"], error["type"]) == ("safety_check_failed", "server_error")
    Judge.answer = True
    assert (
        app.client.post("/generate", json={"prompt": "cat"}).status_code == 200
    )  # the pool's threads live on


def test_hook_is_found_by_name_and_metrics_of_refusals_are_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a_filter_of_mine.py").write_text("def allows(pixels, facts):\n    return False\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert load_hook("a_filter_of_mine:allows")(np.zeros((1, 1, 3), np.uint8), {}) is False
    assert b"cdm_safety_refusals" in Metrics().exposition()


@pytest.mark.parametrize(
    ("source", "fragment"),
    [
        (None, "No module named"),
        ("1 / 0", "ZeroDivisionError"),
        ("other = 1", "has no attribute 'allows'"),
        ("allows = 1", "must be a plain function"),
        ("async def allows(pixels, facts): return True", "must be a plain function"),
    ],
)
def test_hook_that_cannot_be_called_is_told_at_the_start(
    source: str | None, fragment: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = f"filter_{abs(hash(source))}"
    if source is not None:
        (tmp_path / f"{name}.py").write_text(source)
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(UsageError) as raised:
        load_hook(f"{name}:allows")
    assert f"--safety-hook={name}:allows" in str(raised.value)
    assert fragment in str(raised.value)


@pytest.mark.parametrize("target", ["module", "module:", ":function", "a b:c", "a.b:c.d"])
def test_hook_that_is_no_name_is_told(target: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--engine", "fake", "--port", "0", "--safety-hook", target]) == 2
    assert f"--safety-hook={target}" in capsys.readouterr().err
