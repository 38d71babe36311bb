"""The bundle's tokenizers give the ids that transformers gives, for any text."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from engines.bundle import Bundle, BundleError
from engines.export.export import write_tokenizers
from engines.fake import fake_bundle
from engines.families.base import load_family
from engines.text import BundleTokenizers
from tests.tiny_sd3 import WORDS, build_tokenizer

words = st.lists(
    st.sampled_from([*WORDS, "Xyz", "’s", "it's", "<|endoftext|>", "<|startoftext|>", "2nd"])
).map(" ".join)
TRANSFORMERS = build_tokenizer()


@pytest.fixture(scope="module")
def bundle(student: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """The student's tokenizers as export writes them, in a bundle whose other parts are fake: no export needed."""
    fake = fake_bundle(tmp_path_factory.mktemp("text"))
    tokenizers = write_tokenizers(load_family(student), fake.root)
    return replace(fake, manifest=fake.manifest.model_copy(update={"tokenizers": tokenizers}))


@pytest.fixture(scope="module")
def text(bundle: Bundle) -> BundleTokenizers:
    return BundleTokenizers(bundle)


@settings(deadline=None, max_examples=200)
@given(
    st.one_of(st.text(), words, st.text(st.characters(codec="utf-8", categories=["So", "Mn", "Cf", "Lo"])))
)
@example("")
@example("  red \t\n apple\u3000 ")
@example("red apple " * 40)
@example("\u0000\ufeff\U0010ffff é e\u0301 İ ﬁ 🏳️‍🌈")
def test_ids_equal_transformers(text: BundleTokenizers, prompt: str) -> None:
    theirs = TRANSFORMERS(prompt, padding="max_length", max_length=12, truncation=True).input_ids
    assert text.tokenize(prompt) == (tuple(theirs), tuple(theirs))


def test_a_cut_prompt_keeps_its_end_token(text: BundleTokenizers) -> None:
    ids = text.tokenize("apple " * 100)[0]
    assert (ids[0], ids[-1]) == (TRANSFORMERS.bos_token_id, TRANSFORMERS.eos_token_id)
    assert set(ids[1:-1]) == {TRANSFORMERS.get_vocab()["apple</w>"]}


def test_half_a_surrogate_pair_is_no_error(text: BundleTokenizers) -> None:
    assert text.tokenize("red \ud83d apple") == text.tokenize("red \ufffd apple")
    assert text.tokenize("red \ud83c\udf4e apple") == text.tokenize("red 🍎 apple")


def test_batch_is_one_row_per_prompt(text: BundleTokenizers, student: Path) -> None:
    prompts = ["red apple", "flag of japan"]
    mine = text.batch([text.tokenize(prompt) for prompt in prompts])
    theirs = load_family(student).tokenize(prompts)
    assert {name: ids.tolist() for name, ids in mine.items()} == {
        name: ids.tolist() for name, ids in theirs.items()
    }


def test_unreadable_tokenizer_is_named(bundle: Bundle, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{}", encoding="utf-8")
    with pytest.raises(BundleError, match=r"tokenizer\.json is not a tokenizer"):
        BundleTokenizers(replace(bundle, root=tmp_path))
