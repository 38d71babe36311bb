"""Quoted parts are found as the LongCat-Image pipeline finds them, and nothing of a prompt is lost."""

from __future__ import annotations

import re

import pytest
from diffusers.pipelines.longcat_image.pipeline_longcat_image import split_quotation as diffusers_split
from hypothesis import example, given, settings
from hypothesis import strategies as st

from engines.spelling import frame, split_quotation, tokenize

pieces = st.sampled_from(
    [*"'\"‘’“”", *"'\"'\"", "don't", "red", " ", "\n", "苹果", "é", "'s", "s'", "5'", "-", "'‘", "Sale", "."]
)
prompts = st.lists(pieces, max_size=14).map("".join)
contractions = st.lists(st.sampled_from(["don't", "it's", "o'clock", "'", "‘", "’", " ", "x"])).map("".join)


@settings(deadline=None, max_examples=500)
@given(st.one_of(prompts, st.text()))
@example("")
@example("'")
@example("''")
@example("Please write 'Hello' on the “black” board, \"don't\" ‘wait’.")
@example("'twas, he didn't")
@example("don't'don't")
@example("'open \"and' shut\"")
@example("‘a ‘nested’ one’ and “a\nline”")
def test_parts_equal_diffusers(prompt: str) -> None:
    if (
        len(set(re.findall("[a-zA-Z]+'[a-zA-Z]+", prompt))) <= 1
    ):  # diffusers mixes up two words with apostrophes
        assert split_quotation(prompt) == diffusers_split(prompt)


@settings(deadline=None)
@given(st.one_of(prompts, contractions, st.text()))
@example("it's what we don't say at ten o'clock: 'don't'")
def test_joined_parts_are_the_prompt(prompt: str) -> None:
    parts = split_quotation(prompt)
    assert "".join(part for part, _ in parts) == prompt
    assert all(part for part, _ in parts)


def test_two_words_with_apostrophes_stay_what_they_are() -> None:
    prompt = "it's a sign, don't read 'it'"
    assert split_quotation(prompt) == [("it's a sign, don't read ", False), ("'it'", True)]
    assert (
        "".join(part for part, _ in diffusers_split(prompt)) != prompt
    )  # if this fails, diffusers is mended


@pytest.mark.parametrize(
    ("prompt", "pieces"),
    [
        ("a sign 'Hi you'", ["a sign ", "'", "H", "i", " ", "y", "o", "u", "'"]),
        ("“蘋果”店", ["“", "蘋", "果", "”", "店"]),
        ("nobody's quote", ["nobody's quote"]),
        ("", []),
    ],
)
def test_quoted_parts_are_spelled(prompt: str, pieces: list[str]) -> None:
    seen: list[str] = []

    def encode(text: str) -> list[int]:
        seen.append(text)
        return [ord(letter) for letter in text]

    assert tokenize(prompt, encode) == [ord(letter) for letter in prompt]
    assert seen == pieces


def test_frame_cuts_and_pads_between_prefix_and_suffix() -> None:
    assert frame([1, 2], 6, 0, prefix=[7], suffix=[8]) == [7, 1, 2, 0, 0, 8]
    assert frame([1, 2, 3, 4, 5], 6, 0, prefix=[7], suffix=[8]) == [7, 1, 2, 3, 4, 8]
    assert frame([], 3, 9) == [9, 9, 9]
