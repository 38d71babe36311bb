"""Prompts whose quoted parts are tokenized a character at a time: how LongCat-Image learns to write a text.

tokenize("A sign says 'Hi' on it.", encode)     # encode("A sign says "), encode("'"), encode("H"), …, encode(" on it.")

No torch: the server uses it with a bundle's `tokenizers` file, the family with a transformers tokenizer.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from itertools import pairwise

_PAIRS = (("'", "'"), ('"', '"'), ("‘", "’"), ("“", "”"))
_QUOTED = re.compile("|".join(f"{opening}[^{opening}{closing}]*?{closing}" for opening, closing in _PAIRS))
_WORD = re.compile(r"[a-zA-Z]+'[a-zA-Z]+")
"""An apostrophe between Latin letters: “don't” opens no quotation."""


def split_quotation(prompt: str) -> list[tuple[str, bool]]:
    """The parts of `prompt`, in order and none empty, and whether each is spelled; joined, they are the prompt again.

    The same as diffusers' `split_quotation`, which the LongCat-Image pipeline uses, where a prompt has at most one
    *different* word with an apostrophe. From two on ("it's … don't") that function puts one of them in the other's
    place, and which one depends on Python's hash seed; here every word stays what it is.
    """
    masked = _WORD.sub(lambda word: word.group().replace("'", "-"), prompt)  # as long as the prompt
    borders = [0, *(end for quoted in _QUOTED.finditer(masked) for end in quoted.span()), len(prompt)]
    parts = (prompt[start:end] for start, end in pairwise(borders))
    # As in diffusers, a part is judged by how it begins, apostrophes and all: all of "'twas, he didn't" is spelled.
    return [(part, bool(_QUOTED.match(part))) for part in parts if part]


def tokenize(prompt: str, encode: Callable[[str], Sequence[int]]) -> list[int]:
    """Ids of a prompt, uncut. `encode` gives those of a text without special tokens."""
    pieces = (piece for part, spelled in split_quotation(prompt) for piece in (part if spelled else [part]))
    return [token for piece in pieces for token in encode(piece)]


def frame(
    ids: Sequence[int], length: int, pad_id: int, prefix: Sequence[int] = (), suffix: Sequence[int] = ()
) -> list[int]:
    """`prefix`, then `ids` cut or padded, then `suffix`: exactly `length` ids."""
    room = length - len(prefix) - len(suffix)
    assert room > 0, f"{length} ids leave no room between {len(prefix)} and {len(suffix)}"
    kept = list(ids[:room])
    return [*prefix, *kept, *[pad_id] * (room - len(kept)), *suffix]
