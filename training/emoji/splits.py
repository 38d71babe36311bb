"""Which images training never sees. Decided by a seeded hash of what is held out, so that adding a set or
reordering the icons moves nothing else.

- heldout_combination: a whole (concept, gender, skin tone), in every style: can the model compose?
- heldout_pair: a (name, style) whose name training sees in two other styles at least: can it transfer style?
"""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import Literal, NamedTuple

Split = Literal["train", "heldout_pair", "heldout_combination"]
SPLITS: tuple[Split, ...] = ("train", "heldout_pair", "heldout_combination")


class Item(NamedTuple):
    name: str
    style: str
    concept: str
    gender: str | None
    skin_tone: str | None


def chance(seed: int, kind: str, *parts: str | None) -> float:
    """A number in [0, 1) that depends on the words alone (Python's own hash changes with every run)."""
    text = "\x1f".join([str(seed), kind, *(part or "" for part in parts)])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:7]) / 2**56


def assign(items: Sequence[Item], seed: int, combination_share: float, pair_share: float) -> list[Split]:
    combinations = _choose_combinations(items, seed, combination_share)
    rest = [item for item in items if _combination(item) not in combinations]
    pairs = _choose_pairs(rest, seed, pair_share)
    splits: list[Split] = []
    for item in items:
        if _combination(item) in combinations:
            splits.append("heldout_combination")
        else:
            splits.append("heldout_pair" if (item.name, item.style) in pairs else "train")
    check(items, splits)
    return splits


def _combination(item: Item) -> tuple[str, str, str] | None:
    if item.gender is None or item.skin_tone is None:
        return None
    return item.concept, item.gender, item.skin_tone


def _choose_combinations(items: Sequence[Item], seed: int, share: float) -> set[tuple[str, str, str]]:
    genders: defaultdict[str, set[str]] = defaultdict(set)
    found: set[tuple[str, str, str]] = set()
    for item in items:
        if item.gender is not None:
            genders[item.concept].add(item.gender)
        if (combination := _combination(item)) is not None:
            found.add(combination)
    # What must stay in training: the concept in this gender (with another skin tone), and the skin tone.
    left_of_gender = Counter((concept, gender) for concept, gender, _ in found)
    left_of_tone = Counter(tone for _, _, tone in found)
    chosen: set[tuple[str, str, str]] = set()
    for concept, gender, tone in sorted(found, key=lambda one: chance(seed, "combination", *one)):
        if chance(seed, "combination", concept, gender, tone) >= share:
            break
        if len(genders[concept]) < 2 or left_of_gender[concept, gender] < 2 or left_of_tone[tone] < 2:
            continue
        left_of_gender[concept, gender] -= 1
        left_of_tone[tone] -= 1
        chosen.add((concept, gender, tone))
    return chosen


def _choose_pairs(items: Sequence[Item], seed: int, share: float) -> set[tuple[str, str]]:
    styles: defaultdict[str, set[str]] = defaultdict(set)
    for item in items:
        styles[item.name].add(item.style)
    chosen: set[tuple[str, str]] = set()
    for name, of_name in styles.items():
        order = sorted(of_name, key=lambda style: chance(seed, "pair", name, style))
        for style in order[: max(0, len(of_name) - 2)]:  # two styles stay
            if chance(seed, "pair", name, style) < share:
                chosen.add((name, style))
    return chosen


def check(items: Sequence[Item], splits: Sequence[Split]) -> None:
    """Our invariants; a failure is our bug, never the user's."""
    trained = [item for item, split in zip(items, splits, strict=True) if split == "train"]
    names = defaultdict(set)
    for item in trained:
        names[item.name].add(item.style)
    combinations = {_combination(item) for item in trained}
    genders = {(item.concept, item.gender) for item in trained}
    tones = {item.skin_tone for item in trained}
    for item, split in zip(items, splits, strict=True):
        if split == "heldout_combination":
            assert _combination(item) not in combinations, item
            assert (item.concept, item.gender) in genders, item
            assert item.skin_tone in tones, item
        if split == "heldout_pair":
            assert item.style not in names[item.name], item
            assert len(names[item.name]) >= 2, item
