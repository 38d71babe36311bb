"""Prompt → token ids, with the `tokenizers` package and the bundle's JSON files; equal to transformers' tokenizers.

text = BundleTokenizers(bundle)
ids = text.tokenize("red apple")             # ((49406, 736, …, 49407), (49406, …))
text.batch([ids, ids])["input_ids"].shape    # (2, length)
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from engines import spelling
from engines.base import TokenIds
from engines.bundle import Bundle
from engines.bundle import Tokenizer as Spec
from engines.errors import BundleError


class BundleTokenizers:
    """Every tokenizer of a bundle, cutting and padding to its own length. Thread-safe."""

    def __init__(self, bundle: Bundle) -> None:
        """Raises `BundleError` if a file is not a tokenizer that the installed `tokenizers` can read."""
        self.inputs = tuple(spec.input for spec in bundle.manifest.tokenizers)
        self._tokenizers = []
        for spec in bundle.manifest.tokenizers:
            path = bundle.root / spec.file.file
            try:
                tokenizer = Tokenizer.from_str(path.read_text(encoding="utf-8"))
            except Exception as error:  # the package raises plain Exception
                raise BundleError(f"{path} is not a tokenizer that can be read here: {error}") from error
            if not spec.spell_quotes:
                # Special tokens (start, end) count as part of the length, so the end token survives the cut.
                length = spec.length - len(spec.prefix) - len(spec.suffix)
                tokenizer.enable_truncation(max_length=length)
                tokenizer.enable_padding(length=length, pad_id=spec.pad_id)
            self._tokenizers.append((spec, tokenizer))

    def tokenize(self, prompt: str) -> TokenIds:
        """Ids per tokenizer, each exactly its length. Any Python string: half a surrogate pair reads as U+FFFD."""
        text = prompt.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        return tuple(_ids(text, spec, tokenizer) for spec, tokenizer in self._tokenizers)

    def batch(self, tokens: Sequence[TokenIds]) -> dict[str, NDArray[np.int64]]:
        """The text encoder's inputs, `(batch, length)` each."""
        columns = zip(*tokens, strict=True)
        return {
            name: np.array(column, dtype=np.int64) for name, column in zip(self.inputs, columns, strict=True)
        }


def _ids(text: str, spec: Spec, tokenizer: Tokenizer) -> tuple[int, ...]:
    if not spec.spell_quotes:
        return (*spec.prefix, *tokenizer.encode(text).ids, *spec.suffix)

    def encode(piece: str) -> list[int]:
        ids: list[int] = tokenizer.encode(piece, add_special_tokens=False).ids
        return ids

    ids = spelling.tokenize(text, encode)
    return tuple(spelling.frame(ids, spec.length, spec.pad_id, spec.prefix, spec.suffix))
