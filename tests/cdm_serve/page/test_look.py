"""How the page looks: at phone width, in both themes, to colour-blind readers, without motion."""

from __future__ import annotations

import itertools
import json
import re
from typing import TYPE_CHECKING

import numpy as np
import pytest
from numpy.typing import NDArray

from cdm_serve.picture import STAGES
from tests.cdm_serve.browser import DESKTOP, MARKS, PHONE, ask, done, opened, ready
from tests.cdm_serve.helpers import App

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

pytestmark = MARKS

# Machado, Oliveira, Fernandes 2009, severity 1: what a dichromat sees of linear RGB.
SEEN_BY = {
    "all": np.eye(3),
    "protanope": [
        [0.152286, 1.052583, -0.204868],
        [0.114503, 0.786281, 0.099216],
        [-0.003882, -0.048116, 1.051998],
    ],
    "deuteranope": [
        [0.367322, 0.860646, -0.227968],
        [0.280085, 0.672501, 0.047413],
        [-0.011820, 0.042940, 0.968881],
    ],
    "tritanope": [
        [1.255528, -0.076749, -0.178779],
        [-0.078411, 0.930809, 0.147602],
        [0.004733, 0.691367, 0.303900],
    ],
}
# Every text on the page: its colour, and the background that stands behind it.
TEXTS = """() => {
    const behind = (node) => {
        for (; node; node = node.parentElement) {
            const { backgroundColor: colour } = getComputedStyle(node);
            if (colour !== 'rgba(0, 0, 0, 0)') return colour;
        }
    };
    return [...document.querySelectorAll('body *')]
        .filter((node) => node.checkVisibility() && (node.placeholder || node.value
            || [...node.childNodes].some((child) => child.nodeType === 3 && child.data.trim())))
        .filter((node) => !node.matches('option, progress, :disabled'))
        .map((node) => [node.tagName + '#' + node.id + '.' + node.className,
            getComputedStyle(node, node.placeholder && !node.value ? '::placeholder' : null).color, behind(node)]);
}"""
SMALL_TARGETS = """() => [...document.querySelectorAll('button, a, select, input:not([type=checkbox]), .tick, #prompt')]
    .filter((node) => node.checkVisibility() && !node.closest('.unseen'))
    .map((node) => [node.outerHTML.slice(0, 60), (node.closest('.knobs label') ?? node).getBoundingClientRect()])
    .filter(([, { width, height }]) => width < 40 || height < 40)"""
NAMELESS = """() => [...document.querySelectorAll('button, a, select, input, textarea, img, progress, [role=img]')]
    .filter((node) => node.checkVisibility() && !node.ariaLabel && !node.labels?.length
        && !(node.matches('img') ? node.hasAttribute('alt') : node.textContent.trim() || node.querySelector('[alt]')))
    .map((node) => node.outerHTML)"""
STICKS_OUT = "document.documentElement.scrollWidth - document.documentElement.clientWidth"


def linear(colour: str) -> NDArray[np.float64]:
    """`rgb(…)` or `#rrggbb` → linear RGB, 0 to 1 (IEC 61966-2-1)."""
    if colour.startswith("#"):
        encoded = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)]) / 255
    else:
        encoded = np.array([float(number) for number in re.findall(r"[\d.]+", colour)[:3]]) / 255
    return np.where(encoded <= 0.04045, encoded / 12.92, ((encoded + 0.055) / 1.055) ** 2.4)


def contrast(one: str, other: str) -> float:
    """Their ratio, 1 to 21 (WCAG 2.2, relative luminance)."""
    low, high = sorted(float(linear(colour) @ [0.2126, 0.7152, 0.0722]) for colour in (one, other))
    return (high + 0.05) / (low + 0.05)


def lab(rgb: NDArray[np.float64]) -> NDArray[np.float64]:
    """Linear RGB → CIELAB (D65)."""
    to_xyz = [[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]]
    xyz = to_xyz @ np.clip(rgb, 0, 1) / [0.9505, 1, 1.089]
    f = np.where(xyz > 0.008856, np.cbrt(xyz), 7.787 * xyz + 16 / 116)
    return np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_texts_and_stages_are_told_apart(browser: Browser, site: tuple[App, str], scheme: str) -> None:
    with opened(browser, site[1], color_scheme=scheme, viewport=DESKTOP) as page:
        ready(page)
        page.select_option("#steps", "auto")
        ask(page, " ", steps="auto")  # the notice
        page.locator("#notice").wait_for()
        texts = page.evaluate(TEXTS)
        ask(page, "cat")
        done(page)
        page.locator("#easel-facts .facts").wait_for()
        texts += page.evaluate(TEXTS)
        assert len(texts) > 60
        low = [(name, ratio) for name, ink, paper in texts if (ratio := contrast(ink, paper)) < 4.5]
        assert not low

        card = page.locator("#easel").evaluate("node => getComputedStyle(node).backgroundColor")
        stages = page.evaluate(
            """(stages) => Object.fromEntries(stages.map((stage) => {
                const part = document.createElement('i');
                part.dataset.stage = stage;
                document.querySelector('.facts .timing').append(part);
                return [stage, getComputedStyle(part).backgroundColor];
            }))""",
            [*STAGES, "rest"],
        )
    assert len(set(stages.values())) == 7
    for stage, colour in stages.items():
        assert contrast(colour, card) >= 3, stage
    for who, matrix in SEEN_BY.items():
        seen = {stage: lab(np.asarray(matrix) @ linear(colour)) for stage, colour in stages.items()}
        for one, other in itertools.combinations(stages, 2):
            assert np.linalg.norm(seen[one] - seen[other]) > 15, (who, one, other)


