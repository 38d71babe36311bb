"""Prompt embeddings, kept by token ids: the least recently used leave first."""

from __future__ import annotations

from collections import OrderedDict

from engines.base import Conditioning, TokenIds


class EmbeddingCache:
    """At most `entries` embeddings. Not safe for several threads at once."""

    def __init__(self, entries: int) -> None:
        self._entries = entries
        self._kept: OrderedDict[TokenIds, Conditioning] = OrderedDict()

    def __len__(self) -> int:
        return len(self._kept)

    def get(self, tokens: TokenIds) -> Conditioning | None:
        """The embedding of `tokens`, if it is kept."""
        if tokens not in self._kept:
            return None
        self._kept.move_to_end(tokens)
        return self._kept[tokens]

    def put(self, tokens: TokenIds, conditioning: Conditioning) -> None:
        """Keep an embedding; the one that was not asked for longest leaves when it is too many."""
        self._kept[tokens] = conditioning
        self._kept.move_to_end(tokens)
        if len(self._kept) > self._entries:
            self._kept.popitem(last=False)
