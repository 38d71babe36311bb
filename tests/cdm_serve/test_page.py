"""The page in a real browser, served by the fake engine over a real socket."""

from __future__ import annotations

import re
import shutil
import threading
from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest
import uvicorn

from cdm_serve.main import listen
from engines.bundle import Bundle
from tests.cdm_serve.helpers import PATIENCE_S, App, Gate

if TYPE_CHECKING:
    from playwright.sync_api import Browser, ConsoleMessage, Page

sync_api = pytest.importorskip("playwright.sync_api", reason="the package playwright is not installed")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync"
)

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here (Debian: apt-get install chromium)"),
]


@pytest.fixture(scope="module")
def site(bundle: Bundle) -> Iterator[tuple[App, str]]:
    app = App(bundle, Gate())
    listener = listen("127.0.0.1", 0)
    server = uvicorn.Server(uvicorn.Config(app.asgi, log_config=None, access_log=False))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    assert app.service.runner.ready.wait(PATIENCE_S)
    yield app, f"http://127.0.0.1:{listener.getsockname()[1]}/"
    app.gate.open()
    server.should_exit = True
    thread.join()
    listener.close()


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS.split())
        yield browser
        browser.close()


@pytest.fixture
def page(browser: Browser, site: tuple[App, str]) -> Iterator[Page]:
    """The opened page. Whatever it complains of, or asks of another host, fails the test."""
    complaints: list[str] = []

    def heard(message: ConsoleMessage) -> None:
        if (
            message.type == "error" and "status of 422" not in message.text
        ):  # the browser's own note on a refusal
            complaints.append(message.text)

    with browser.new_context(viewport={"width": 390, "height": 844}) as context:
        page = context.new_page()
        page.set_default_timeout(PATIENCE_S * 1e3)
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("console", heard)
        page.on(
            "request",
            lambda sent: None if sent.url.startswith((site[1], "blob:")) else complaints.append(sent.url),
        )
        page.goto(site[1])
        page.locator("#status[data-state=ready]").wait_for()
        yield page
    assert not complaints


def test_enter_draws_the_asked_pictures_with_timings_and_curl(page: Page, site: tuple[App, str]) -> None:
    page.fill("#prompt", "it's a cat")
    page.select_option("#count", "2")
    page.select_option("#steps", "2")
    page.fill("#seed", "9223372036854775807")  # beyond JavaScript's numbers
    page.press("#prompt", "Enter")
    page.locator(".result img").nth(1).wait_for()
    widths = page.locator(".result img").evaluate_all("images => images.map(image => image.naturalWidth)")
    assert widths == [128, 128]
    assert page.locator(".seed-of").all_inner_texts() == ["seed 9223372036854775807", "seed 0"]
    assert re.search(r"denoise \d", page.locator(".legend").inner_text())
    page.click(".result summary")
    command = page.locator(".result pre").inner_text()
    assert r"it'\''s a cat" in command
    assert '"seed": 9223372036854775807' in command
    assert f"{site[1]}generate" in command


def test_example_is_one_click(page: Page) -> None:
    example = page.locator("#examples button").first
    prompt = example.inner_text()
    example.click()
    page.locator(".result img").wait_for()
    assert page.locator(".result h2").inner_text() == prompt
    assert page.locator(".result img").get_attribute("alt") == prompt


def test_saved_file_is_the_served_picture_with_its_parameters(page: Page) -> None:
    from cdm_serve.images import read_parameters

    page.fill("#prompt", "red apple")
    page.fill("#seed", "7")
    page.select_option("#format", "jpeg")
    page.press("#prompt", "Enter")
    with page.expect_download() as download:
        page.click(".save")
    assert download.value.suggested_filename == "red-apple-7.jpeg"
    parameters = read_parameters(download.value.path().read_bytes())
    assert (parameters["prompt"], parameters["seed"]) == ("red apple", 7)


def test_servers_refusal_is_shown(page: Page, site: tuple[App, str]) -> None:
    page.evaluate("document.querySelector('#steps').add(new Option('99', '99'))")
    page.select_option("#steps", "99")
    page.fill("#prompt", "cat")
    with page.expect_response("**/generate") as answer:
        page.press("#prompt", "Enter")
    assert answer.value.status == 422
    page.locator("#error:not([hidden])").wait_for()
    assert "steps=99" in page.locator("#error").inner_text()


def test_escape_leaves_and_the_server_notices(page: Page, site: tuple[App, str]) -> None:
    app = site[0]
    before = app.metric("cdm_pictures_total", outcome="cancelled")
    app.gate.close()
    page.fill("#prompt", "cat")
    page.press("#prompt", "Enter")
    app.gate.wait()
    page.locator("#go[data-busy]").wait_for()
    page.keyboard.press("Escape")
    page.locator("#go:not([data-busy])").wait_for()
    app.wait_until(lambda: app.service.permits.in_use == 0)
    app.gate.open()
    app.wait_until(lambda: app.metric("cdm_pictures_total", outcome="cancelled") == before + 1)
    assert page.locator("#error").is_hidden()


def test_nothing_sticks_out_at_phone_width(page: Page) -> None:
    page.fill("#prompt", "w" * 300)
    page.select_option("#count", "4")
    page.press("#prompt", "Enter")
    page.locator(".result img").nth(3).wait_for()
    page.click(".result summary")
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")


def test_theme_is_switched_and_remembered(page: Page) -> None:
    background = "getComputedStyle(document.body).backgroundColor"
    light = page.evaluate(background)
    page.click("#theme")
    dark = page.evaluate(background)
    assert light != dark
    page.reload()
    assert page.evaluate(background) == dark


def test_docs_show_every_operation_and_the_limits(page: Page, site: tuple[App, str]) -> None:
    page.goto(f"{site[1]}docs")
    page.locator("#docs section").first.wait_for()
    text = page.locator("#docs").inner_text()
    for expected in ("/generate", "/readyz", "/metrics", "1, 2, 3, 4, 6, 8", "0 to 9223372036854775807"):
        assert expected in text
