"""What is done with finished pictures: handed on, drawn again, kept, deleted."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

import httpx
import pytest

from tests.cdm_serve.browser import MARKS, ask, clipboard, done, ready, shown_bytes
from tests.cdm_serve.helpers import App

if TYPE_CHECKING:
    from playwright.sync_api import Page

pytestmark = MARKS

HOSTILE = (
    "it's \"a\" $HOME `id` $(id) \\ '; echo\n"
    "<img src=x onerror=\"document.title='bad'\">\n# ! é 😀 \u202e\x7f end'"
)


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
def test_copied_curl_makes_the_same_file_whatever_the_prompt(page: Page, tmp_path: Path) -> None:
    for prompt, file_format, name in (
        (HOSTILE, "png", "it-s-a-HOME-id-id-echo-img-src-x-onerror-document-title-bad--7.png"),
        ("red apple", "webp", "red-apple-7.webp"),
    ):
        page.select_option("#format", file_format)
        ask(page, prompt, seed=7, steps=3)
        done(page)
        page.locator("#easel-facts dd", has_text=file_format).wait_for()
        page.click("#easel-facts .copy-curl")
        page.locator(".copy-curl", has_text="Copied").wait_for()
        command = clipboard(page)
        assert command == page.locator("#easel-facts pre").text_content()
        assert command.isprintable() or set(filter(lambda c: not c.isprintable(), command)) == {"\n"}
        subprocess.run(
            ["sh", "-c", command],
            cwd=tmp_path,
            check=True,
            capture_output=True,
            env={"PATH": os.environ["PATH"]},
        )
        (file,) = tmp_path.iterdir()
        assert file.read_bytes() == shown_bytes(page)
        assert file.name.startswith(name[:40])
        assert file.suffix == f".{file_format}"
        file.unlink()


def test_copied_parameters_posted_make_the_same_file(page: Page, site: tuple[App, str]) -> None:
    ask(page, HOSTILE, seed=2**63 - 1, steps=3)
    done(page)
    page.click("#easel-facts .copy-json")
    page.locator(".copy-json", has_text="Copied").wait_for()
    headers = {"content-type": "application/json"}
    with httpx.Client(trust_env=False) as client:
        answer = client.post(f"{site[1]}generate", content=clipboard(page), headers=headers)
    assert answer.headers["content-type"] == "image/png"
    assert answer.content == shown_bytes(page)


def test_hostile_prompt_is_shown_as_text(page: Page) -> None:
    ask(page, HOSTILE, count=2)
    done(page, 2)
    page.locator(".frame").first.click()
    for title in ("#easel-prompt", "#viewer-prompt"):
        assert page.locator(title).text_content() == HOSTILE
        assert page.locator(f"{title} *").count() == 0
    assert page.locator("[onerror], [src=x]").count() == 0
    assert page.locator("#viewer-image").get_attribute("alt") == HOSTILE
    assert page.title() != "bad"


def test_again_fills_the_form_with_exactly_that_picture(page: Page) -> None:
    page.select_option("#format", "jpeg")
    ask(page, "red\napple", steps=3)
    done(page)
    first = shown_bytes(page)
    page.select_option("#format", "png")
    ask(page, "cat", count=2, steps=1)
    done(page, 2)
    page.locator("#shelf button").nth(2).click()
    page.click("#viewer .again")
    assert page.locator("#viewer").is_hidden()
    page.keyboard.press("Control+Enter")
    page.locator("#easel[data-single] .facts").wait_for()
    assert page.locator("#easel-prompt").text_content() == "red\napple"
    assert shown_bytes(page) == first


def test_keyboard_alone_draws_looks_and_deletes(page: Page) -> None:
    def press(*keys: str) -> None:
        for key in keys:
            page.keyboard.press(key)

    def focused() -> str | None:
        name: str | None = page.evaluate("document.activeElement.id || document.activeElement.dataset.id")
        return name

    assert focused() == "prompt"
    for prompt in ("one", "two", "three"):
        press("Control+a")
        page.keyboard.type(prompt)
        press("Control+Enter")
        page.locator("#easel-prompt", has_text=prompt).wait_for()
        done(page)
        page.locator("#easel-facts .facts").wait_for()
    shelf = page.locator("#shelf button").evaluate_all("all => all.map(thumb => thumb.dataset.id)")
    assert shelf == sorted(shelf, reverse=True)
    for _ in range(30):
        if focused() in shelf:
            break
        press("Tab")
        outline = page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
        assert outline != "none" or focused() == "prompt"  # whose frame shows it
    assert focused() == shelf[0]
    press("ArrowRight", "ArrowRight", "ArrowRight", "ArrowLeft")
    assert focused() == shelf[1]
    press("End")
    assert focused() == shelf[2]
    press("Home", "Enter")
    assert page.locator("#viewer-prompt").inner_text() == "three"
    press("ArrowRight")
    assert page.locator("#viewer-prompt").inner_text() == "two"
    press("Escape")
    page.locator("#viewer").wait_for(state="hidden")
    press("ArrowRight", "Delete")
    assert page.locator("#shelf button").count() == 2
    assert focused() in shelf
    press("/")
    assert focused() == "prompt"
    assert page.input_value("#prompt") == "three"
    press("Shift+Enter")
    assert page.input_value("#prompt") == "three\n"


def test_gallery_outlives_a_reload_and_what_was_deleted_does_not(page: Page) -> None:
    ask(page, "cat", count=3, seed=1)
    done(page, 3)
    titles = "all => all.map(thumb => thumb.title)"
    before = page.locator("#shelf button").evaluate_all(titles)
    page.locator("#shelf button").first.click()
    page.click("#viewer .delete")
    assert page.locator(".tile").count() == 2  # it is nowhere any more
    page.reload()
    ready(page)
    assert page.locator("#shelf button").evaluate_all(titles) == before[1:]
    page.wait_for_function(
        "[...document.querySelectorAll('#shelf img')].every(image => image.naturalWidth === 128)"
    )
    page.click("#clear")
    assert page.locator("#gallery").is_hidden()
    page.reload()
    ready(page)
    assert page.locator("#shelf button").count() == 0


def test_full_storage_lets_the_oldest_go(page: Page) -> None:
    stored = "Object.keys(sessionStorage).sort()"
    ask(page, "old", seed=1)
    done(page)
    page.evaluate(
        """() => {
            let length = 2 ** 23;
            for (let text = ''; length >= 64; length /= 2) {
                const more = text + 'x'.repeat(length);
                try { sessionStorage.setItem('filler', more); text = more; } catch {}
            }
        }"""
    )
    (old,) = [name for name in page.evaluate(stored) if name != "filler"]
    ask(page, "new", seed=2)
    done(page)
    page.locator("#easel-facts .facts").wait_for()
    assert page.locator("#shelf button").count() == 2
    (new,) = [name for name in page.evaluate(stored) if name != "filler"]
    assert new > old
    page.reload()
    ready(page)
    assert page.locator("#shelf button").get_attribute("title") == "new, seed 2"
