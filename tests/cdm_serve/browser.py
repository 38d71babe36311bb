"""Chromium for the tests of the page, and what a reader does there."""

from __future__ import annotations

import re
import shutil
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import pytest

from tests.cdm_serve.helpers import PATIENCE_S

if TYPE_CHECKING:
    from playwright.sync_api import Browser, ConsoleMessage, Page

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync"
)
MARKS = [
    pytest.mark.browser,
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here (Debian: apt-get install chromium)"),
]
PHONE = {"width": 360, "height": 780}
DESKTOP = {"width": 1200, "height": 900}


@contextmanager
def opened(browser: Browser, url: str, refused: Collection[int] = (), **context: Any) -> Iterator[Page]:
    """The page at `url`. Whatever it complains of, or asks of another host, fails the test.

    `refused`: the statuses that the test lets the server answer with; the browser itself notes them as errors.
    """
    complaints: list[str] = []

    def heard(message: ConsoleMessage) -> None:
        status = re.search(r"status of (\d+)", message.text)
        if message.type in ("error", "warning") and not (status and int(status[1]) in refused):
            complaints.append(message.text)

    with browser.new_context(**{"viewport": PHONE, **context}) as tab:
        tab.grant_permissions(["clipboard-read", "clipboard-write"])
        page = tab.new_page()
        page.set_default_timeout(PATIENCE_S * 1e3)
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("console", heard)
        page.on(
            "request",
            lambda sent: (
                None if sent.url.startswith((url, "blob:", "data:")) else complaints.append(sent.url)
            ),
        )
        page.goto(url)
        yield page
    assert not complaints


def ready(page: Page) -> None:
    """Return when the page may be used."""
    page.locator("#status[data-state=ready]").wait_for()


def ask(page: Page, prompt: str, count: int = 1, steps: int | str = 2, seed: int | None = None) -> None:
    """Fill in the form, and press Enter."""
    page.fill("#prompt", prompt)
    page.select_option("#count", str(count))
    page.select_option("#steps", str(steps))
    page.fill("#seed", "" if seed is None else str(seed))
    page.press("#prompt", "Enter")


def done(page: Page, count: int = 1) -> None:
    """Return when the last draw's pictures are all there."""
    page.locator("#go:not([data-busy])").wait_for()
    page.locator(".tile[data-state=done]").nth(count - 1).wait_for()


def shown_bytes(page: Page) -> bytes:
    """The file of the one picture beside which its facts stand."""
    with page.expect_download() as download:
        page.click("#easel-facts .save")
    return download.value.path().read_bytes()


def clipboard(page: Page) -> str:
    """What was copied last."""
    text: str = page.evaluate("navigator.clipboard.readText()")
    return text
