"""The page's files as they are sent."""

from __future__ import annotations

from importlib.resources import files

import pytest

from cdm_serve.pages import FILES
from tests.cdm_serve.helpers import App


@pytest.mark.parametrize("path", ["/", "/docs", "/page/app.js"])
def test_file_that_the_browser_has_is_not_sent_again(app: App, path: str) -> None:
    first = app.client.get(path)
    tag = first.headers["etag"]
    for known in (tag, f"W/{tag}", f'"other", {tag}'):
        again = app.client.get(path, headers={"if-none-match": known})
        assert (again.status_code, again.content) == (304, b"")
        assert again.headers["content-security-policy"] == first.headers["content-security-policy"]
    assert app.client.get(path, headers={"if-none-match": '"other"'}).content == first.content


def test_every_file_is_served_under_a_tag_of_its_own(app: App) -> None:
    names = [file.name for file in files("cdm_serve").joinpath("page").iterdir()]
    assert sorted(names) == sorted(FILES)
    answers = [app.client.get(f"/page/{name}") for name in names]
    assert all(answer.status_code == 200 for answer in answers)
    assert len({answer.headers["etag"] for answer in answers}) == len(names)


def test_policy_lets_nothing_in_from_elsewhere_and_nothing_inline(app: App) -> None:
    policy = app.client.get("/").headers["content-security-policy"]
    sources = dict(part.strip().split(" ", 1) for part in policy.split(";"))
    assert sources["default-src"] == "'none'"
    assert sources["script-src"] == sources["style-src"] == sources["connect-src"] == "'self'"
    for word in ("unsafe", "http", "*"):
        assert word not in policy
