"""The page draws: in a real browser, served by the fake engine over a real socket."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from cdm_serve.images import read_parameters
from tests.cdm_serve.browser import MARKS, ask, done, opened, ready, shown_bytes
from tests.cdm_serve.helpers import App

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page, Route

pytestmark = MARKS

LAST_SEED = 2**63 - 1


def test_previews_are_shown_before_the_picture_step_by_step(held: tuple[App, Page]) -> None:
    app, page = held
    ask(page, "cat", steps=3)
    for step in (1, 2):
        app.gate.wait()
        app.gate.step()
        page.locator(".tile[data-state=drawing]", has_text=f"step {step} of 3").wait_for()
        page.wait_for_function("document.querySelector('.frame img').naturalWidth === 128")
        assert page.locator(".strip img").count() == step
        assert page.locator("#shelf li").count() == 0
    assert page.locator("#said").inner_text() == "Drawing."
    app.gate.open()
    done(page)
    assert page.locator(".state").inner_text().startswith("3 steps · ")
    assert page.locator("#said").inner_text() == "The picture is there."
    assert page.locator(".strip img").count() == 3
    sources = page.locator(".strip img").evaluate_all("images => images.map(image => image.src)")
    assert len(set(sources)) == 3
    assert page.locator("#shelf li").count() == 1


def test_several_pictures_have_the_seeds_that_follow_and_their_timings(page: Page) -> None:
    ask(page, "cat", count=4, seed=LAST_SEED - 1)  # beyond JavaScript's numbers
    done(page, 4)
    seeds = [f"seed {seed}" for seed in (LAST_SEED - 1, LAST_SEED, 0, 1)]
    assert page.locator(".seed-of").all_inner_texts() == seeds
    sources = page.locator(".frame img").evaluate_all("images => images.map(image => image.src)")
    assert len(set(sources)) == 4
    for label in page.locator(".tile .timing").evaluate_all("bars => bars.map(bar => bar.ariaLabel)"):
        assert "denoise " in label
        assert "total " in label
    assert page.locator("#shelf li").count() == 4


def test_same_seed_same_bytes_with_the_parameters_inside(page: Page) -> None:
    files = []
    for seed in (7, 7, 8):
        ask(page, "red apple", seed=seed)
        done(page)
        page.locator("#easel-facts dd", has_text=str(seed)).first.wait_for()
        files.append(shown_bytes(page))
    assert files[0] == files[1] != files[2]
    parameters = read_parameters(files[0])
    assert (parameters["prompt"], parameters["seed"], parameters["steps"]) == ("red apple", 7, 2)


def test_a_drawn_seed_is_new_each_time_and_shown(page: Page) -> None:
    seeds = []
    for _ in range(2):
        ask(page, "cat")
        done(page)
        page.locator("#easel-facts .facts").wait_for()
        seeds.append(read_parameters(shown_bytes(page))["seed"])
        assert page.locator("#easel-facts dd").first.inner_text() == str(seeds[-1])
    assert seeds[0] != seeds[1]


def test_auto_steps_go_with_a_deadline(page: Page) -> None:
    assert page.locator("#deadline").is_hidden()
    page.select_option("#steps", "auto")
    page.fill("#deadline", "900")
    with page.expect_request("**/generate") as sent:
        ask(page, "cat", steps="auto")
    body = json.loads(sent.value.post_data or "")
    assert (body["steps"], body["deadline_ms"], body["stream"]) == ("auto", 900, True)
    done(page)
    assert '"steps": 4' in page.locator("#easel-facts pre").inner_text()  # what was run


def test_fewer_steps_than_planned_are_said(page: Page) -> None:
    def with_fewer(text: str) -> str:
        return text.replace('"planned_steps": 2', '"planned_steps": 4')

    page.route("**/generate", lambda route: route.fulfill(body=with_fewer(route.fetch().text())))
    ask(page, "cat", steps=2)
    done(page)
    assert page.locator(".state").inner_text().startswith("2 of 4 steps · ")


def test_example_is_one_click(page: Page) -> None:
    example = page.locator("#examples button").first
    prompt = example.inner_text()
    example.click()
    done(page)
    assert page.locator("#easel-prompt").inner_text() == prompt
    assert page.locator(".frame img").get_attribute("alt") == prompt


def test_model_is_chosen_where_there_are_several(page: Page, site: tuple[App, str]) -> None:
    assert page.locator("#model-knob").is_hidden()
    info = page.request.get(f"{site[1]}info").json()

    def of(url: str) -> str:
        name = "second" if "model=second" in url else info["model"]
        steps = [1, 2] if name == "second" else info["steps"]
        return json.dumps({**info, "model": name, "models": [info["model"], "second"], "steps": steps})

    page.route("**/info*", lambda route: route.fulfill(body=of(route.request.url)))
    page.reload()
    ready(page)
    assert "8" in page.locator("#steps option").all_inner_texts()
    page.select_option("#model", "second")
    page.locator("#status", has_text="second").wait_for()
    assert page.locator("#steps option").all_inner_texts() == ["auto", "1", "2"]
    asked: list[str] = []

    def as_the_only(route: Route) -> None:
        body = json.loads(route.request.post_data or "")
        asked.append(body.pop("model"))
        route.continue_(post_data=json.dumps(body))

    page.route("**/generate", as_the_only)
    ask(page, "cat", steps=1)
    done(page)
    assert asked == ["second"]
    assert '"model": "second"' in page.locator("#easel-facts pre").inner_text()


def test_escape_cancels_and_the_server_notices(held: tuple[App, Page]) -> None:
    app, page = held
    ask(page, "cat")
    app.gate.wait()
    page.locator("#cancel").wait_for()
    page.keyboard.press("Escape")
    page.locator(".tile[data-state=cancelled]").wait_for()
    page.locator("#said", has_text="Cancelled").wait_for(state="attached")
    app.wait_until(lambda: app.service.permits.in_use == 0)
    app.gate.open()
    app.wait_until(lambda: app.metric("cdm_pictures_total", outcome="cancelled") == 1)
    assert page.locator("#notice").is_hidden()
    assert page.locator("#cancel").is_hidden()


def test_failure_in_mid_stream_is_said_and_can_be_tried_again(page: Page, site: tuple[App, str]) -> None:
    site[0].engine.fail("denoise", after=1)
    ask(page, "cat", steps=3)
    page.locator(".tile[data-state=refused]").wait_for()
    assert page.locator(".strip img").count() == 1
    page.locator("#notice").wait_for()
    assert "engine" in page.locator("#notice-text").inner_text()
    page.click("#retry")
    done(page)
    assert page.locator("#notice").is_hidden()


def test_servers_refusal_is_shown(browser: Browser, site: tuple[App, str]) -> None:
    with opened(browser, site[1], refused={422}) as page:
        ready(page)
        page.evaluate("document.querySelector('#steps').add(new Option('99', '99'))")
        ask(page, "cat", steps=99)
        page.locator("#notice").wait_for()
        assert "steps=99" in page.locator("#notice-text").inner_text()
        assert page.locator("#retry").is_hidden()


def test_seed_that_is_none_is_never_sent(page: Page) -> None:
    sent: list[str] = []
    page.on("request", lambda request: sent.append(request.url))
    page.fill("#prompt", "cat")
    for seed in ("-1", "1.5", "cat", str(2**63)):
        page.fill("#seed", seed)
        page.press("#seed", "Enter")
        page.locator("#notice-text", has_text=f"seed={seed} is").wait_for()
    assert not sent
