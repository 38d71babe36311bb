"""Run-together names → words: "tropicalfish" → "tropical fish", by the cheapest path under unigram costs."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping

# Short words that a name may really contain; letters like "st" or "el" would eat into longer unknown words.
_SHORT = frozenset({"of", "in", "on", "up", "ok", "no", "to", "by", "tv", "cd"})
# Words of the vendors' own that no other set has.
_EXTRA = ("document", "cancellation", "ideograph", "unified", "size", "decrease", "icon", "font", "text", "folder",
          "fisted", "side", "computers", "page", "pages", "rays", "above", "below", "smiley", "missing", "wired",
          "lower", "upper", "trend", "waves", "wave", "modem", "hard", "soft", "latin", "decorative", "portable",
          "tape", "clam", "shell", "raised", "splayed", "stock", "stamped", "ascend", "descend", "music", "acorn",
          "notched", "increase", "overlap", "sideways", "bold", "script", "piracy", "personal", "sound",
          "grin", "cartridge", "frame", "contact", "minimize", "maximize", "turned", "semi", "chapter",
          "symbol")  # fmt: skip


class WordSplitter:
    def __init__(self, counts: Mapping[str, int]) -> None:
        usable = {w: n for w, n in counts.items() if w.isalpha() and (len(w) > 2 or w in _SHORT)}
        known = {**dict.fromkeys(_EXTRA, 1), **usable} if usable else {}
        total = sum(known.values()) + 1
        # A piece costs its own information plus a constant: of two ways to cut, the one with fewer words is better.
        self._cost = {word: math.log(total / count) + 3 for word, count in known.items()}
        # A run of letters outside any word: dear to begin, cheap to continue, so it is not cut up by short words.
        self._begin = math.log(total) + 6
        self._continue = 3.3

    def split(self, text: str) -> str:
        """Letters that fit no word stay together as they are; numbers are words.

        >>> WordSplitter({"tropical": 1, "fish": 3}).split("tropicalfish")
        'tropical fish'
        """
        return " ".join(
            piece
            for run in re.findall(r"[a-z]+|[0-9]+", text)
            for piece in (self._split(run) if run.isalpha() else [run])
        )

    def _split(self, text: str) -> list[str]:
        # best[end]: the cost of the cheapest cut of text[:end], and where its last piece starts.
        best: list[tuple[float, int]] = [(0.0, 0)]
        for end in range(1, len(text) + 1):
            best.append(min((best[start][0] + self._price(text[start:end]), start) for start in range(end)))
        pieces: list[str] = []
        end = len(text)
        while end > 0:
            start = best[end][1]
            pieces.append(text[start:end])
            end = start
        return pieces[::-1]

    def _price(self, piece: str) -> float:
        return self._cost.get(piece, self._begin + self._continue * len(piece))