def test_nothing_sticks_out_at_phone_width_and_all_can_be_touched_and_named(
    browser: Browser, site: tuple[App, str]
) -> None:
    with opened(browser, site[1], viewport=PHONE, has_touch=True) as page:
        ready(page)
        page.select_option("#steps", "auto")
        ask(page, " ", steps="auto")
        page.locator("#notice").wait_for()
        for count in (4, 1):
            ask(page, "w" * 300, count=count, seed=2**63 - 1)
            done(page, count)
            assert page.evaluate(STICKS_OUT) <= 0
        page.locator("#easel-facts .facts").wait_for()
        assert page.evaluate(STICKS_OUT) <= 0
        assert page.evaluate(SMALL_TARGETS) == []
        assert page.evaluate(NAMELESS) == []
        page.locator("#shelf button").first.tap()
        assert page.evaluate("viewer.scrollWidth <= viewer.clientWidth")
        assert page.evaluate(SMALL_TARGETS) == []


def test_theme_follows_the_system_until_it_is_switched(browser: Browser, site: tuple[App, str]) -> None:
    background = "getComputedStyle(document.body).backgroundColor"
    with opened(browser, site[1], color_scheme="dark") as page:
        dark = page.evaluate(background)
        page.emulate_media(color_scheme="light")
        light = page.evaluate(background)
        assert contrast(light, dark) > 10
        page.click("#theme")
        assert page.evaluate(background) == dark
        page.reload()
        assert page.evaluate(background) == dark
        page.goto(f"{site[1]}docs")
        assert page.evaluate(background) == dark
        page.click("#theme")
        assert page.evaluate(background) == light
        page.emulate_media(color_scheme="dark")  # it follows again
        assert page.evaluate(background) == dark


def test_nothing_moves_for_those_who_do_not_want_it(held: tuple[App, Page]) -> None:
    app, page = held
    ask(page, "cat")
    app.gate.wait()
    page.wait_for_function("document.getAnimations().length > 0")
    page.emulate_media(reduced_motion="reduce")
    assert page.evaluate("document.getAnimations().length") == 0


def test_bars_parts_are_as_long_as_their_times(browser: Browser, site: tuple[App, str]) -> None:
    timings = {"queue": 10, "encode": 0, "denoise": 50, "decode": 20, "image_encode": 5, "total": 100}

    def with_timings(text: str) -> str:
        return re.sub(r'"timings_ms": \{.*?\}', f'"timings_ms": {json.dumps(timings)}', text)

    with opened(browser, site[1], viewport=DESKTOP) as page:
        ready(page)
        page.route("**/generate", lambda route: route.fulfill(body=with_timings(route.fetch().text())))
        ask(page, "cat")
        done(page)
        bar = page.locator("#easel-facts .timing")
        widths = bar.locator("i").evaluate_all(
            "parts => parts.map(part => [part.dataset.stage, part.getBoundingClientRect().width])"
        )
        assert [stage for stage, _ in widths] == ["queue", "denoise", "decode", "image_encode", "rest"]
        shares = np.array([width for _, width in widths]) / sum(width for _, width in widths)
        np.testing.assert_allclose(shares, [0.1, 0.5, 0.2, 0.05, 0.15], atol=0.02)
        assert bar.get_attribute("aria-label") == (
            "Time spent: queue 10 ms, denoise 50 ms, decode 20 ms, image file 5.0 ms, rest 15 ms, total 100 ms"
        )
        legend = page.locator("#easel-facts .legend li").all_inner_texts()
        assert [re.sub(r"\s+", " ", text) for text in legend][-2:] == ["rest 15 ms", "total 100 ms"]


def test_docs_show_every_operation_and_the_limits(page: Page, site: tuple[App, str]) -> None:
    page.goto(f"{site[1]}docs")
    page.locator("#docs section").first.wait_for()
    text = page.locator("#docs").inner_text()
    for expected in ("/generate", "/readyz", "/metrics", "1, 2, 3, 4, 6, 8", "0 to 9223372036854775807"):
        assert expected in text
