"""Numbers, times and sizes as a reader wants them."""

from __future__ import annotations

import datetime


def number(value: float) -> str:
    """Four significant digits; whole numbers whole."""
    sign, size = ("−" if value < 0 else ""), abs(value)
    if size == int(size) and size < 1e15:
        return sign + f"{int(size):,}".replace(",", "\u202f")
    return sign + f"{size:.4g}".replace("e-0", "e-")


def compact(value: float) -> str:
    """A tick's label: 2000 → 2k, −0.5 → −0.5, 1e-5 → 1e-5."""
    sign, size = ("−" if value < 0 else ""), abs(value)
    for limit, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if size >= limit:
            return f"{sign}{size / limit:.6g}{letter}"
    return sign + f"{size:.4g}".replace("e-0", "e-")


def duration(seconds: float) -> str:
    """Two units: `1 d 4 h`, `3 h 5 min`, `14 min 7 s`, `8 s`."""
    whole = round(seconds)
    parts = [(whole // 86400, "d"), (whole // 3600 % 24, "h"), (whole // 60 % 60, "min"), (whole % 60, "s")]
    first = next((index for index, (count, _) in enumerate(parts) if count), 3)
    return " ".join(f"{count} {unit}" for count, unit in parts[first : first + 2] if count or unit == "s")


def size(count: float) -> str:
    """Bytes in powers of 1000: `213 MB`."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 999.5:
            return f"{count:.0f} {unit}" if unit == "B" or count >= 99.5 else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def moment(timestamp: float) -> str:
    """`2026-11-22 12:17 UTC`."""
    return datetime.datetime.fromtimestamp(timestamp, datetime.UTC).strftime("%Y-%m-%d %H:%M UTC")
