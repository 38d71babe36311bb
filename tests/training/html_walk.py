"""A page read strictly: `walk(text)` raises where a browser would silently repair."""

from __future__ import annotations

from html.parser import HTMLParser

VOID = {"area", "base", "br", "col", "embed", "hr", "img", "input", "link", "meta", "source", "track", "wbr"}
LOADING = {"src", "href", "srcset", "poster", "data", "action", "formaction", "xlink:href", "background"}


class Walk(HTMLParser):
    """Elements with their attributes, text by the tag it stands in."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.texts: list[tuple[str, str]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        names = [name for name, _ in attrs]
        assert len(names) == len(set(names)), f"<{tag}> has an attribute twice: {names}"
        self.elements.append((tag, {name: value or "" for name, value in attrs}))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert tag not in VOID, f"</{tag}>"
        assert self.open, f"</{tag}> closes nothing, at {self.getpos()}"
        assert self.open[-1] == tag, f"</{tag}> closes <{self.open[-1]}> at {self.getpos()}"
        self.open.pop()

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        raise AssertionError(f"<{tag}/> is no HTML, at {self.getpos()}")

    def handle_data(self, data: str) -> None:
        if data.strip():
            self.texts.append((self.open[-1] if self.open else "", data.strip()))

    def all(self, tag: str) -> list[dict[str, str]]:
        return [attributes for name, attributes in self.elements if name == tag]

    def text_in(self, tag: str) -> list[str]:
        return [text for name, text in self.texts if name == tag]


def walk(text: str) -> Walk:
    """Well nested, every id once and every reference to one met, and nothing that is loaded from elsewhere."""
    assert text.startswith("<!doctype html>")
    page = Walk()
    page.feed(text)
    page.close()
    assert page.open == []
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(ids) == len(set(ids)), "an id stands twice"
    for tag, attributes in page.elements:
        for name in LOADING & attributes.keys():
            value = attributes[name]
            assert value.startswith("data:") or value[1:] in ids, f"<{tag} {name}={value[:80]}>"
        assert not [name for name in attributes if name.startswith("on")], f"<{tag}> has a handler"
        assert attributes.get("for", ids[0] if ids else "") in ids or tag != "label"
    for tag, content in page.texts:
        if tag == "style":
            assert "url(" not in content
            assert "@import" not in content
    return page
