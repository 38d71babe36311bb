"""Engines in trouble: one whose calls are told to fail, and one that hangs at a prompt, for server processes."""

from __future__ import annotations

import time
from collections.abc import Sequence

from engines.base import Conditioning, TokenIds
from engines.fake import FakeEngine
from tests.cdm_serve.helpers import Gate

FOREVER_S = 3600.0
HANG = "an engine call that never returns"
RUN_TROUBLED = (
    "from engines.base import RUNTIMES; RUNTIMES['fake'] = 'tests.cdm_serve.troubled:PromptedTrouble'; "
    "from cdm_serve.main import main; raise SystemExit(main())"
)
"""What `python -c` runs in place of `python -m cdm_serve.main`."""


class Panic(BaseException):
    """What a panic in a native library looks like to Python: no `Exception`."""


class Trouble(Gate):
    """A gate that also makes calls of a component raise: `raises("decode", MemoryError())`, until `heal()`."""

    def __init__(self) -> None:
        super().__init__()
        self._errors: dict[str, BaseException] = {}

    def raises(self, component: str, error: BaseException) -> None:
        self._errors[component] = error

    def heal(self) -> None:
        self._errors.clear()

    def cost(self, component: str, batch: int) -> float:
        if component in self._errors:
            raise self._errors[component]
        return super().cost(component, batch)


class PromptedTrouble(FakeEngine):
    """A fake engine that never returns from encoding `HANG`."""

    def encode(self, tokens: Sequence[TokenIds]) -> list[Conditioning]:
        if self.tokenize(HANG) in tokens:
            time.sleep(FOREVER_S)
        return super().encode(tokens)
