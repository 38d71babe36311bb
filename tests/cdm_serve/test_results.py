"""Pictures asked for twice are made once, and only when that is wanted."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from math import inf
from typing import Any

import httpx
import numpy as np
import pytest

from cdm_serve.errors import GenerationFailed
from cdm_serve.results import Results
from tests.cdm_serve.helpers import App

CAT = {"prompt": "cat", "seed": 7, "steps": 2}
KEY = (((1, 2),), 7, 2, 64, 64)
PIXELS = np.zeros((64, 64, 3), np.uint8)


def drawn(app: App, **more: Any) -> httpx.Response:
    response = app.client.post("/generate", json=CAT | more)
    assert response.status_code == 200, response.text
    return response


def denoised(app: App) -> float:
    return app.metric("cdm_batch_size_sum", stage="denoise")


def test_finished_picture_is_not_made_again(serve: Callable[..., App]) -> None:
    app = serve(result_cache=4)
    first, second = drawn(app), drawn(app)
    assert second.content == first.content
    assert "x-cache" not in first.headers
    assert second.headers["x-cache"] == "kept"
    assert second.headers["x-steps"] == "2"
    assert denoised(app) == 2
    assert app.metric("cdm_cache_hits_total", cache="result") == 1
    assert app.metric("cdm_cache_misses_total", cache="result") == 1
    assert app.metric("cdm_steps_count") == 1


def test_format_and_prompt_of_a_kept_picture_are_the_request_s_own(serve: Callable[..., App]) -> None:
    app = serve(result_cache=4)
    drawn(app)
    answer = drawn(app, format="webp")
    assert answer.headers["content-type"] == "image/webp"
    assert answer.headers["x-cache"] == "kept"


@pytest.mark.parametrize("other", [{"prompt": "dog"}, {"seed": 8}, {"steps": 3}, {"width": 64, "height": 64}])
def test_any_difference_makes_another_picture(serve: Callable[..., App], other: dict[str, Any]) -> None:
    app = serve(result_cache=4)
    first = drawn(app)
    answer = drawn(app, **other)
    assert "x-cache" not in answer.headers
    assert answer.content != first.content


@pytest.mark.parametrize("own", [{"steps": "auto"}, {"stream": True}])
def test_elastic_pictures_and_previews_are_made_for_themselves(
    serve: Callable[..., App], own: dict[str, Any]
) -> None:
    app = serve(result_cache=4)
    drawn(app)
    before = denoised(app)
    assert "x-cache" not in drawn(app, **own).headers
    assert denoised(app) > before


def test_off_unless_asked_for(serve: Callable[..., App]) -> None:
    app = serve()
    first, second = drawn(app), drawn(app)
    assert second.content == first.content
    assert "x-cache" not in second.headers
    assert denoised(app) == 4


def test_picture_in_work_is_shared(serve: Callable[..., App]) -> None:
    app = serve(result_cache=4)
    app.gate.close()
    with ThreadPoolExecutor(3) as pool:
        began = pool.submit(drawn, app)
        app.gate.wait()
        others = [pool.submit(drawn, app), pool.submit(drawn, app)]
        app.wait_until(lambda: app.metric("cdm_cache_hits_total", cache="result") == 2)
        app.gate.open()
        answers = [future.result() for future in (began, *others)]
    assert app.service.permits.in_use == 0
    assert len({answer.content for answer in answers}) == 1
    assert [answer.headers.get("x-cache") for answer in answers] == [None, "shared", "shared"]
    assert denoised(app) == 2


def test_failure_of_a_shared_picture_is_everybody_s(serve: Callable[..., App]) -> None:
    app = serve(result_cache=4)
    app.gate.close()
    app.engine.fail("denoise")
    ask = lambda: app.client.post("/generate", json=CAT).status_code  # noqa: E731
    with ThreadPoolExecutor(2) as pool:
        answers = [pool.submit(ask), pool.submit(ask)]
        app.wait_until(lambda: app.metric("cdm_cache_hits_total", cache="result") == 1)
        app.gate.open()
        assert [answer.result() for answer in answers] == [500, 500]
    assert drawn(app).status_code == 200


def test_least_recently_asked_for_leaves_first() -> None:
    results = Results(2)
    keys = [(*KEY[:1], seed, *KEY[2:]) for seed in range(3)]
    for key in keys[:2]:
        results.finish(results.begin(key, inf, 0, lambda: None), PIXELS)
    assert results.find(keys[0]) is PIXELS
    results.finish(results.begin(keys[2], inf, 0, lambda: None), PIXELS)
    assert [results.find(key) is not None for key in keys] == [True, False, True]
    assert len(results) == 2


def test_work_ends_when_the_last_who_waits_leaves() -> None:
    stopped: list[int] = []
    results = Results(2)
    flight = results.begin(KEY, inf, 0, lambda: stopped.append(1))
    follow = stopped.append
    flight.followers.append(follow)
    results.leave(flight)
    assert not stopped
    results.leave(flight, follow)
    assert stopped == [1]
    assert results.in_work(KEY, inf, 0) is None
    results.leave(flight, follow)
    assert stopped == [1]


def test_more_urgent_request_is_not_held_up_by_an_easier_one() -> None:
    results = Results(2)
    slow = results.begin(KEY, 5.0, 1, lambda: None)
    assert results.in_work(KEY, 5.0, 1) is slow
    assert results.in_work(KEY, 4.9, 1) is None
    assert results.in_work(KEY, 5.0, 2) is None
    fast = results.begin(KEY, 4.9, 2, lambda: None)
    results.finish(slow, PIXELS)
    assert results.in_work(KEY, inf, 0) is fast


def test_kept_picture_does_not_keep_its_batch() -> None:
    results = Results(2)
    batch = np.zeros((4, 64, 64, 3), np.uint8)
    results.finish(results.begin(KEY, inf, 0, lambda: None), batch[1])
    kept = results.find(KEY)
    assert kept is not None
    assert kept.base is None


def test_failure_is_told_and_not_kept() -> None:
    told: list[Any] = []
    results = Results(2)
    flight = results.begin(KEY, inf, 0, lambda: None)
    flight.followers.append(told.append)
    error = GenerationFailed("no")
    results.finish(flight, error)
    assert told == [error]
    assert results.find(KEY) is None
    assert results.in_work(KEY, inf, 0) is None
