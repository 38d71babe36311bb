"""Chromium, a served fake engine, and the page between them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

from engines.bundle import Bundle
from tests.cdm_serve.browser import CHROMIUM, FLAGS, opened, ready
from tests.cdm_serve.helpers import App, Gate, listening

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """Not for longer: as long as it runs, no other test can start an event loop on this thread."""
    sync_api = pytest.importorskip("playwright.sync_api", reason="the package playwright is not installed")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS.split())
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def site(bundle: Bundle) -> Iterator[tuple[App, str]]:
    """An app on a socket, and the page's address."""
    app = App(bundle, Gate())
    with listening(app) as url:
        yield app, f"{url}/"


@pytest.fixture
def page(browser: Browser, site: tuple[App, str]) -> Iterator[Page]:
    """The page at phone width, ready."""
    with opened(browser, site[1]) as page:
        ready(page)
        yield page


@pytest.fixture
def held(browser: Browser, bundle: Bundle) -> Iterator[tuple[App, Page]]:
    """A page and an app of its own, whose denoiser is held back."""
    app = App(bundle, Gate())
    with listening(app) as url, opened(browser, f"{url}/") as page:
        ready(page)
        app.gate.close()
        yield app, page
