from __future__ import annotations

from typing import Any

import pytest

from training.emoji.captions import Catalogue, describe, normalise, words
from training.emoji.splitter import WordSplitter

LABELS = {
    "1f468-1f3fe-200d-2642": "man: medium-dark skin tone, beard",
    "1f468-200d-2642": "man: beard",
    "1f9d1-200d-1f9b0": "person: red hair",
    "1f9ce-200d-27a1": "person kneeling: facing right",
    "1f1ef-1f1f5": "flag: Japan",
    "1f1f0-1f1f3": "flag: St. Kitts & Nevis",
    "1f4a1": "light bulb",
    "25fc": "black medium square",
    "1f620": "angry face",
    "1f420": "tropical fish",
    "1f60d": "smiling face with heart-eyes",
    "1f551": "two o’clock",
    "1f3be": "tennis",
    "1f409": "dragon",
    "1f91d-1f3fb-1f3ff": "handshake: light skin tone, dark skin tone",
    "1f603": "grinning face with big eyes",
}
CHARS = {
    "noto": {
        "man-medium-dark-skin-tone-beard": ["1f468-1f3fe-200d-2642"],
        "man-beard": ["1f468-200d-2642"],
        "light-bulb": ["1f4a1"],
        "new-thing": ["1ffff"],
    },
    "fluent-emoji-flat": {"black-medium-square": ["25fc"], "smiling-face-with-heart-eyes": ["1f60d"]},
}
ALIASES = {"noto": {"bearded-man": "man-beard"}}
NAMES = {
    "noto": [*CHARS["noto"], "skier-medium-skin-tone"],
    "fluent-emoji": [
        "man-beard",
        "man-beard-dark",
        "man-beard-medium-light",
        "black-medium-square",
        "angry-light",
    ],
    "fxemoji": ["tropicalfish"],
}


@pytest.fixture(scope="module")
def catalogue() -> Catalogue:
    emojibase: list[dict[str, Any]] = [
        {"hexcode": code.upper(), "label": label, "tags": []} for code, label in LABELS.items()
    ]
    return Catalogue.build(emojibase, CHARS, ALIASES, NAMES)


@pytest.mark.parametrize(
    ("set_name", "icon", "name"),
    [
        ("noto", "man-medium-dark-skin-tone-beard", "man beard medium dark skin tone"),
        ("noto", "new-thing", "new thing"),
        ("noto-v1", "bearded-man", "man beard"),
        ("noto-v1", "flag-for-flag-japan", "flag of japan"),
        ("noto-v1", "flag-japan", "flag of japan"),
        ("noto-v1", "flag-for-st-kitts-and-nevis", "flag of st kitts and nevis"),
        ("fluent-emoji", "man-beard", "man beard"),
        ("fluent-emoji", "man-beard-medium-light", "man beard medium light skin tone"),
        ("fluent-emoji", "skier-medium", "skier medium skin tone"),
        ("fluent-emoji", "black-medium-square", "black medium square"),
        ("fluent-emoji", "light-bulb", "light bulb"),
        ("fluent-emoji", "angry-light", "angry light"),
        ("fxemoji", "tropicalfish", "tropical fish"),
        ("fxemoji", "lightbulb", "light bulb"),
        ("fxemoji", "angry", "angry face"),
        ("fxemoji", "hearteyes", "smiling face with heart eyes"),
        ("fxemoji", "smilingfacewithopenmouth", "grinning face with big eyes"),  # Unicode's own name for it
        ("fxemoji", "clock2oclock", "two oclock"),
        ("fxemoji", "dragonside", "dragon"),
        ("fxemoji", "japanflag", "flag of japan"),
        ("fxemoji", "angrydragon", "angry dragon"),
        ("fxemoji", "guapimao", "guapimao"),
    ],
)
def test_one_wording_in_every_set(catalogue: Catalogue, set_name: str, icon: str, name: str) -> None:
    assert catalogue.resolve(set_name, icon).name == name


@pytest.mark.parametrize(
    ("label", "name"),
    [
        ("flag: Côte d’Ivoire", "flag of cote divoire"),
        ("keycap: #", "keycap hash"),
        ("keycap: *", "keycap asterisk"),
        ("A button (blood type)", "a button blood type"),
        ("jack-o-lantern", "jack o lantern"),
        ("woman running: medium skin tone, facing right", "woman running facing right medium skin tone"),
        ("handshake: light skin tone, dark skin tone", "handshake light skin tone and dark skin tone"),
        ("couple with heart: woman, man", "couple with heart woman man"),
    ],
)
def test_labels_become_plain_words_with_skin_tones_last(label: str, name: str) -> None:
    assert normalise(label) == name


@pytest.mark.parametrize(
    ("name", "concept", "attributes"),
    [
        ("woman firefighter dark skin tone", "firefighter", {"gender": "woman", "skin_tone": "dark"}),
        ("firefighter", "firefighter", {}),
        ("man", "person", {"gender": "man"}),
        ("men wrestling", "wrestling", {"gender": "man"}),
        ("woman and man holding hands", "holding hands", {"gender": "woman and man"}),
        (
            "handshake light skin tone and dark skin tone",
            "handshake",
            {"skin_tone": "light and dark"},
        ),
        ("person kneeling facing right", "kneeling", {"gender": "person", "direction": "right"}),
        ("light bulb", "light bulb", {}),
        ("dark skin tone", "dark skin tone", {}),
        ("mens room", "mens room", {}),
    ],
)
def test_concept_is_the_name_without_its_attributes(
    name: str, concept: str, attributes: dict[str, str]
) -> None:
    found = describe(name)
    assert (found.concept, dict(found.attributes)) == (concept, attributes)


def test_keywords_are_single_words_that_neither_repeat_nor_contradict_the_name() -> None:
    assert describe("woman farmer", ["Farmer", "man", "rural life", "field", "field", "4h"]).keywords == (
        "field",
    )


def test_words_are_ascii() -> None:
    assert words("Curaçao & São-Tomé!") == "curacao and sao tome"


def test_numbers_are_words_and_unknown_letters_stay_together() -> None:
    splitter = WordSplitter({"tropical": 1, "fish": 3, "old": 1})
    assert splitter.split("tropicalfish2") == "tropical fish 2"
    assert splitter.split("xyzzyfish") == "xyzzy fish"
    assert splitter.split("zolder") == "zolder"
    assert splitter.split("") == ""


def test_without_a_vocabulary_nothing_is_split() -> None:
    assert WordSplitter({}).split("tropicalfish") == "tropicalfish"
