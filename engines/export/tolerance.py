"""How far an export may be from torch. Without torch: the command's help shows the defaults."""

from __future__ import annotations

from dataclasses import dataclass

from engines.bundle import Parity
from engines.errors import ExportError


@dataclass(frozen=True)
class Tolerance:
    """What an export may be off by. Above it nothing is written.

    `stored` bounds the graph against torch with the very same (float16-rounded) weights: rounding order, nothing
    else. `original` bounds what storing the weights in float16 costs. Both are relative L2 errors; pictures (uint8)
    may in addition differ from torch's by `levels` of 255 in any one value.
    """

    stored: float = 2e-5
    original: float = 1e-2
    levels: int = 1

    def check(self, component: str, parity: Parity) -> None:
        """Raise `ExportError` if `parity` is above tolerance (or not a number)."""
        limit = self.stored if parity.weights == "stored" else self.original
        where = f"{component} at batch {parity.batch} against torch with {parity.weights} weights"
        if component == "decoder" and parity.weights == "stored":
            if not parity.max_abs <= self.levels:
                raise ExportError(
                    f"{where}: pictures differ by {parity.max_abs:g} of 255; at most {self.levels} is allowed"
                )
        elif not parity.rel_l2 <= limit:
            raise ExportError(
                f"{where}: relative L2 error {parity.rel_l2:.2e}; at most {limit:.0e} is allowed"
            )
