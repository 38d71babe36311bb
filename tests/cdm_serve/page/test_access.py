"""The page when it may not draw: without a key, on a full server, on none."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from cdm_serve.keys import Key, KeyFile, hashed
from engines.bundle import Bundle
from tests.cdm_serve.browser import MARKS, ask, done, opened, ready
from tests.cdm_serve.helpers import App, Gate, listening

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

pytestmark = MARKS

SECRET = "cdm_of-the-test"


def test_key_is_asked_for_sent_and_kept_only_if_wanted(
    browser: Browser, bundle: Bundle, tmp_path: Path
) -> None:
    keys = KeyFile(keys=(Key(name="alice", sha256=hashed(SECRET)),))
    (tmp_path / "keys.json").write_text(keys.model_dump_json())
    app = App(bundle, Gate(), keys=tmp_path / "keys.json")
    kept = "Object.entries(sessionStorage).filter(([name]) => name.includes('key')).flat().join()"

    def give(page: Page, secret: str, keep: bool = False) -> None:
        page.fill("#key", secret)
        page.set_checked("#keep-key", keep)
        page.press("#key", "Enter")

    with listening(app) as url, opened(browser, f"{url}/", refused={401}) as page:
        page.locator("#key-why", has_text="needs an API key").wait_for()
        assert page.locator("#key").get_attribute("type") == "password"
        assert page.locator("#status").inner_text() == "key needed"
        give(page, "wrong")
        page.locator("#key-why", has_text="no API key of this server").wait_for()
        give(page, SECRET)
        ready(page)
        assert page.locator("#key-form").is_hidden()
        with page.expect_request("**/generate") as sent:
            ask(page, "cat")
        assert sent.value.headers["authorization"] == f"Bearer {SECRET}"
        done(page)
        command = page.locator("#easel-facts pre").inner_text()
        assert '"Authorization: Bearer $CDM_API_KEY"' in command
        assert SECRET not in page.content()
        assert page.evaluate(kept) == ""

        page.reload()  # it was not to be kept
        page.locator("#key-form").wait_for()
        give(page, SECRET, keep=True)
        ready(page)
        page.reload()
        ready(page)
        assert SECRET in page.evaluate(kept)

        (tmp_path / "keys.json").write_text('{"keys": []}')  # it leaked, and was removed
        app.asgi.state.keys.reload()
        ask(page, "cat")
        page.locator("#key-why", has_text="or no longer one").wait_for()
        (tmp_path / "keys.json").write_text(keys.model_dump_json())
        app.asgi.state.keys.reload()
        give(page, SECRET)
        done(page)  # what was asked for is drawn now

        page.click("#forget")
        page.locator("#key-form").wait_for()
        assert page.evaluate(kept) == ""


def test_full_server_is_waited_for_and_tried_again(browser: Browser, bundle: Bundle) -> None:
    app = App(bundle, Gate(), queue_limit=1, max_images=1)
    # A call that seems to take long: what stands in front of the newcomer is worth waiting for.
    app.service.costs.SECONDS = dict.fromkeys(("encode", "denoise", "decode"), (10.0, 0.0))  # type: ignore[attr-defined]

    def refused(page: Page) -> int:
        """How long the server says to wait, once the page counts it down."""
        with page.expect_response("**/generate") as answer:
            page.click("#retry") if page.locator("#retry").is_visible() else ask(page, "dog")
        assert answer.value.status == 429
        page.locator("#notice-wait", has_text="Again in ").wait_for()
        assert page.locator("#retry").is_disabled()
        seconds = int(answer.value.headers["retry-after"])
        shown = int(page.locator("#notice-wait").inner_text().split()[2])
        assert 10 <= shown <= seconds
        return seconds

    with (
        listening(app) as url,
        opened(browser, f"{url}/") as first,
        opened(browser, f"{url}/", refused={429}) as second,
    ):
        ready(first)
        ready(second)
        second.clock.install()
        app.gate.close()
        ask(first, "cat")
        app.gate.wait()
        seconds = refused(second)
        assert "--queue-limit" in second.locator("#notice-text").inner_text()
        second.clock.fast_forward(seconds * 1000)
        second.locator("#retry:enabled").wait_for()
        seconds = refused(second)  # it is still full
        app.gate.open()
        done(first)
        second.check("#by-itself")
        second.clock.fast_forward(seconds * 1000)
        done(second)
        assert second.locator("#notice").is_hidden()


def test_server_that_is_gone_is_waited_for(browser: Browser, site: tuple[App, str]) -> None:
    with browser.new_context() as context:  # its complaints are the browser's own, about every try
        page = context.new_page()
        page.goto(site[1])
        ready(page)
        context.set_offline(True)
        ask(page, "cat")
        page.locator("#notice-text", has_text="cannot be reached").wait_for()
        page.locator("#status[data-state=down]", has_text="unreachable").wait_for()
        assert page.locator("#retry").is_disabled()
        context.set_offline(False)
        ready(page)
        page.locator("#notice-wait", has_text="is back").wait_for()
        page.click("#retry")
        done(page)


def test_warming_up_is_shown_as_far_as_it_is(
    browser: Browser, serve: Callable[..., App], site: tuple[App, str]
) -> None:
    cold = serve(ready=False, before=lambda app: app.gate.close())
    cold.gate.wait()
    words = cold.client.get("/readyz")
    finished, total = cold.service.runner.warmed
    with opened(browser, site[1], refused={503}) as page:
        page.route("**/readyz", lambda route: route.fulfill(status=words.status_code, body=words.text))
        page.reload()
        page.locator("#status[data-state=waiting]", has_text=f"warming up, {finished} of {total}").wait_for()
        warmth = page.locator("#warmth")
        assert [warmth.evaluate(f"bar => bar.{name}") for name in ("value", "max")] == [finished, total]
        ask(page, "cat")  # accepted all the same
        done(page)
        page.unroute("**/readyz")
        ready(page)
        assert warmth.is_hidden()
