"""How far an export may be from torch. Without torch: the command's help shows the defaults."""

from __future__ import annotations

from dataclasses import dataclass

from engines.bundle import Parity, PictureParity
from engines.errors import ExportError

RAISED = "bf16 raised to f32"
"""What a bfloat16 graph computes in when it is checked on a CPU (`engines/export/raised.py`)."""

EXACT = ("f32", RAISED)
"""Precisions in which nothing but rounding order and stored bits may differ."""


@dataclass(frozen=True)
class Tolerance:
    """What an export may be off by. Above it nothing is written.

    `stored` bounds a float32 graph against torch with the very same (float16-rounded) weights: rounding order, nothing
    else. `original` bounds what storing the weights in float16 costs, `low` what computing in fewer bits (bfloat16,
    int8) costs, both against torch with the original weights. `constants` bounds a bfloat16 graph whose arithmetic is
    raised to float32 against torch with its weights: the graph's own constants (a GELU's 1.702) are bfloat16 too.

    These are relative L2 errors; pictures (uint8) may in addition differ by `levels` of 255 in any one value where
    computation is in float32. `psnr` (dB) bounds whole pictures in float32.
    """

    stored: float = 1e-5
    original: float = 1e-2
    low: float = 2e-2
    constants: float = 2e-3
    levels: int = 1
    psnr: float = 40.0
    unfused: bool = False
    """Whether a compiler may leave attention in parts."""

    def check(self, component: str, parity: Parity) -> None:
        """Raise `ExportError` if `parity` is above tolerance (or not a number)."""
        exact = parity.precision in EXACT
        if not exact:
            limit = self.low
        elif parity.precision == RAISED:
            limit = self.constants
        else:
            limit = self.stored if parity.weights == "stored" else self.original
        where = (
            f"{component} at batch {parity.batch} on {parity.runtime} {parity.precision} against torch with "
            f"{parity.weights} weights"
        )
        if component == "decoder" and parity.weights == "stored" and exact:
            if not parity.max_abs <= self.levels:
                raise ExportError(
                    f"{where}: pictures differ by {parity.max_abs:g} of 255; at most {self.levels} is allowed"
                )
        elif not parity.rel_l2 <= limit:
            raise ExportError(
                f"{where}: relative L2 error {parity.rel_l2:.2e}; at most {limit:.0e} is allowed"
            )

    def check_picture(self, parity: PictureParity) -> None:
        """Raise `ExportError` if whole pictures are too far off in float32."""
        if parity.precision in EXACT and not parity.psnr >= self.psnr:
            raise ExportError(
                f"pictures of {parity.steps} steps on {parity.runtime} {parity.precision}: PSNR {parity.psnr:.1f} dB "
                f"against torch; at least {self.psnr:g} is needed"
            )
