from __future__ import annotations

from collections import defaultdict

from training.emoji.splits import Item, assign, chance

GENDERS = ("man", "woman", "person")
TONES = ("light", "medium", "dark")
STYLES = ("a", "b", "c", "d")
ITEMS = [
    Item(f"{gender} {job} {tone}", style, job, gender, tone)
    for job in (f"job{number}" for number in range(20))
    for gender in GENDERS
    for tone in TONES
    for style in STYLES
] + [
    Item(f"thing{number}", style, f"thing{number}", None, None)
    for number in range(100)
    for style in STYLES[: number % 5]
]


def test_shares_are_about_what_was_asked() -> None:
    splits = assign(ITEMS, seed=0, combination_share=0.1, pair_share=0.1)
    combinations = {
        (item.concept, item.gender, item.skin_tone)
        for item, split in zip(ITEMS, splits, strict=True)
        if split == "heldout_combination"
    }
    assert 0.05 < len(combinations) / (20 * 9) < 0.15
    assert 0.05 < splits.count("heldout_pair") / len(ITEMS) < 0.13


def test_invariants_hold_even_when_asked_for_far_too_much() -> None:
    splits = assign(ITEMS, seed=3, combination_share=1.0, pair_share=1.0)
    trained = [item for item, split in zip(ITEMS, splits, strict=True) if split == "train"]
    styles = defaultdict(set)
    for item in trained:
        styles[item.name].add(item.style)
    combinations = {(item.concept, item.gender, item.skin_tone) for item in trained}
    assert {item.skin_tone for item in trained} >= set(TONES)
    for item, split in zip(ITEMS, splits, strict=True):
        if split == "heldout_combination":
            assert (item.concept, item.gender, item.skin_tone) not in combinations
            assert any(other[:2] == (item.concept, item.gender) for other in combinations)
        elif split == "heldout_pair":
            assert item.style not in styles[item.name]
            assert len(styles[item.name]) == 2


def test_order_of_the_items_and_new_items_move_nothing() -> None:
    splits = dict(zip(ITEMS, assign(ITEMS, 0, 0.1, 0.1), strict=True))
    more = [*reversed(ITEMS), Item("comet", "a", "comet", None, None)]
    again = dict(zip(more, assign(more, 0, 0.1, 0.1), strict=True))
    assert all(again[item] == split for item, split in splits.items())


def test_another_seed_holds_out_others() -> None:
    assert assign(ITEMS, 0, 0.1, 0.1) != assign(ITEMS, 1, 0.1, 0.1)


def test_nothing_is_held_out_of_one_gender_or_two_styles() -> None:
    lonely = [Item(f"man fisher {tone}", style, "fisher", "man", tone) for tone in TONES for style in "ab"]
    assert set(assign(lonely, 0, 1.0, 1.0)) == {"train"}


def test_chance_is_a_fixed_function_of_the_words() -> None:
    assert chance(0, "pair", "rocket", "noto") == chance(0, "pair", "rocket", "noto")
    assert chance(0, "pair", "ab", "c") != chance(0, "pair", "a", "bc")
    assert 0.0 <= chance(0, "pair", None) < 1.0
