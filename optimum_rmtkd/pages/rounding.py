"""Numbers as people read them: three digits that count, a unit, a true minus sign."""

from __future__ import annotations

import math


__all__ = ["counted", "duration", "rounded", "share", "short", "signed", "size"]

LARGE = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))
SMALL = ((1.0, "s"), (1e-3, "ms"), (1e-6, "µs"), (1e-9, "ns"))
RAISED = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
NONE = "–"


def short(value: float) -> str:
    """1234567 as 1.23M: for axes, where room is scarce."""
    return counted(value).replace(" ", "")


def counted(value: float) -> str:
    """1234567 as 1.23 M; whole numbers below 1000 as they are."""
    value = float(f"{value:.3g}")  # 999,999 is 1 M
    for scale, unit in LARGE:
        if abs(value) >= scale:
            return f"{_three(value / scale)} {unit}"
    return _three(value)


def size(count: float) -> str:
    """Bytes: 4788056 as 4.79 MB (powers of 1000)."""
    text = counted(count)
    return f"{text}B" if " " in text else f"{text} B"


def duration(seconds: float) -> str:
    """0.01159 as 11.6 ms."""
    for scale, unit in SMALL:
        if abs(seconds) >= scale:
            return f"{_three(seconds / scale)} {unit}"
    return f"{_three(seconds)} s"


def share(value: float, digits: int = 1) -> str:
    """0.8001 as 80.0 %."""
    return f"{100 * value:.{digits}f} %"


def signed(value: float, digits: int = 2) -> str:
    """With its sign, ±0.00 for what is rounded to nothing."""
    text = f"{value:+.{digits}f}"
    return f"±{text[1:]}" if not float(text) else text.replace("-", "−")


def rounded(value: float) -> str:
    """Any number of a table: 1,234; 0.1234; 1.9 × 10⁻⁷; a dash for what is not finite."""
    if not math.isfinite(value):
        return NONE
    if isinstance(value, int) or (value == round(value) and abs(value) < 1e6):
        return f"{value:,.0f}".replace("-", "−")
    if 1e-3 <= abs(value) < 1e6:
        text = f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4f}" if abs(value) < 1 else f"{value:.4g}"
        return text.replace("-", "−")
    digits, power = f"{value:.1e}".split("e")
    return f"{digits.replace('-', '−')} × 10{str(int(power)).translate(RAISED)}"


def _three(value: float) -> str:
    text = f"{value:.3g}"
    return f"{value:.0f}" if "e" in text else text
