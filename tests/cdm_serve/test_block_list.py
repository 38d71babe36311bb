"""Words and phrases of a block-list, and the prompts that have them."""

from __future__ import annotations

import unicodedata
from pathlib import Path

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from cdm_serve.main import main
from cdm_serve.safety import BlockList, words


@pytest.mark.parametrize(
    ("entry", "prompt", "refused"),
    [
        ("nude", "a NUDE cat", True),
        ("nude", "nudes", False),
        ("nude", "denude", False),
        ("nude", "nude_cat", True),
        ("nude", "(nude)", True),
        ("nude", "nude2", False),
        ("nude", "ｎｕｄｅ", True),  # full width
        ("nude", "nu\u200bde", True),  # a space without width
        ("nude", "n\u00adude", True),  # a soft hyphen
        ("nude", "nu\ufe0fde", True),  # a variation selector
        ("nude", "𝓷𝓾𝓭𝓮", True),  # mathematical letters
        ("nude", "nüdé", True),
        ("nude", "nude+cat", True),
        ("nude", "nude🍎", True),
        ("nüde", "nude", True),
        ("STRASSE", "straße", True),
        ("ﬁg", "FIG", True),  # a ligature
        ("İ", "i", True),
        ("nudity", "nudıty", True),  # whose capital is I
        ("red apple", "red\n\tapple", True),
        ("red apple", "Red, apple", True),
        ("red apple", "redapple", False),
        ("red apple", "red red apple", True),
        ("裸体", "一个裸体女人", True),
        ("裸体", "裸的体", False),
        ("ヌード", "きれいなヌード写真", True),
        ("เปลือย", "ภาพเปลือยกาย", True),
        ("голый", "ГОЛЫЙ кот", True),
        ("🔫", "cat with 🔫🔫", True),
        ("🔫", "cat", False),
        ("👩‍🚀", "👩 🚀", True),  # joined or not
        ("don't", "DON’T", True),
    ],
)
def test_words_are_compared_as_they_are_read(entry: str, prompt: str, refused: bool) -> None:
    assert (BlockList([entry]).line_of(prompt) is not None) == refused


WORDS = st.text(st.characters(categories=("L", "N")), min_size=1, max_size=8).filter(words)
SEPARATORS = st.text(st.sampled_from(" \t\n.,;:!?-_/'\"()+*="), min_size=1, max_size=3)
FORMS = ("NFC", "NFD", "NFKC", "NFKD")


@given(st.lists(WORDS, min_size=1, max_size=4), st.data())
def test_entry_is_found_in_any_company_case_and_form(entry: list[str], data: st.DataObject) -> None:
    written = "".join(word + data.draw(SEPARATORS) for word in entry)
    prompt = f"{data.draw(WORDS)} {written} {data.draw(WORDS)}"
    prompt = data.draw(st.sampled_from([str.upper, str.lower, str.title, str.casefold, str]))(prompt)
    prompt = unicodedata.normalize(data.draw(st.sampled_from(FORMS)), prompt)
    assert BlockList(["", "# none", " ".join(entry)]).line_of(prompt) == 3


@given(st.lists(WORDS, min_size=1, max_size=3), st.text(max_size=30))
def test_nothing_else_is_refused(entry: list[str], prompt: str) -> None:
    wanted, given = words(" ".join(entry)), words(prompt)
    assume(all(word not in given for word in wanted))
    assert BlockList([" ".join(entry)]).line_of(prompt) is None


@given(st.text())
def test_words_of_words_are_the_same(text: str) -> None:
    assert words(" ".join(words(text))) == words(text)


@pytest.mark.parametrize(
    ("content", "fragment"),
    [
        (None, "No such file"),
        (b"\xff\xfe\x00", "not UTF-8"),
        (b"# nothing\n\n", "has no entry"),
        (b"nude\n$$$\n", "line 2 of the block-list has no word"),
    ],
)
def test_block_list_that_lists_nothing_is_told(
    content: bytes | None, fragment: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "words.txt"
    if content is not None:
        path.write_bytes(content)
    assert main(["--engine", "fake", "--port", "0", "--block-list", str(path)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("cdm-serve: error: ")
    assert fragment in error
