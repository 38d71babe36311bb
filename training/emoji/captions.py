"""Icon names → captions in one wording.

The six sets name the same emoji differently; its codepoints, where a set lists them, lead to one label
("man: dark skin tone, beard"), and the rest is matched by name.

    catalogue = Catalogue.build(emojibase, chars, aliases, names)
    catalogue.resolve("fluent-emoji", "man-beard-medium-dark").name  # "man beard medium dark skin tone"
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from training.emoji.firefox import NAMES as FIREFOX_NAMES
from training.emoji.splitter import WordSplitter

TONES = ("light", "medium light", "medium", "medium dark", "dark")
GENDERS = {
    "man": "man",
    "men": "man",
    "woman": "woman",
    "women": "woman",
    "person": "person",
    "people": "person",
}
# Sets without codepoints are matched by icon name, in these sets, in this order.
LOOKUP_ORDER = {
    "noto-v1": ("noto", "twemoji", "fluent-emoji-flat"),
    "fluent-emoji": ("fluent-emoji-flat", "noto", "twemoji"),
    "fxemoji": ("noto", "twemoji", "fluent-emoji-flat"),
}
_SIGNS = {
    "&": " and ",
    "#": " hash ",
    "*": " asterisk ",
    "+": " plus ",
    "’": "",
    "'": "",
    "‘": "",
    "“": "",
    "”": "",
}
_TONE = re.compile(r"\b(medium light|medium dark|light|medium|dark) skin tone\b")
_FLUENT_TONE = re.compile(r"^(?P<base>.+?)-(?P<tone>medium-light|medium-dark|light|medium|dark)$")


@dataclass(frozen=True)
class Caption:
    name: str
    concept: str
    attributes: Mapping[str, str]
    keywords: tuple[str, ...] = ()


def words(text: str) -> str:
    """Lower-case ASCII letters and digits, one space between words."""
    for sign, spelled in _SIGNS.items():
        text = text.replace(sign, spelled)
    plain = unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode().lower()
    return " ".join(re.findall(r"[a-z0-9]+", plain))


def normalise(label: str) -> str:
    """A CLDR label or a dashed icon name → a name: flags are "flag of …", skin tones stand at the end."""
    text = words(re.sub(r"^flag: ", "flag of ", label))
    text = re.sub(r"^flag for (flag )?", "flag of ", text)
    tones = _TONE.findall(text)
    rest = " ".join(_TONE.sub(" ", text).split())
    tail = " and ".join(f"{tone} skin tone" for tone in tones)
    return f"{rest} {tail}".strip()


def describe(name: str, keywords: Iterable[str] = ()) -> Caption:
    """Split a normalised name into its base concept and attributes.

    >>> describe("woman firefighter dark skin tone").concept
    'firefighter'
    """
    tones = _TONE.findall(name)
    first = _TONE.search(name)
    base = name[: first.start()].strip() if first else name  # skin tones stand at the end
    parts = base.split()
    genders = sorted({GENDERS[part] for part in parts if part in GENDERS}, reverse=True)  # "woman and man"
    attributes: dict[str, str] = {}
    if genders:
        attributes["gender"] = " and ".join(genders)
    if tones and base:  # without a base the skin tone is the thing itself: a colour swatch
        attributes["skin_tone"] = " and ".join(tones)
    # A mirrored drawing is no concept of its own, and its combinations are held out with the plain ones.
    if "facing right" in base:
        attributes["direction"] = "right"
        parts = base.replace("facing right", " ").split()
    rest = [part for part in parts if part not in GENDERS]
    # "woman and man holding hands" leaves a leading "and"
    concept = " ".join(rest).removeprefix("and ").strip() or ("person" if genders else name)
    own = {*name.split(), *GENDERS}  # a keyword must not contradict the gender, or the lack of one
    kept = dict.fromkeys(word for word in map(words, keywords) if word.isalpha() and word not in own)
    return Caption(name, concept, attributes, tuple(kept))


def codepoint_key(codepoints: str) -> str:
    """Sets disagree on the emoji variation selector; the key leaves it out."""
    return "-".join(part for part in codepoints.lower().split("-") if part != "fe0f")


def joined(text: str) -> str:
    return text.replace(" ", "")


@dataclass(frozen=True)
class _Emoji:
    name: str
    tags: tuple[str, ...]


@dataclass
class Catalogue:
    """What is known about emoji by codepoint, by icon name per set, and by run-together name."""

    emoji: dict[str, _Emoji] = field(default_factory=dict)
    icons: dict[str, dict[str, str]] = field(
        default_factory=dict
    )  # set → icon name or alias → key of `emoji`
    by_joined: dict[str, str] = field(default_factory=dict)
    chars: Mapping[str, Mapping[str, Sequence[str]]] = field(default_factory=dict)
    names: Mapping[str, frozenset[str]] = field(default_factory=dict)  # set → its icon names
    splitter: WordSplitter = field(default_factory=lambda: WordSplitter({}))

    @classmethod
    def build(
        cls,
        emojibase: Sequence[Mapping[str, Any]],
        chars: Mapping[str, Mapping[str, Sequence[str]]],
        aliases: Mapping[str, Mapping[str, str]],
        names: Mapping[str, Iterable[str]],
    ) -> Catalogue:
        self = cls(chars=chars, names={set_name: frozenset(icons) for set_name, icons in names.items()})
        for entry in emojibase:
            tags = tuple(entry.get("tags", ()))
            for variant in (entry, *entry.get("skins", ())):
                self.emoji[codepoint_key(variant["hexcode"])] = _Emoji(normalise(variant["label"]), tags)
        for set_name, icon_chars in chars.items():
            known = self.icons.setdefault(set_name, {})
            for icon, sequences in icon_chars.items():
                key = next((k for k in map(codepoint_key, sequences) if k in self.emoji), None)
                if key is not None:
                    known[icon] = key
            for alias, parent in aliases.get(set_name, {}).items():
                if parent in known:
                    known.setdefault(alias, known[parent])
        self._index_joined()
        counts = Counter(word for one in self.emoji.values() for word in one.name.split())
        for set_name, icons in self.names.items():
            if set_name != "fxemoji":
                counts.update(word for icon in icons for word in words(icon).split())
        self.splitter = WordSplitter(counts)
        return self

    def _index_joined(self) -> None:
        """First come, first kept: labels, then icon names and aliases, then Unicode's own character names."""
        for key, one in self.emoji.items():
            self.by_joined.setdefault(joined(one.name), key)
        for set_name in ("noto", "twemoji", "fluent-emoji-flat"):
            for icon, key in self.icons.get(set_name, {}).items():
                self.by_joined.setdefault(joined(words(icon)), key)
        for key in self.emoji:
            if "-" not in key:
                character = unicodedata.name(chr(int(key, 16)), "")
                self.by_joined.setdefault(joined(words(character)), key)

    def resolve(self, set_name: str, icon: str) -> Caption:
        for sequence in self.chars.get(set_name, {}).get(icon, ()):
            if (key := codepoint_key(sequence)) in self.emoji:
                return self._caption(key)
        for other in LOOKUP_ORDER.get(set_name, ()):
            if (known := self.icons.get(other, {}).get(icon)) is not None:
                return self._caption(known)
        if icon in self.chars.get(set_name, {}):  # an emoji newer than the labels, or the vendor's own
            return describe(normalise(icon))
        base, tone = self.split_tone(set_name, icon)
        plain = normalise(FIREFOX_NAMES.get(base, base) if set_name == "fxemoji" else base)
        # "angry" is "angry face" elsewhere; "flag-japan" is "flag: Japan".
        for guess in (plain, f"{plain} face", plain.replace("flag ", "flag of ", 1)):
            if (match := self.by_joined.get(joined(guess))) is not None:
                one = self.emoji[match]
                return describe(_with_tone(one.name, tone), one.tags)
        if set_name == "fxemoji" and base not in FIREFOX_NAMES:
            plain = normalise(self.splitter.split(base))
        return describe(_with_tone(plain, tone))

    def split_tone(self, set_name: str, icon: str) -> tuple[str, str | None]:
        """fluent's "…-medium-light" is a skin tone only where the plain or the spelled-out icon exists too:
        "light" belongs to the name in "traffic-light", as "medium" does in "black-medium-square"."""
        match = _FLUENT_TONE.match(icon)
        if match is None:
            return icon, None
        base, tone = match["base"], match["tone"]
        own = base in self.names.get(set_name, frozenset()) and f"{base}-dark" in self.names[set_name]
        spelled = any(f"{icon}-skin-tone" in icons for icons in self.names.values())
        return (base, tone.replace("-", " ")) if own or spelled else (icon, None)

    def _caption(self, key: str) -> Caption:
        one = self.emoji[key]
        return describe(one.name, one.tags)


def _with_tone(name: str, tone: str | None) -> str:
    return name if tone is None else f"{name} {tone} skin tone"
