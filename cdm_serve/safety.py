"""What this server will not draw: prompts on a block-list, and pictures that a hook of the operator's refuses.

    cdm-serve --block-list words.txt --safety-hook my_filter:allows

    def allows(pixels, facts):                  # my_filter.py; uint8 (height, width, 3), not writable
        return score(pixels) < 0.5              # facts: prompt, seed, steps, width, height, model

Asked by `Service`, so that no API gets around it.
"""

from __future__ import annotations

import importlib
import inspect
import logging
import re
import unicodedata
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cdm_serve.errors import ContentRefused, SafetyFailed
from cdm_serve.metrics import Metrics
from engines.cli import UsageError

log = logging.getLogger("cdm_serve.safety")

Hook = Callable[[NDArray[np.uint8], Mapping[str, Any]], bool]

# Unicode's Default_Ignorable_Code_Point: they show as nothing, and would split or glue words unseen.
IGNORED = re.compile(
    "[\u00ad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180b-\u180f\u200b-\u200f\u202a-\u202e\u2060-\u206f\u3164"
    "\ufe00-\ufe0f\ufeff\uffa0\ufff0-\ufff8\U0001bca0-\U0001bca3\U0001d173-\U0001d17a\U000e0000-\U000e0fff]"
)
ACCENTS = re.compile("[\u0300-\u036f]")
# Scripts that leave no spaces between words (Thai to Myanmar, Khmer, kana, Han): each character is a word there, so
# that an entry is found inside a sentence.
UNSPACED = re.compile(
    "[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\U00020000-\U0003ffff]"
)


def words(text: str) -> tuple[str, ...]:
    """`text` as words that compare equal whatever their case, accents, width and composition.

    Compatibility caseless matching (The Unicode Standard, section 3.13, D146), without Latin's, Greek's and Cyrillic's
    accents, and without what cannot be seen. `upper` joins those that share a capital only, as ı and i.
    """
    text = unicodedata.normalize("NFD", IGNORED.sub("", text))
    for _ in range(2):
        text = unicodedata.normalize("NFKD", text.upper().casefold())
    text = UNSPACED.sub(r" \g<0> ", ACCENTS.sub("", text))
    return tuple("".join(map(_in_word, text)).split())


def _in_word(character: str) -> str:
    """Letters, marks and numbers make words; a symbol such as an emoji is one; the rest stands between them."""
    category = unicodedata.category(character)
    return character if category[0] in "LMN" else f" {character} " if category == "So" else " "


class BlockList:
    """Words and phrases. A prompt is refused that has all the words of one beside each other, in their order."""

    def __init__(self, lines: Iterable[str]) -> None:
        self._by_first: dict[str, list[tuple[tuple[str, ...], int]]] = {}
        for number, line in enumerate(lines, 1):
            if not line.strip() or line.lstrip().startswith("#"):
                continue
            if not (entry := words(line)):
                raise UsageError(
                    f"line {number} of the block-list has no word in it; write one, or a # before it"
                )
            self._by_first.setdefault(entry[0], []).append((entry, number))

    @classmethod
    def read(cls, path: Path) -> BlockList:
        """One entry a line; empty lines and those that begin with # are none. `UsageError`: there is no entry."""
        try:
            lines = path.read_text(encoding="utf-8-sig").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            reason = (isinstance(error, OSError) and error.strerror) or "it is not UTF-8"
            raise UsageError(f"--block-list={path} cannot be read: {reason}") from error
        made = cls(lines)
        if not made._by_first:
            raise UsageError(
                f"--block-list={path} has no entry; write one word or phrase a line, or leave it out"
            )
        return made

    def line_of(self, prompt: str) -> int | None:
        """The line of an entry that is in `prompt`."""
        text = words(prompt)
        for start, word in enumerate(text):
            for entry, line in self._by_first.get(word, ()):
                if text[start : start + len(entry)] == entry:
                    return line
        return None


def load_hook(target: str) -> Hook:
    """The function that `module:function` names. `UsageError`: there is none, or not one to call."""
    module_name, _, name = target.partition(":")
    try:
        hook: Any = getattr(importlib.import_module(module_name), name)
    except Exception as error:  # a module may raise whatever it likes
        raise UsageError(
            f"--safety-hook={target} cannot be imported: {type(error).__name__}: {error}; install the module, or put "
            "its folder on PYTHONPATH"
        ) from error
    if not callable(hook) or inspect.iscoroutinefunction(hook):
        raise UsageError(f"--safety-hook={target} must be a plain function of pixels and facts")
    checked: Hook = hook
    return checked


class Safety:
    """The checks that this server was started with."""

    def __init__(self, block_list: Path | None, hook: str | None, metrics: Metrics) -> None:
        self._block_list = None if block_list is None else BlockList.read(block_list)
        self._hook_name = hook
        self._hook = None if hook is None else load_hook(hook)
        self._metrics = metrics

    def check_prompt(self, prompt: str) -> None:
        """Raises `ContentRefused`. Neither the answer nor the log tells the word: one is for guessers, one for all."""
        if self._block_list is not None and (line := self._block_list.line_of(prompt)):
            self._metrics.safety_refusals.labels("block_list").inc()
            log.info("prompt refused by line %d of the block-list", line, extra={"fields": {"line": line}})
            raise ContentRefused("this server's content policy refuses the prompt; change it", param="prompt")

    def check_picture(self, pixels: NDArray[np.uint8], facts: Mapping[str, Any]) -> None:
        """Ask the hook about a picture `(height, width, 3)`. Called by several threads at once.

        Raises:
            ContentRefused: it says False.
            SafetyFailed: it says neither True nor False, or raises: a picture that could not be judged is not shown.
        """
        if self._hook is None:
            return
        shown = pixels.view()
        shown.flags.writeable = False
        try:
            allowed: object = self._hook(shown, dict(facts))
        except BaseException as error:  # SystemExit too, or nobody would be answered
            log.exception("the safety hook %s failed", self._hook_name)
            raise SafetyFailed(
                f"the safety hook {self._hook_name} failed ({type(error).__name__}), so the picture is not shown"
            ) from error
        if not isinstance(allowed, (bool, np.bool_)):
            log.error("the safety hook %s returned a %s", self._hook_name, type(allowed).__name__)
            raise SafetyFailed(
                f"the safety hook {self._hook_name} returned neither True nor False but a {type(allowed).__name__}, so "
                "the picture is not shown"
            )
        if not allowed:
            self._metrics.safety_refusals.labels("hook").inc()
            log.info("picture refused by the safety hook %s", self._hook_name)
            raise ContentRefused(
                "this server's content policy refuses the picture that came of this; change the prompt or the seed"
            )
