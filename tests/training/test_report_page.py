"""The report in a browser, opened from disk as a reader would."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.cdm_serve.browser import CHROMIUM, DESKTOP, FLAGS, MARKS, PHONE
from tests.training.test_report import build_run
from training.report.write import write_report

pytestmark = MARKS


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS.split())
        yield started
        started.close()


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_report(
        build_run(tmp_path_factory.mktemp("page") / "run", steps=300, prompt="<script>x</script>")
    )


@contextmanager
def opened(browser: Any, report: Path, **context: Any) -> Iterator[Any]:
    """The page; whatever it complains of, or asks for, fails the test."""
    complaints: list[str] = []
    with browser.new_context(**{"viewport": DESKTOP, **context}) as tab:
        page = tab.new_page()
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("console", lambda message: complaints.append(message.text))
        page.on(
            "request", lambda sent: complaints.append(sent.url) if not sent.url.startswith("data:") else None
        )
        page.goto(report.as_uri())
        yield page
    assert complaints == [report.as_uri()]


@pytest.mark.parametrize("javascript", [True, False])
def test_an_iteration_is_chosen_by_click_and_by_arrow_key(browser, report, javascript):
    with opened(browser, report, java_script_enabled=javascript) as page:
        frames = page.locator(".frames > figure")
        assert [frames.nth(index).is_visible() for index in range(2)] == [False, True]
        page.click("text='20'")
        assert [frames.nth(index).is_visible() for index in range(2)] == [True, False]
        page.keyboard.press("ArrowRight")
        assert [frames.nth(index).is_visible() for index in range(2)] == [False, True]


def test_the_pointer_reads_values_off_every_curve(browser, report):
    with opened(browser, report) as page:
        first = page.locator(".chart svg").first
        first.hover()
        shown = page.locator(".cross text")
        assert shown.count() == page.locator(".chart svg").count()
        step, value = shown.first.text_content().split(": ")
        assert 100 < int(step) < 200
        assert 1 <= float(value) <= 3
        page.mouse.move(0, 0)
        assert shown.count() == 0


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("viewport", [PHONE, DESKTOP])
def test_the_page_fits_its_window_and_can_be_read(browser, report, scheme, viewport):
    with opened(browser, report, viewport=viewport, color_scheme=scheme) as page:
        assert page.evaluate("document.documentElement.scrollWidth") <= viewport["width"]
        ink, paper = page.evaluate(
            "(({color, backgroundColor}) => [color, backgroundColor])(getComputedStyle(document.body))"
        )
        bright = [sum(map(int, value[4:-1].split(","))) for value in (ink, paper)]
        assert (bright[0] < bright[1]) == (scheme == "light")
        assert abs(bright[0] - bright[1]) > 400


def test_a_print_shows_every_grid_in_light_colours(browser, report):
    with opened(browser, report, color_scheme="dark") as page:
        page.emulate_media(media="print")
        assert [figure.is_visible() for figure in page.locator(".frames > figure").all()] == [True, True]
        assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
